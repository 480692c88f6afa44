"""torch's own cross entropy on our kernels: :func:`fastdiv.patch_torch`."""
