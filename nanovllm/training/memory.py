"""`nanovllm.training.memory` of the user's guide."""

from nanovllm_core.estimate_model import estimate_training_memory

__all__ = ["estimate_training_memory"]
