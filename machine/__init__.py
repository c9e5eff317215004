"""Device, precision, processes, memory, compilation."""
