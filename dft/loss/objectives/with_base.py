"""Objectives that compare the model with a base model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dft.loss.objectives.base import Objective, TokenRows, check_range
from dft.loss.objectives.functions_of_p import Dft


@dataclass(frozen=True)
class Asft(Dft):
    """Anchored Supervised Fine-Tuning (arXiv 2509.23753): DFT plus kl_weight * KL(model || base) per token.

    The divergence is over the whole vocabulary at each supervised token, in the direction given in the text
    of the paper; the code published by its authors computes KL(base || model) instead. Suited to domains
    where DFT drifts from the base model, such as knowledge-heavy ones. Needs a frozen copy of the base model
    in memory, and a forward pass of it per batch.
    """

    name: ClassVar[str] = "asft"
    kl_weight: float = 0.05  # type: ignore[misc]  # a parameter here, a constant of the others

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("kl_weight", self.kl_weight, 0, 1000)

    def formula(self) -> str:
        return f"{super().formula()}, and {self.kl_weight:g} * KL(model || base)"


def _ratio(rows: TokenRows) -> Tensor:
    """Return p / base_p, (tokens,)."""
    assert rows.base_logp is not None
    return torch.exp(-rows.nll - rows.base_logp.to(rows.nll.dtype))


@dataclass(frozen=True)
class IwSft(Objective):
    """Importance-weighted SFT (arXiv 2507.12856), per token: w = p / base_p, between 1 - clip and 1 + clip.

    Training on curated data is seen as reinforcement learning from a reference policy, here the base model:
    tokens that training has made more likely get a larger weight. This is the variant per token of the code
    of the authors, with their bound. Their runs on language models give all tokens of a sequence the
    exponential of its mean log-ratio instead, which is not a function of a single token.
    """

    name: ClassVar[str] = "iw_sft"
    needs_base_logp: ClassVar[bool] = True
    clip: float = 0.8

    def __post_init__(self) -> None:
        check_range("clip", self.clip, 0, 1)

    def weight(self, rows: TokenRows) -> Tensor:
        return _ratio(rows).clamp(1 - self.clip, 1 + self.clip)

    @property
    def least_weight(self) -> float:
        return 1 - self.clip

    def formula(self) -> str:
        return "p / base_p, raised to at least 1 - clip and lowered to at most 1 + clip"


@dataclass(frozen=True)
class Psft(Objective):
    """Proximal SFT (arXiv 2508.17784): maximizes min(p / base_p, 1 + clip).

    The weight is p / base_p up to 1 + clip and 0 above: a token is no longer trained once it is more likely
    than under the old policy by that factor. (The lower bound of PPO's clipping has no effect at a constant
    positive advantage.) The paper renews the old policy every few optimizer steps. Here it is the model that
    `base_logp` is from; with that before training, p can rise by the factor 1 + clip in the whole run. The
    default is the upper bound of the authors' script.
    """

    name: ClassVar[str] = "psft"
    needs_base_logp: ClassVar[bool] = True
    clip: float = 0.28

    def __post_init__(self) -> None:
        check_range("clip", self.clip, 0, 1)

    def weight(self, rows: TokenRows) -> Tensor:
        ratio = _ratio(rows)
        return ratio.masked_fill(ratio > 1 + self.clip, 0)

    def formula(self) -> str:
        return "p / base_p if that is at most 1 + clip, else 0"
