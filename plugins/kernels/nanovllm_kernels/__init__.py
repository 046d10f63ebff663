"""Kernels: implementations of the operations that models call (`nanovllm_core.contracts.Ops`)."""
