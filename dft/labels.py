"""Labels of tokens that are not supervised, and positions of those that are."""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not supervised, as in torch.nn.CrossEntropyLoss."""


def loss_positions(labels: Tensor, shifted: bool = False) -> Tensor:
    """Return the positions whose next token is supervised: their logits enter the loss.

    Args:
        labels: (batch, seq). The label at t is predicted at t - 1; if shifted, it is predicted at t.
        shifted: whether the labels are shifted.

    Returns:
        (tokens,) int64, ascending, b * seq + t. Synchronizes with devices other than the CPU.
    """
    targets = labels
    if not shifted:
        targets = torch.full_like(labels, IGNORE_INDEX)
        targets[:, :-1] = labels[:, 1:]
    return (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
