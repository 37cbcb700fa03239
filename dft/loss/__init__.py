"""Tensors in, tensors out: the DFT loss. Knows no data, no trainer, no files."""
