"""Bundled parallel strategies."""
