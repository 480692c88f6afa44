"""Other libraries' training on fastdiv's losses, by one line each; imported where it is used."""
