"""`nanovllm.training.evaluation` of the user's guide."""

from nanovllm_core.guide.loop import Metrics, evaluate_model

__all__ = ["Metrics", "evaluate_model"]
