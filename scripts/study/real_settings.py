"""The methods and sizes of the study on a pretrained model."""

from dataclasses import dataclass

METHODS: dict[str, tuple[object, ...]] = {
    "SFT": ("--dft_alpha", 0),
    "DFT": (),
    "alpha 0.5": ("--dft_alpha", 0.5),
    "power": ("--objective", "power"),
    "eaft": ("--objective", "eaft"),
}
"""The flags of the methods: DFT, and the four that are best in the mean of docs/objectives_study.md."""
MAX_NEW_TOKENS = 48
"""Limit of the length of an answer to a problem. Right answers take up to 25 tokens."""


@dataclass(frozen=True)
class Size:
    """The size of a study.

    Attributes:
        rows: conversations in each data set to fine-tune on, by group of data sets.
        seeds: number of seeds, each with its own data and order.
        rates: learning rates to select from, by group of data sets.
        scored: sequences of GSM8K, and of the plain answers, to score.
    """

    rows: dict[str, int]
    seeds: int
    rates: dict[str, tuple[float, ...]]
    scored: int


RATES = {"half known": (3e-6, 1e-5, 3e-5, 1e-4), "new": (1e-4, 3e-4, 1e-3)}
SIZES = {
    "quick": Size({"half known": 16, "new": 16}, 2, dict.fromkeys(RATES, (1e-4,)), 4),
    "small": Size({"half known": 256, "new": 640}, 3, RATES, 50),
    "full": Size({"half known": 1_600, "new": 4_800}, 5, RATES, 400),
}
