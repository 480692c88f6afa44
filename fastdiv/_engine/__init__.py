"""The way of all losses from checked arguments to the op; the one door to torch's privates."""
