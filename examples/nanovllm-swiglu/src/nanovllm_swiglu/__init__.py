"""A SwiGLU kernel for nano-vllm that keeps one activation where the reference keeps two."""
