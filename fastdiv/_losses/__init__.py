"""What users call, of logits: a function for each loss, from its arguments to a ``Spec``."""
