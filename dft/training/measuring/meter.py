"""Token-weighted metrics: summed on the device, reduced over the ranks only when they are logged."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dft.errors import UserError
from dft.loss.dft import TokenStats
from dft.loss.objectives import Objective, floored_potential
from dft.metrics import BINS
from dft.training.batching import attended_pairs, token_count

SUMS = (
    "supervised", "tokens", "positions", "pairs", "weighted_nll", "nll", "p_correct", "correct", "entropy",
    "weight", "end_of_turn", "p_end_of_turn", "aux_loss", "not_numbers", "potential", "kl",
)  # fmt: skip
"""What is counted: supervised tokens, tokens that are not padding, tokens with padding, pairs of tokens of
which one attends to the other; then sums over supervised tokens, and those whose p is not a number. The
potential is what the objective descends."""
OF_FILES = ("supervised", "nll", "p_correct")
"""What is summed for each file."""


class TokenMeter:
    """Sums over supervised tokens since the last reset.

    Float64: a window may hold billions of tokens, and a float32 sum stops growing at 2**24 of them.

    Args:
        device: where batches are.
        end_of_turn_ids: tokens that end a turn.
        objective: what is descended.
        end_of_turn_weight: the least that a token which ends a turn weighs.
        files: how many files are summed for each by itself; 0 for none.
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
        self.sums = torch.zeros(len(SUMS) + BINS, dtype=torch.float64, device=device)
        self.of_files = torch.zeros(files, len(OF_FILES), dtype=torch.float64, device=device)
        self.has_auxiliary = False
        self.end_of_turn_ids = torch.tensor(end_of_turn_ids, dtype=torch.int64, device=device)
        self._edges = torch.arange(1, BINS, dtype=torch.float64, device=device) / BINS
        self._files = torch.arange(files, device=device)

    def update(
        self,
        stats: TokenStats,
        inputs: Mapping[str, Tensor | int],
        aux_loss: Tensor | None = None,
        files: Tensor | None = None,
        objective: Objective | None = None,
    ) -> None:
        """Adds one batch, without waiting for the device.

        Args:
            inputs: the batch.
            aux_loss: of the router of a mixture of experts, a scalar.
            files: (supervised tokens,) the number of the file that each is from.
            objective: as it is in this step, where it changes.
        """
        objective = objective or self.objective
        nll, p_correct, weight = stats.nll.double(), stats.p_correct.double(), stats.weight.double()
        count = nll.numel()
        ends = torch.isin(stats.target, self.end_of_turn_ids)
        self.has_auxiliary |= aux_loss is not None
        counted = {
            "supervised": nll.new_full((), count),
            "tokens": token_count(inputs).double(),
            "positions": nll.new_full((), inputs["labels"].numel()),
            "pairs": attended_pairs(inputs).double(),
            "weighted_nll": (weight * nll).sum(),
            "nll": nll.sum(),
            "p_correct": p_correct.sum(),
            "correct": stats.correct.sum(dtype=torch.float64),
            "entropy": stats.entropy.sum(dtype=torch.float64),
            "weight": weight.sum(),
            "end_of_turn": ends.sum(dtype=torch.float64),
            "p_end_of_turn": (p_correct * ends).sum(),
            "aux_loss": nll.new_zeros(()) if aux_loss is None else aux_loss.detach().double() * count,
            "not_numbers": p_correct.isnan().sum(dtype=torch.float64),
            "potential": self._potential(objective, nll, ends),
            "kl": stats.kl.sum(dtype=torch.float64),
        }
        # Neither bincount nor histc: on a GPU the one waits for the device, and neither is deterministic.
        above = (p_correct[:, None] >= self._edges).sum(0, dtype=torch.float64)  # (BINS - 1,)
        everywhere = torch.cat([(counted["supervised"] - counted["not_numbers"])[None], above])
        histogram = everywhere - torch.cat([above, above.new_zeros(1)])
        self.sums += torch.cat([torch.stack([counted[name] for name in SUMS]), histogram])
        if len(self._files) and files is not None:
            member = (files == self._files[:, None]).double()  # (files, supervised tokens)
            self.of_files += member @ torch.stack([torch.ones_like(nll), nll, p_correct], dim=1)

    def _potential(self, objective: Objective, nll: Tensor, ends: Tensor) -> Tensor:
        """What an objective descends, summed over the tokens; NaN where it is no function of p."""
        found = objective.potential(nll)
        if found is None:
            return nll.new_full((), torch.nan)
        if self.end_of_turn_weight:
            found = torch.where(ends, floored_potential(objective, nll, self.end_of_turn_weight), found)
        return found.sum()

    def reset(self) -> None:
        self.sums.zero_()
        self.of_files.zero_()
        self.has_auxiliary = False

    def rows(self, accelerator: Accelerator) -> list[list[float]]:
        """The sums of all ranks, a row for each, so that a resumed window is whole. A collective."""
        auxiliary = self.sums.new_full((1,), self.has_auxiliary)
        return accelerator.gather(torch.cat([self.sums, auxiliary])[None]).tolist()

    def load_rows(self, rows: list[list[float]], accelerator: Accelerator) -> None:
        """Goes on from the row of this rank, and its share of those of ranks that are gone."""
        saved = torch.tensor(rows, dtype=torch.float64)  # (ranks, sums and one)
        if saved.shape[1:] != (len(self.sums) + 1,):
            raise UserError("--resume_from_checkpoint: the checkpoint is of another version of this trainer")
        rank, ranks = accelerator.process_index, accelerator.num_processes
        mine = saved[rank::ranks].sum(dim=0).to(self.sums.device)
        self.sums += mine[:-1]
        self.has_auxiliary = bool(saved[:, -1].any())

    def reduce(self, accelerator: Accelerator) -> "ReducedMetrics":
        """Means over the tokens of all ranks. Starts anew. A collective."""
        sums = accelerator.reduce(torch.cat([self.sums, self.of_files.flatten()]), "sum").tolist()
        has_auxiliary = self.has_auxiliary
        self.reset()
        named = dict(zip(SUMS, sums, strict=False))
        histogram = [round(count) for count in sums[len(SUMS) : len(SUMS) + BINS]]
        width = len(OF_FILES)
        rest = sums[len(SUMS) + BINS :]
        of_files = [rest[start : start + width] for start in range(0, len(rest), width)]
        means = means_of(named, self.objective, has_auxiliary)
        return ReducedMetrics(named, histogram, [file_means(one) for one in of_files], means)


