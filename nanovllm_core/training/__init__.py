"""The training step and what surrounds it: optimizer, schedule, evaluation, checkpoints, export."""
