"""Judging results: features of images, distances between sets of features, and an exact reader of the embedded shapes."""
