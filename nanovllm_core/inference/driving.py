"""One engine and many callers: who waits for an answer drives the engine, for all; a thread does for those who await.

Callers of any thread ask and give up by leaving word, which is heard before the next forward, so an event loop never
waits for one. The thread lives while there is something to do. An error of a forward ends all answers that run, each with that
error; the engine goes on with the next question.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import suppress
from typing import Any

from nanovllm_core.errors import GenerationError
from nanovllm_core.inference.engine import Engine
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.inference.sequence import Prompt, Sequence
from nanovllm_core.inference.streaming import Pieces


class Driver:
    """Lets callers of all threads and event loops share an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._turn = threading.Lock()  # held by who touches the engine
        self._word: deque[Callable[[], None]] = deque()  # what others want done with it
        self._gate = threading.Lock()  # of the thread's beginning and end, and of word that is left for it
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ for those who wait

    def run(self, sequences: Many[Sequence]) -> Iterator[None]:
        """Drive until these are over, yielding whenever something may be new. Raises GenerationError where one fails.

        Those that are not over when the caller leaves are aborted.
        """
        self._word.append(lambda: self.engine.enqueue(sequences))
        over = 0  # of the first ones
        try:
            while over < len(sequences):
                if sequences[over].finish_reason is not None:
                    over += 1
                    continue
                with self._turn:
                    self._step()
                yield
            _raise(sequences)
        finally:
            # The garbage collector may end this within a step, of this thread or another: who has the turn hears it then.
            self._word.append(lambda: self._abort(sequences))
            self._hear_if_free()

    def stream(self, sequences: Many[Sequence]) -> Iterator[dict[str, Any]]:
        """The pieces of these answers as they are made."""
        pieces = [Pieces(s, self.engine.tokenizer) for s in sequences]
        for _ in self.run(sequences):
            yield from _told(pieces)
        yield from _told(pieces)  # another caller may have driven to the end

    # ------------------------------------------------------------ for those who await

    async def astream(self, prompt: Prompt, params: SamplingParams) -> AsyncGenerator[dict[str, Any], None]:
        """The pieces of the answers to a prompt. Who leaves early, or is cancelled, ends them."""
        sequences = await asyncio.to_thread(self.engine.answers, [prompt], [params])
        news, loop = asyncio.Event(), asyncio.get_running_loop()
        for sequence in sequences[0]:
            sequence.advanced = lambda: _set(loop, news)
        pieces = [Pieces(s, self.engine.tokenizer) for s in sequences[0]]
        try:
            self._leave(lambda: self.engine.enqueue(sequences[0]))
            while not all(piece.over for piece in pieces):  # told, not only made: the thread is ahead
                await news.wait()
                news.clear()
                for piece in _told(pieces):
                    yield piece
            _raise(sequences[0])
        finally:
            unfinished = [s for s in sequences[0] if s.finish_reason is None]
            if unfinished:
                self._leave(lambda: self._abort(unfinished))

    def _leave(self, word: Callable[[], None]) -> None:
        """Have something done by the thread."""
        with self._gate:
            self._word.append(word)
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
                self._thread.start()

    def _drive(self) -> None:
        while True:
            with self._turn:
                self._step()
            with self._gate:  # nobody leaves word for the thread now; and with the turn, nobody is hearing one
                if self._turn.acquire(blocking=False):
                    try:
                        if not self._word and not self.engine.busy:
                            self._thread = None
                            return
                    finally:
                        self._turn.release()

    # ------------------------------------------------------------ with the turn

    def _hear_if_free(self) -> None:
        """Hear what was left, unless another has the turn, who does so when it ends."""
        while self._word and self._turn.acquire(blocking=False):
            try:
                self._hear()
            finally:
                self._turn.release()

    def _hear(self) -> None:
        while self._word:
            self._word.popleft()()

    def _abort(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abort(sequence)

    def _step(self) -> None:
        self._hear()
        if self.engine.busy:
            try:
                self.engine.step()
            except Exception as e:
                self.engine.fail(e)
            except BaseException as e:  # Ctrl-C, anywhere in it
                self.engine.fail(e)
                self.engine.forget()
                raise


def _told(pieces: Many[Pieces]) -> Iterator[dict[str, Any]]:
    for one in pieces:
        piece = one.more()
        if piece is not None:
            yield piece


def _raise(sequences: Many[Sequence]) -> None:
    for sequence in sequences:
        if sequence.error is not None:
            if isinstance(sequence.error, GenerationError):
                raise sequence.error
            raise GenerationError(
                f"the model failed: {type(sequence.error).__name__}: {sequence.error}"
            ) from sequence.error


def _set(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(news.set)
