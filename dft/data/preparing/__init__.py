"""Merge, split, encode, pack and cache the training data."""
