"""What `nanovllm generate` does: prompts of the command line, or many from a file."""
