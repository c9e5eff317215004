"""Measurements of the project, each a program of its own; `python -m benchmarks` makes the table."""