@dataclass(frozen=True)
class ReducedMetrics:
    """What the sums of all ranks come to.

    Attributes:
        counts: of `SUMS`.
        histogram: (BINS,) supervised tokens by p.
        files: for each file its `nll` and `avg_p_correct`, nothing where it has no supervised token.
        means: the metrics. Without a supervised token there is nothing to average, and there are none.
    """

    counts: dict[str, float]
    histogram: list[int]
    files: list[dict[str, float]]
    means: dict[str, float]


def means_of(counts: Mapping[str, float], objective: Objective, has_auxiliary: bool) -> dict[str, float]:
    """The metrics, from sums over supervised tokens."""
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
    supervised, nll, p_correct = sums
    return {"nll": nll / supervised, "avg_p_correct": p_correct / supervised} if supervised else {}


def prefix_with_file_names(files: list[str], means: list[dict[str, float]]) -> dict[str, Any]:
    """`<file>/<metric>`, with as little of each path as tells the files apart."""
    return {
        f"{name}/{metric}": value
        for name, values in zip(short_names(files), means, strict=True)
        for metric, value in values.items()
    }


def short_names(paths: list[str]) -> list[str]:
    """The ends of paths, as long as it takes for each to be the only one with its end."""
    parts = {path: tuple(path.strip("/").split("/")) for path in paths}
    ends = Counter(words[start:] for words in parts.values() for start in range(len(words)))
    names = []
    for words in (parts[path] for path in paths):
        alone = (words[start:] for start in reversed(range(len(words))) if ends[words[start:]] == 1)
        names.append("/".join(next(alone, words)))
    return names
