"""A nano-vllm run in TensorBoard."""
