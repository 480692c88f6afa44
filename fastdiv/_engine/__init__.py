"""From checked arguments to the op: checks, autograd, ops, and private names of torch."""
