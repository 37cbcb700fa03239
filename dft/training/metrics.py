"""Token-weighted metrics: summed on the device, reduced over the ranks only when they are logged."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dft.loss.dft import TokenStats

METRICS = ("loss", "nll", "avg_p_correct", "acc", "objective")
"""What training logs as such, and evaluation with the prefix `eval_`."""
METER = "token_meter.json"
"""In a checkpoint: the sums since the last line of the log, a row for each rank."""
LOWER_IS_BETTER = ("loss", "nll", "objective")


class TokenMeter:
    """Sums over supervised tokens since the last reset.

    Float64: a window may hold billions of tokens, and a float32 sum stops growing at 2**24 of them.
    """

    def __init__(self, device: torch.device) -> None:
        # supervised tokens, all tokens, then the sums of w * nll, nll, p, hits and the auxiliary loss
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.has_auxiliary = False

    def update(self, stats: TokenStats, tokens: Tensor, aux_loss: Tensor | None = None) -> None:
        """Adds one batch.

        Args:
            tokens: how many of it are not padding, a scalar on the device.
            aux_loss: of the router of a mixture of experts, a scalar.
        """
        nll, p_correct = stats.nll.double(), stats.p_correct.double()
        self.has_auxiliary |= aux_loss is not None
        auxiliary = nll.new_zeros(()) if aux_loss is None else aux_loss.detach().double() * nll.numel()
        self.sums += torch.stack(
            [
                nll.new_full((), nll.numel()),
                tokens.double(),
                (stats.weight.double() * nll).sum(),
                nll.sum(),
                p_correct.sum(),
                stats.correct.sum(dtype=torch.float64),
                auxiliary,
            ]
        )

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Writes the sums of all ranks into a checkpoint, so that a resumed window is whole. A collective."""
        rows = accelerator.gather(self.sums[None]).tolist()  # (ranks, 6)
        if accelerator.is_main_process:
            (folder / METER).write_text(json.dumps(rows))

    def load(self, folder: str | None, accelerator: Accelerator) -> None:
        """Takes up the sums of this rank from a checkpoint, and its share of those of ranks that are gone."""
        if folder is None or not (Path(folder) / METER).is_file():
            return
        rows = torch.tensor(json.loads((Path(folder) / METER).read_text()), dtype=torch.float64)
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self.sums += rows[rank::ranks].sum(dim=0).to(self.sums.device)

    def reduce(self, accelerator: Accelerator, alpha: float) -> tuple[dict[str, float], int]:
        """Means over the tokens of all ranks, and how many tokens the ranks read. Starts anew. A collective.

        Without a supervised token there is nothing to average, and the means are left out.
        """
        sums = accelerator.reduce(self.sums, "sum").tolist()
        supervised, tokens, weighted, nll, p_correct, hits, auxiliary = sums
        self.sums.zero_()
        if not supervised:
            return {}, int(tokens)
        means = {"loss": weighted, "nll": nll, "avg_p_correct": p_correct, "acc": hits}
        if self.has_auxiliary:
            means["aux_loss"] = auxiliary
        means = {name: total / supervised for name, total in means.items()}
        means["objective"] = alpha * (1 - means["avg_p_correct"]) + (1 - alpha) * means["nll"]
        return means, int(tokens)
