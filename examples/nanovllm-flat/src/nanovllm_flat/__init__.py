"""A parallel strategy of a stranger."""
