"""Losses of the logits of a linear layer, of which one tile is held at a time."""
