"""Token-weighted metrics: summed on the device, reduced over the ranks only when they are logged."""

import torch
from accelerate import Accelerator
from torch import Tensor

from dft.loss.dft import TokenStats

METRICS = ("loss", "nll", "avg_p_correct", "acc", "objective")
"""What training logs as such, and evaluation with the prefix `eval_`."""
LOWER_IS_BETTER = ("loss", "nll", "objective")


class TokenMeter:
    """Sums over supervised tokens since the last reset.

    Float64: a window may hold billions of tokens, and a float32 sum stops growing at 2**24 of them.
    """

    def __init__(self, device: torch.device) -> None:
        # supervised tokens, all tokens, then the sums of w * nll, nll, p and hits
        self.sums = torch.zeros(6, dtype=torch.float64, device=device)

    def update(self, stats: TokenStats, tokens: Tensor) -> None:
        """Adds one batch. `tokens` counts those of it that are not padding, a scalar on the device."""
        nll, p_correct = stats.nll.double(), stats.p_correct.double()
        self.sums += torch.stack(
            [
                nll.new_full((), nll.numel()),
                tokens.double(),
                (stats.weight.double() * nll).sum(),
                nll.sum(),
                p_correct.sum(),
                stats.correct.sum(dtype=torch.float64),
            ]
        )

    def reduce(self, accelerator: Accelerator, alpha: float) -> tuple[dict[str, float], int]:
        """Means over the tokens of all ranks, and how many tokens the ranks read. Starts anew. A collective.

        Without a supervised token there is nothing to average, and the means are left out.
        """
        supervised, tokens, weighted, nll, p_correct, hits = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        if not supervised:
            return {}, int(tokens)
        means = {"loss": weighted, "nll": nll, "avg_p_correct": p_correct, "acc": hits}
        means = {name: total / supervised for name, total in means.items()}
        means["objective"] = alpha * (1 - means["avg_p_correct"]) + (1 - alpha) * means["nll"]
        return means, int(tokens)
