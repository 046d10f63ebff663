"""Bundled callbacks, found by entry point like any other."""
