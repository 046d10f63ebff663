"""Models."""

from __future__ import annotations

from nanovllm_core.contracts import Accept
from nanovllm_core.hookspecs import Models
from nanovllm_core.testing.contract import Contract


class ModelContract(Contract):
    """A causal language model.

    vocab_size: ids of the tokenizer that it is tried with
    """

    kind = "models"
    vocab_size: int = 97

    def test_probe_accepts(self) -> None:
        answer = self.verdict("this component", self.bound(Models).probe)
        self.check(isinstance(answer, Accept), f"probe answered {answer}", "a model that is ready accepts")
