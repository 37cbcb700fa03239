"""Sequence parallelism, rank supervision and stop signals."""
