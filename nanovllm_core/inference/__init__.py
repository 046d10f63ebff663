"""The engine: sequences, pages of their keys and values, what each forward reads, draws, and callers that share it."""
