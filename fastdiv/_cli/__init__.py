"""The commands of ``python -m fastdiv``, and how they print."""
