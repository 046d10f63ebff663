"""A tokenizer without a vocabulary for nano-vllm: one id a byte."""
