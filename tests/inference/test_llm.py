"""What `LLM` says of arguments that it does not take: before it opens anything."""

import pytest

from nanovllm_core import LLM
from nanovllm_core.errors import GenerationError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": 3}, "LLM: path: got 3, allowed: a folder, or a name on the hub"),
        ({"dtype": "float16"}, "LLM: dtype: got 'float16', allowed: auto, float32, bfloat16"),
        ({"batch_size": 0}, "LLM: batch_size: got 0, allowed: None, or 1 and more"),
        ({"batch_size": True}, "LLM: batch_size: got True, allowed: None, or 1 and more"),
        ({"kv_cache_tokens": "9"}, "LLM: kv_cache_tokens: got '9', allowed: None, or 1 and more"),
        ({"prompt_lookup": -1}, "LLM: prompt_lookup: got -1, allowed: None, or 0 and more"),
        ({"max_model_len": 1.5}, "LLM: max_model_len: got 1.5, allowed: None, or 1 and more"),
        ({"tensor_parallel_size": None}, "LLM: tensor_parallel_size: got None, allowed: 1 and more"),
        ({"gpu_memory_utilization": 1.5}, "LLM: gpu_memory_utilization: got 1.5, allowed: above 0 and at most 1"),
        ({"enforce_eager": "no"}, "LLM: enforce_eager: got 'no', allowed: True or False"),
    ],
    ids=str,
)
def test_arguments(given, said):
    with pytest.raises(GenerationError) as told:
        LLM(**{"path": "there/is/none", **given})
    assert str(told.value) == said
