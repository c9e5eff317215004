"""The mathematics that recipes share, as small pure functions."""
