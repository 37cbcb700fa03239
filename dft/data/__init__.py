"""Data pipeline from files to batches of token ids and labels. Independent of models and trainers."""
