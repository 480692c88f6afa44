"""What all losses share: checks, autograd, ops, and the private names of torch."""
