"""The recipe's prompts, answered while the model is trained and when it is finished.

Training does not notice: answers draw by seed and position, and the module is left as it was. What goes wrong with
a sample on the way is said and the training goes on; the finished model's answers are part of the run, and raise.
"""

from __future__ import annotations

from typing import Any, cast

from nanovllm_core.contracts import Module, Tokenizer
from nanovllm_core.errors import GenerationError, Interrupted
from nanovllm_core.hookspecs import Callbacks
from nanovllm_core.inference.generate import answerable, generate
from nanovllm_core.inference.params import SamplingParams
from nanovllm_core.plan import Plan
from nanovllm_core.training.stop import StopRequest


class Samples:
    """What is asked, and whom to tell. Raises GenerationError at once for prompts that cannot be answered."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, events: Callbacks, stop: StopRequest) -> None:
        self.plan, self.tokenizer, self.events, self.stop = plan, tokenizer, events, stop
        self.asked = g = plan.recipe.generate
        params = SamplingParams(
            temperature=g.temperature, top_k=g.top_k, top_p=g.top_p, min_p=g.min_p, repetition_penalty=g.repetition_penalty,
            max_tokens=g.max_tokens, stop=g.stop, seed=g.seed,
        )  # fmt: skip
        self.params = [params] * len(g.prompts)
        answerable(g.prompts, self.params, tokenizer, plan.model.shape.max_positions)

    def begin(self) -> None:
        """Say so where no samples can be made on the way."""
        if self.asked.steps and self.asked.prompts and not self._whole:
            self.events.note(
                text="generate.steps: each device holds a part of the model, so the prompts are answered only when training is "
                "over"
            )

    def due(self, step: int) -> bool:
        """Whether the prompts are answered after this step."""
        return self._whole and bool(self.asked.steps and self.asked.prompts) and step % self.asked.steps == 0

    def on_the_way(self, module: Module, step: int) -> None:
        """Answer after a step of the training, in between."""
        try:
            texts = self._texts(cast("Module", _Stoppable(module, self.stop)))
        except Interrupted:
            return  # whoever trains looks for itself
        except (GenerationError, MemoryError, RuntimeError) as e:
            if not isinstance(e, GenerationError | MemoryError) and type(e).__name__ != "OutOfMemoryError":
                raise
            why = (str(e).splitlines() or [type(e).__name__])[0]
            self.events.note(text=f"step {step}: the prompts are not answered ({why}); the training goes on")
            return
        self.events.note(text=f"what the model writes after step {step}:")
        self._tell(texts, step)

    def of_the_finished(self, module: Module, step: int) -> None:
        """Answer when training is over."""
        self._tell(self._texts(module), step)

    @property
    def _whole(self) -> bool:
        layout = self.plan.model.layout
        return layout.shard == layout.tensor == 1

    def _texts(self, module: Module) -> list[str]:
        outputs = generate(
            module, self.tokenizer, self.asked.prompts, self.params, shape=self.plan.model.shape,
            device=self.plan.machine.device, max_len=self.plan.model.shape.max_positions,
        )  # fmt: skip
        return [output["text"] for output in outputs]

    def _tell(self, texts: list[str], step: int) -> None:
        for prompt, text in zip(self.asked.prompts, texts, strict=True):
            self.events.generated(step=step, prompt=prompt, text=text)


class _Stoppable:
    """A module that looks whether the run shall end before each forward."""

    def __init__(self, module: Module, stop: StopRequest) -> None:
        self._module, self._stop = module, stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._stop.check()
        return self._module(*args, **kwargs)
