"""What `nanovllm generate` and `nanovllm chat` do: many prompts from a file, a conversation at a terminal."""
