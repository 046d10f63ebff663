"""Generation: what to draw (`sampling`), what to keep (`kv`), where text ends (`stopping`), the loop (`generate`)."""
