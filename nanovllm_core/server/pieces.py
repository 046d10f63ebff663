"""The pieces of the answers to several prompts, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from nanovllm_core.llm import LLM
from nanovllm_core.server.asked import Asked

Piece = tuple[int, dict[str, Any]]  # index of the choice: that of the prompt times n, plus that of the answer


async def pieces(llm: LLM, asked: Asked) -> AsyncGenerator[Piece, None]:
    """Who leaves ends the answers: close the generator, or cancel who iterates it.

    Nothing is made ready for a slow reader: what it has not taken comes as one larger piece. Raises GenerationError where
    the model fails.
    """
    streams = [llm.agenerate(prompt, asked.params) for prompt in asked.prompts]
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield piece["index"], piece
        return
    coming = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while coming:
            ready, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for one in ready:
                number = coming.pop(one)
                try:
                    piece = one.result()
                except StopAsyncIteration:
                    continue
                coming[asyncio.ensure_future(anext(streams[number]))] = number
                yield number * asked.params.n + piece["index"], piece
    finally:
        for one in coming:
            one.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
