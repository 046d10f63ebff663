"""Bundled readers (txt, json, jsonl) and the extractor that finds the text in their records (fields)."""
