"""The public losses of logits: each function checks its arguments and makes a ``Spec``."""
