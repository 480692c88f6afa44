"""The benchmark of the losses on this machine, run by ``python -m fastdiv bench``."""
