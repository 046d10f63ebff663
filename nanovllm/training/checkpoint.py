"""`nanovllm.training.checkpoint` of the user's guide."""

from nanovllm_core.guide.checkpoints import CheckpointManager

__all__ = ["CheckpointManager"]
