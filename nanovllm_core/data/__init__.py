"""The data path: sources -> documents -> token store -> chunks -> packed sequences -> batches.

Each module knows the ones before it and none after; none knows plugins: the plan hands in two callables that do.
"""
