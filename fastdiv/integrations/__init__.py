"""Patches that let other libraries run on fastdiv; none of them is needed to import fastdiv."""
