"""Attention over batches without padding: kernels, an operator and the interface of transformers."""
