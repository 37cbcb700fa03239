"""Log-probabilities of the untrained model reach an objective's weight on every path of the loss."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dft import Objective, dft_loss, linear_dft_loss
from dft.loss import tiles
from dft.loss.kernels import score_rows as score_rows_triton
from dft.loss.rows import RowOptions, RowWeights, score_rows_torch
from tests.loss.test_objectives import VOCAB, batch


@dataclass(frozen=True)
class Ratio(Objective):
    """w = min(p / base p, 2)."""

    name: ClassVar[str] = "ratio"
    needs_base_logp: ClassVar[bool] = True

    def weight(self, rows):
        return torch.exp(-rows.nll - rows.base_logp).clamp(max=2.0)


def base_scores(labels):
    generator = torch.Generator().manual_seed(3)
    return -4 * torch.rand(labels.shape, generator=generator)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_weight_gets_the_score_of_its_own_token(monkeypatch, shifted):
    monkeypatch.setitem(tiles.TILE_BYTES, "cpu", 4 * VOCAB * 4)  # several tiles
    (hidden, weight, bias), _, labels, _, _ = batch(torch.float64)
    base = base_scores(labels)
    logits = hidden @ weight.t() + bias
    how = {"objective": Ratio(), "base_logp": base, "shifted": shifted}
    _, stats = dft_loss(logits, labels, **how)
    predicting, targets, scores = (
        (logits, labels, base) if shifted else (logits[:, :-1], labels[:, 1:], base[:, 1:])
    )
    keep = targets != -100
    nll = -torch.log_softmax(predicting[keep], -1).gather(1, targets[keep][:, None])[:, 0]
    expected = torch.exp(-nll - scores[keep]).clamp(max=2.0)
    torch.testing.assert_close(stats.weight, expected.detach())
    _, fused = linear_dft_loss(hidden, weight, labels, bias=bias, **how)
    torch.testing.assert_close(fused.weight, stats.weight)


def test_the_kernel_passes_the_scores_to_the_weight():
    generator = torch.Generator().manual_seed(0)
    tile, targets = torch.randn(6, VOCAB, generator=generator), torch.arange(6)
    weights = RowWeights(base_logp=-torch.rand(6, generator=generator))
    scale = torch.tensor(0.25)
    expected, gradient = score_rows_torch(tile.clone(), targets, scale, RowOptions(Ratio()), weights)
    stats, written = score_rows_triton(tile.clone(), targets, scale, RowOptions(Ratio()), weights=weights)
    torch.testing.assert_close(stats.weight, expected.weight)
    torch.testing.assert_close(written, gradient)


def test_missing_or_misaligned_scores_are_rejected():
    (hidden, weight, _), _, labels, _, _ = batch(torch.float64)
    with pytest.raises(ValueError, match="needs base_logp"):
        dft_loss(hidden @ weight.t(), labels, objective=Ratio())
    with pytest.raises(ValueError, match="needs base_logp"):
        linear_dft_loss(hidden, weight, labels, objective=Ratio())
    with pytest.raises(ValueError, match="base_logp must be"):
        linear_dft_loss(hidden, weight, labels, objective=Ratio(), base_logp=base_scores(labels)[:, 1:])
