"""What data and loss must agree on without knowing each other."""

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in torch.nn.CrossEntropyLoss."""
