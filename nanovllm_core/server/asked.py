"""A request's body as what the engine is asked: prompts as token ids, parameters, and how the answer is to come."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from attrs import frozen

from nanovllm_core.chat import chat_ids
from nanovllm_core.errors import GenerationError, ModelError
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.llm import LLM
from nanovllm_core.server.errors import ApiError, refuse
from nanovllm_core.server.parameters import check_names, sampling

ROLES = ("system", "developer", "user", "assistant")
EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name", "tool_call_id")  # only null or []


@frozen(kw_only=True)
class Asked:
    """What a request wants."""

    chat: bool
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    usage: bool  # tell it at the end of a stream

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.params.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


async def asked(body: Mapping[str, Any], llm: LLM, name: str, *, chat: bool, most: int) -> Asked:
    """Read a body. name: the model's; most: answers that one request may ask for. Raises ApiError."""
    model = body.get("model")
    if model is not None and model != name:
        if not isinstance(model, str):
            raise refuse("model", model, f"allowed: {name!r}")
        raise unknown_model(model, name)
    check_names(body, chat=chat)
    stream, usage = _streaming(body)
    params = sampling(body, chat=chat, longest=llm.max_model_len)
    given = _messages(body.get("messages")) if chat else _prompts(body.get("prompt"))
    count = params.n if chat else params.n * len(given)
    if count > most:
        raise ApiError(400, f"asks for {count} answers at once, allowed: {most}; send several requests", param="n")
    try:
        prompts = await asyncio.to_thread(_ids, llm, given, params, chat)
    except (GenerationError, ModelError) as e:
        place = f"{getattr(llm.tokenizer, 'folder', '')}: "  # is not a client's matter
        raise ApiError(400, str(e).removeprefix(place), param="messages" if chat else "prompt") from None
    return Asked(chat=chat, prompts=prompts, params=params, stream=stream, usage=usage)


def unknown_model(given: str, name: str) -> ApiError:
    return ApiError(
        404, f"model: got {given[:80]!r}, this server has {name!r} only", param="model", code="model_not_found"
    )


def _ids(llm: LLM, given: list[Any], params: SamplingParams, chat: bool) -> list[list[int]]:
    """Token ids of prompts that can be answered."""
    prompts = [chat_ids(llm.tokenizer, given)] if chat else given
    return [found[0].prompt for found in llm.engine.answers(prompts, [params.single(0)] * len(prompts))]


def _streaming(body: Mapping[str, Any]) -> tuple[bool, bool]:
    stream, options = body.get("stream"), body.get("stream_options")
    if not isinstance(stream, bool | None):
        raise refuse("stream", stream, "allowed: true or false")
    if options is None:
        return bool(stream), False
    if not stream:
        raise refuse("stream_options", options, "allowed only with stream: true")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise refuse("stream_options", options, "allowed: {'include_usage': true or false}")
    usage, padding = options.get("include_usage"), options.get("include_obfuscation")
    if not isinstance(usage, bool | None) or not isinstance(padding, bool | None):
        raise refuse("stream_options", options, "allowed: {'include_usage': true or false}")
    return True, bool(usage)


def _prompts(given: Any) -> list[Any]:
    """Texts, or lists of token ids."""
    allowed = "allowed: a text, a list of texts, a list of token ids, or a list of those"
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise refuse("prompt", given, allowed)
    if all(isinstance(one, str) for one in given):
        return given
    if all(isinstance(one, int) for one in given):
        return [given]
    if all(isinstance(one, list) and all(isinstance(i, int) for i in one) for one in given):
        return given
    raise refuse("prompt", given, allowed)


def _messages(given: Any) -> list[dict[str, str]]:
    if not isinstance(given, list) or not given:
        raise refuse("messages", given, "allowed: a list of {'role': ..., 'content': ...}, at least one")
    return [_message(one, f"messages[{i}]") for i, one in enumerate(given)]


def _message(given: Any, place: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise refuse(place, given, "allowed: {'role': ..., 'content': ...}")
    role = given.get("role")
    if role not in ROLES:
        raise refuse(f"{place}.role", role, f"allowed: {', '.join(ROLES)}")
    for name, value in given.items():
        if name in EMPTY and value not in (None, []):
            raise refuse(f"{place}.{name}", value, "not supported here, allowed: null")
        if name not in ("role", "content", *EMPTY):
            raise refuse(f"{place}", name, "allowed: role and content")
    content = _text(given.get("content"), f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text(given: Any, place: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise refuse(place, given, "allowed: a text, or a list of {'type': 'text', 'text': ...}")
    texts = list[str]()
    for i, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise refuse(f"{place}[{i}]", part, "allowed: {'type': 'text', 'text': ...}; images and sound are not read")
        texts.append(part["text"])
    return "".join(texts)
