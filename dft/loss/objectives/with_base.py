"""Objectives that compare the model with a base model."""

from dataclasses import dataclass
from typing import ClassVar

from dft.loss.objectives.base import check_range
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
