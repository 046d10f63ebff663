"""Models: one native decoder-only transformer, of a preset size with random weights, or pretrained."""
