"""The losses of a linear layer's logits, of which a tile is held at a time."""
