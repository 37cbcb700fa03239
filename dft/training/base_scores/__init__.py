"""Scores of the data by the model before training: computed once, cached, and given to each batch."""
