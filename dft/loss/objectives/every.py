"""The weights that several objectives would give to the same tokens."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dft.loss.objectives.base import Objective, TokenRows
from dft.loss.objectives.functions_of_p import Dft, Sft


@dataclass(frozen=True, eq=False)
class EveryWeight(Objective):
    """Records the weights of several objectives while tokens are scored as with SFT.

    Objectives that compare with an earlier model get the scores of the current one as those of the earlier
    one, as at the first step of training.

    Attributes:
        objectives: the objectives to evaluate.
        recorded: (tokens, objectives) of each group of tokens since the last `take`.
    """

    name: ClassVar[str] = "every"
    needs_collision: ClassVar[bool] = True
    objectives: tuple[Objective, ...] = ()
    recorded: list[Tensor] = field(default_factory=list)

    @property
    def largest(self) -> int:  # type: ignore[override]  # depends on the objectives
        """The largest number of logits that any of the objectives uses."""
        return max((objective.largest for objective in self.objectives), default=0)

    def weight(self, rows: TokenRows) -> Tensor:
        weights = []
        for objective in self.objectives:
            top = None if rows.top_logits is None else rows.top_logits[:, : objective.largest]
            weights.append(objective.weight(rows._replace(base_logp=-rows.nll, top_logits=top)))
        self.recorded.append(torch.stack(weights, 1))
        return torch.ones_like(rows.nll)

    def take(self) -> Tensor:
        """Return the recorded weights, (tokens, objectives), in the order of scoring, and forget them."""
        weights = torch.cat(self.recorded) if self.recorded else torch.zeros(0, len(self.objectives))
        self.recorded.clear()
        return weights

    def formula(self) -> str:
        return "1"


def first_step_equivalent(objective: Objective) -> Objective:
    """Return an objective without an earlier model that has the same gradient while the model is untouched.

    There p / base_p is 1, and KL(model, base) is 0 and has no gradient.
    """
    if objective.needs_base_logp:
        return Sft()
    if objective.kl_weight:
        assert isinstance(objective, Dft)
        return Dft(objective.alpha)
    return objective
