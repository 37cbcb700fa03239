"""Memory that the fused head needs for its tiles and for the gradient of its weight."""

from dataclasses import dataclass

import torch

from dft.loss.tiles import gradients_in_half, group_limit, tile_limit


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a fused head and of the supervised tokens of a micro-batch.

    Attributes:
        tokens: number of supervised tokens.
        vocab, width: shape of the head's weight.
        dtype: dtype of the products.
        weight_dtype: dtype of the weight, and of its gradient.
        trains_weight: whether the gradient of the weight is computed.
        device: device type.
    """

    tokens: int
    vocab: int
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    trains_weight: bool
    device: str


def peak_head_bytes(shape: HeadShape) -> int:
    """Return the peak of logits, their gradients and the sum of the weight's gradient, in bytes.

    Follows `dft.loss.tiles.run_tiles`. Hidden states, statistics, and the blocks of constant size that are
    processed at a time are not included.
    """
    wide = torch.promote_types(shape.dtype, torch.float32)
    in_half = gradients_in_half(shape.dtype, shape.device)
    tile_rows = _rows(shape.tokens, tile_limit(shape.dtype, shape.device) // (shape.vocab * wide.itemsize))
    tile = tile_rows * shape.vocab * wide.itemsize
    group_rows, stored = tile_rows, 0
    if in_half:
        row_bytes = shape.vocab * shape.dtype.itemsize
        tiles_per_group = max(1, group_limit(shape.device) // (row_bytes * max(1, tile_rows)))
        group_rows = min(shape.tokens, tiles_per_group * tile_rows)
        stored = group_rows * row_bytes
    if not shape.trains_weight:
        return tile + stored
    entries = shape.vocab * shape.width
    has_one_group = group_rows >= shape.tokens
    stays_half = has_one_group and in_half and shape.dtype == shape.weight_dtype == torch.bfloat16
    total = entries * (shape.weight_dtype if stays_half else wide).itemsize
    converted = 0 if stays_half or shape.weight_dtype == wide else entries * shape.weight_dtype.itemsize
    if shape.device == "cpu":  # the tile is kept for the next one; each group's bfloat16 part is added
        part = entries * shape.dtype.itemsize if in_half and not stays_half else 0
        return max(tile + stored + total + part, total + converted)
    while_scoring = tile + stored + (0 if has_one_group else total)
    while_adding = (stored if in_half else tile) + total
    return max(while_scoring, while_adding, total + converted)


def _rows(tokens: int, limit: int) -> int:
    """Return the rows of the longest tile of at most `limit` rows, all of about equal size."""
    limit = max(1, limit)
    return -(-tokens // max(1, -(-tokens // limit)))
