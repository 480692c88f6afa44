"""Other libraries' training on fastdiv's losses, by one line each; none is needed to import fastdiv."""
