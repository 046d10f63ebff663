"""`nanovllm.training.memory` of the user's guide."""

from nanovllm_core.estimate_model import estimate_training_memory
from nanovllm_core.guide.memory import MemoryManager

__all__ = ["MemoryManager", "estimate_training_memory"]
