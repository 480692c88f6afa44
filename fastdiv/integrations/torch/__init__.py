"""Torch's own cross entropy on fastdiv's kernels: :func:`fastdiv.patch_torch`."""
