"""Other libraries on our losses, each by one call; none of them is needed to import fastdiv."""
