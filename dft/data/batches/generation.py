"""Batches of prompts to generate from, and the ends of what is generated."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def pad_left(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return prompts as a batch in which all of them end at the last position.

    Args:
        prompts: token ids of each prompt.
        pad_token_id: id to pad with.
        device: device of the tensors.

    Returns:
        input_ids and attention_mask, (prompts, longest prompt) int64.
    """
    width = max(map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def split_at_stop(token_ids: Sequence[int], stop_ids: Collection[int]) -> tuple[list[int], bool]:
    """Return the generated tokens before the first stop token, and whether there is a stop token."""
    end = next((index for index, token_id in enumerate(token_ids) if token_id in stop_ids), None)
    return list(token_ids[:end]), end is not None
