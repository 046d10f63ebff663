"""The conformance kit: a contract class for each kind of plugin, for the tests of whoever writes one.

    from nanovllm_core.testing import ReaderContract

    class TestMarkdown(ReaderContract):
        component = Markdown()
        files = {"a.md": b"# Hi"}
        records = {"a.md": ["# Hi"]}

pytest collects the subclass; `failures(TestMarkdown)` runs it without pytest. The bundled components are tested by the
same classes. A contract asks what the core relies on and no more: a component that passes works in a run, but whether
it is fast, or reads its format well, only its own tests can say. The classes import torch when they use it, not before.
"""

from nanovllm_core.testing.callbacks import CallbackContract
from nanovllm_core.testing.extractors import ExtractorContract
from nanovllm_core.testing.kernels import KernelContract
from nanovllm_core.testing.models import ModelContract
from nanovllm_core.testing.outcome import failures
from nanovllm_core.testing.parallel import ParallelContract
from nanovllm_core.testing.readers import ReaderContract
from nanovllm_core.testing.tokenizers import TokenizerContract

__all__ = [
    "CallbackContract", "ExtractorContract", "KernelContract", "ModelContract", "ParallelContract", "ReaderContract",
    "TokenizerContract", "failures",
]  # fmt: skip
