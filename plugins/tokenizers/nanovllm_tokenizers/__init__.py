"""Bundled tokenizers: an existing one (hf), or one made from the documents (bpe)."""
