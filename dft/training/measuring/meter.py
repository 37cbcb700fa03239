"""Token-weighted training metrics, summed on the device and reduced over the ranks only when logged."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dft.errors import UserError
from dft.loss.dft import TokenStats, times
from dft.loss.objectives import Objective, floored_potential
from dft.metrics import BINS
from dft.training.batching import attended_pairs, token_count
from dft.training.measuring.accumulator import Accumulator

SUMS = (
    "supervised", "tokens", "positions", "pairs", "weighted_nll", "nll", "p_correct", "correct", "entropy",
    "weight", "end_of_turn", "p_end_of_turn", "aux_loss", "not_numbers", "potential", "kl",
)  # fmt: skip
"""Names of the sums of a logging window.

`tokens` excludes padding and `positions` includes it; `pairs` counts the pairs of tokens of which one attends
to the other. `not_numbers` counts supervised tokens whose p is NaN. `potential` is the function that the
gradient of the objective descends. All others are sums over the supervised tokens. Weights of the data are
part of `weighted_nll`, `weight` and `potential` only.
"""
FILE_SUMS = ("supervised", "nll", "p_correct")
"""Names of the sums that are kept for each data file."""


class TokenMeter:
    """Sums over the supervised tokens since the last reset.

    Args:
        device: device of the batches.
        end_of_turn_ids: token ids that end a turn.
        objective: training objective.
        end_of_turn_weight: minimum weight of a token that ends a turn.
        files: number of data files to keep separate sums for; 0 for none.
    """

    def __init__(
        self,
        device: torch.device,
        end_of_turn_ids: list[int],
        objective: Objective,
        end_of_turn_weight: float = 0.0,
        files: int = 0,
    ) -> None:
        self.objective = objective
        self.end_of_turn_weight = end_of_turn_weight
        self._sums = Accumulator(len(SUMS) + BINS, device)
        self._file_sums = Accumulator(files * len(FILE_SUMS), device)
        self.has_auxiliary = False
        self.end_of_turn_ids = torch.tensor(end_of_turn_ids, dtype=torch.int64, device=device)
        self._edges = torch.arange(1, BINS, dtype=self._sums.dtype, device=device) / BINS
        self._files = torch.arange(files, device=device)

    @property
    def sums(self) -> Tensor:
        """State of the sums, to be copied before an optimizer step and copied back if it is discarded."""
        return self._sums.state

    def update(
        self,
        stats: TokenStats,
        inputs: Mapping[str, Any],
        aux_loss: Tensor | None = None,
        files: Tensor | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Add one batch without synchronizing with the device.

        Args:
            stats: statistics of its supervised tokens.
            inputs: the batch.
            aux_loss: router loss of a mixture of experts, a scalar.
            files: (supervised tokens,) number of the data file of each token.
            objective: objective of this optimizer step, if it changes during training.
        """
        objective = objective or self.objective
        dtype = self._sums.dtype
        nll, p_correct, weight = stats.nll.to(dtype), stats.p_correct.to(dtype), stats.weight.to(dtype)
        count = nll.numel()
        ends = torch.isin(stats.target, self.end_of_turn_ids)
        self.has_auxiliary |= aux_loss is not None
        terms = {
            "supervised": nll.new_full((), count),
            "tokens": token_count(inputs).to(dtype),
            "positions": nll.new_full((), inputs["labels"].numel()),
            "pairs": attended_pairs(inputs).to(dtype),
            "weighted_nll": (weight * nll).sum(),
            "nll": nll.sum(),
            "p_correct": p_correct.sum(),
            "correct": stats.correct.sum(dtype=dtype),
            "entropy": stats.entropy.sum(dtype=dtype),
            "weight": weight.sum(),
            "end_of_turn": ends.sum(dtype=dtype),
            "p_end_of_turn": masked_sum(p_correct, ends),
            "aux_loss": nll.new_zeros(()) if aux_loss is None else aux_loss.detach().to(dtype) * count,
            "not_numbers": p_correct.isnan().sum(dtype=dtype),
            "potential": self._potential(objective, nll, ends, stats.loss_weight),
            "kl": stats.kl.sum(dtype=dtype),
        }
        if stats.loss_weight is not None and objective.kl_weight:
            # `means_of` adds the KL part of the loss as for tokens of weight 1.
            change = objective.kl_weight * ((stats.loss_weight - 1) * stats.kl.to(dtype)).sum()
            terms["weighted_nll"], terms["potential"] = (
                terms[name] + change for name in ("weighted_nll", "potential")
            )
        # Not bincount, which synchronizes with the GPU, nor histc: neither is deterministic there.
        above = (p_correct[:, None] >= self._edges).sum(0, dtype=dtype)  # (BINS - 1,)
        everywhere = torch.cat([(terms["supervised"] - terms["not_numbers"])[None], above])
        histogram = everywhere - torch.cat([above, above.new_zeros(1)])
        self._sums.add(torch.cat([torch.stack([terms[name] for name in SUMS]), histogram]))
        if len(self._files) and files is not None:
            members = files == self._files[:, None]  # (files, supervised tokens)
            columns = [members.sum(1, dtype=dtype), masked_sum(nll, members), masked_sum(p_correct, members)]
            self._file_sums.add(torch.stack(columns, dim=1).flatten())

    def _potential(
        self, objective: Objective, nll: Tensor, ends: Tensor, loss_weight: Tensor | None
    ) -> Tensor:
        """Return the summed potential of an objective; NaN if its weight is not a function of p."""
        potential = objective.potential(nll)
        if potential is None:
            return nll.new_full((), torch.nan)
        if self.end_of_turn_weight:
            floored = floored_potential(objective, nll, self.end_of_turn_weight)
            potential = torch.where(ends, floored, potential)
        return times(potential, loss_weight).sum()

    def reset(self) -> None:
        """Start a new window."""
        self._sums.reset()
        self._file_sums.reset()
        self.has_auxiliary = False

    def rows(self, accelerator: Accelerator) -> list[list[float]]:
        """Return the sums of every rank, one row per rank, for a checkpoint. This is a collective."""
        total = self._sums.total()
        auxiliary = total.new_full((1,), self.has_auxiliary)
        return accelerator.gather(torch.cat([total, auxiliary])[None]).tolist()

    def load_rows(self, rows: list[list[float]], accelerator: Accelerator) -> None:
        """Add the saved sums of this rank, and its share of the sums of ranks that no longer exist.

        Args:
            rows: the return value of `rows`, possibly with a different number of ranks.
            accelerator: the resumed run's accelerator.

        Raises:
            UserError: the rows differ in length from those of this version.
        """
        saved = torch.tensor(rows, dtype=torch.float64)  # (ranks, sums + 1)
        if saved.shape[1:] != (len(SUMS) + BINS + 1,):
            raise UserError(
                "--resume_from_checkpoint: the checkpoint was written by another version of this trainer; "
                "resume with that version, or start a new run in another --output_dir"
            )
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self._sums.add_total(saved[rank::ranks].sum(dim=0)[:-1])
        self.has_auxiliary = bool(saved[:, -1].any())

    def reduce(self, accelerator: Accelerator) -> "ReducedMetrics":
        """Return the means over the tokens of all ranks and start a new window. This is a collective."""
        total = torch.cat([self._sums.total(), self._file_sums.total()])
        sums = accelerator.reduce(total, "sum").tolist()
        has_auxiliary = self.has_auxiliary
        self.reset()
        counts = dict(zip(SUMS, sums, strict=False))
        histogram = [round(count) for count in sums[len(SUMS) : len(SUMS) + BINS]]
        file_sums = sums[len(SUMS) + BINS :]
        width = len(FILE_SUMS)
        per_file = [file_sums[start : start + width] for start in range(0, len(file_sums), width)]
        means = means_of(counts, self.objective, has_auxiliary)
        return ReducedMetrics(counts, histogram, [file_means(row) for row in per_file], means)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum the values that a mask selects.

    Multiplying by the mask would turn one NaN or infinity anywhere into a NaN in every sum.

    Args:
        values: (tokens,).
        mask: (..., tokens) bool.

    Returns:
        (...,) sums.
    """
    return torch.where(mask, values, 0.0).sum(-1)


@dataclass(frozen=True)
class ReducedMetrics:
    """Metrics of a window over all ranks.

    Attributes:
        counts: sums by the names in `SUMS`.
        histogram: (BINS,) numbers of supervised tokens by p.
        files: `nll` and `avg_p_correct` of each data file; empty for a file without supervised tokens.
        means: metrics by name; empty for a window without supervised tokens.
    """

    counts: dict[str, float]
    histogram: list[int]
    files: list[dict[str, float]]
    means: dict[str, float]


def means_of(counts: Mapping[str, float], objective: Objective, has_auxiliary: bool) -> dict[str, float]:
    """Return the metrics that follow from sums over the supervised tokens."""
    supervised = counts["supervised"]
    if not supervised:
        return {}
    p, nll = counts["p_correct"] / supervised, counts["nll"] / supervised
    anchor = objective.kl_weight * counts["kl"] / supervised
    means = {
        "loss": counts["weighted_nll"] / supervised + anchor,
        "nll": nll,
        "avg_p_correct": p,
        "acc": counts["correct"] / supervised,
        "objective": counts["potential"] / supervised + anchor,
        "entropy": counts["entropy"] / supervised,
        "effective_tokens": counts["weight"] / supervised,
    }
    if objective.potential(torch.zeros(1)) is None:
        del means["objective"]
    if objective.kl_weight:
        means["kl"] = counts["kl"] / supervised
    if counts["end_of_turn"]:
        means["p_end_of_turn"] = counts["p_end_of_turn"] / counts["end_of_turn"]
    if has_auxiliary:
        means["aux_loss"] = counts["aux_loss"] / supervised
    return means


def file_means(sums: list[float]) -> dict[str, float]:
    """Return the metrics of one data file from its `FILE_SUMS`."""
    supervised, nll, p_correct = sums
    return {"nll": nll / supervised, "avg_p_correct": p_correct / supervised} if supervised else {}


def prefix_with_file_names(files: list[str], means: list[dict[str, float]]) -> dict[str, Any]:
    """Return the metrics of all files as `<file>/<metric>`, with paths shortened to unique names."""
    return {
        f"{name}/{metric}": value
        for name, values in zip(short_names(files), means, strict=True)
        for metric, value in values.items()
    }


def short_names(paths: list[str]) -> list[str]:
    """Return for each path the shortest trailing part that no other path ends with."""
    parts = {path: tuple(path.strip("/").split("/")) for path in paths}
    endings = Counter(words[start:] for words in parts.values() for start in range(len(words)))
    names = []
    for words in (parts[path] for path in paths):
        unique = (words[start:] for start in reversed(range(len(words))) if endings[words[start:]] == 1)
        names.append("/".join(next(unique, words)))
    return names
