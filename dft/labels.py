"""What data and loss must agree on without knowing each other."""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in torch.nn.CrossEntropyLoss."""


def loss_positions(labels: Tensor, shifted: bool = False) -> Tensor:
    """Where the next token is supervised: what a model says there is what the loss is about.

    Args:
        labels: (batch, seq), the label at t is predicted at t - 1; at t if they are shifted.

    Returns:
        (tokens,) int64, ascending, b * seq + t. On another device than the CPU this waits for it.
    """
    following = labels
    if not shifted:
        following = torch.full_like(labels, IGNORE_INDEX)
        following[:, :-1] = labels[:, 1:]
    return (following.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
