"""Other libraries on our losses, each by one line; none is needed to import fastdiv."""
