"""Markdown and CSV documents for nano-vllm."""
