"""A gated convolutional language model for nano-vllm: no attention, no positions."""
