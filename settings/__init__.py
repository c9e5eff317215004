"""What settings are made of: the range of each value, and the files that they are read from."""
