"""Draw the token weights of all objectives, docs/images/objectives.png.

    python scripts/make_objectives_figure.py

The weights are computed by the objectives themselves. A digest of the curves is stored in the picture; a test
uses it to detect a picture that is older than the objectives.
"""

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dft.loss.objectives import OBJECTIVES, Objective, TokenRows, make_objective
from dft.report.pages.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, styled
from dft.report.pages.images import write_png

PICTURE = ROOT / "docs" / "images" / "objectives.png"
DIGEST = "Curves"
"""Metadata key of the digest in the picture."""
VOCABULARY = 1000
"""Number of tokens of the distributions."""
BASE_P = 0.3
"""Probability of the target under the base model."""
POINTS = 400
COLORS = (BLUE, BLACK, GREEN, VERMILION, ORANGE, PURPLE, SKY, "#8a8a8a", "#8c564b")
DASHES = ("-", "--", "-.", ":", (0, (2, 4)))


class Curve(NamedTuple):
    """The weight of an objective against the probability of the target, (points,) each."""

    label: str
    p: Tensor
    weight: Tensor


def rows_at(p: Tensor, objective: Objective, spread: bool) -> TokenRows:
    """Return the statistics of tokens of probability p.

    Args:
        p: (points,) float64.
        spread: whether the other tokens share the rest of the probability, or one of them has all of it.
    """
    others = torch.zeros(len(p), VOCABULARY - 1, dtype=p.dtype)
    others[:, 0] = 1 - p
    if spread:
        others[:] = ((1 - p) / (VOCABULARY - 1))[:, None]
    probs = torch.cat([p[:, None], others], 1)
    return TokenRows(
        nll=-p.log(),
        p_correct=p,
        entropy=torch.special.entr(probs).sum(1),
        top_logits=probs.topk(objective.largest).values.log() if objective.largest else None,
        collision=probs.square().sum(1),
        base_logp=torch.full_like(p, BASE_P).log(),
    )


def panels() -> dict[str, list[Curve]]:
    """Return the curves of each panel, by its title."""
    p = torch.linspace(0.001, 0.999, POINTS, dtype=torch.float64)
    of_p, of_distribution, of_base = [], [], []
    for name in OBJECTIVES:
        objective = make_objective(name)
        if objective.needs_base_logp:
            of_base.append(Curve(objective.title, p, objective.weight(rows_at(p, objective, False))))
        elif objective.potential(p) is not None:
            if not objective.kl_weight:  # the weight of the objective that adds a divergence is that of dft
                of_p.append(Curve(objective.title, p, objective.weight(rows_at(p, objective, False))))
        else:
            for spread, rest in ((False, "one other token"), (True, "many other tokens")):
                weight = objective.weight(rows_at(p, objective, spread))
                of_distribution.append(Curve(f"{objective.title}, {rest}", p, weight))
    return {
        "Functions of p": of_p,
        "Functions of the distribution": of_distribution,
        f"Relative to a base model, base p = {BASE_P}": of_base,
    }


def digest_of(curves: dict[str, list[Curve]]) -> str:
    """Return a digest of all curves, to four digits."""
    content = [
        (title, curve.label, [f"{value:.4f}" for value in curve.weight.tolist()])
        for title, lines in curves.items()
        for curve in lines
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def draw(axes: Axes, title: str, curves: list[Curve]) -> None:
    """Draw one panel."""
    for index, curve in enumerate(curves):
        axes.plot(
            curve.p, curve.weight, color=COLORS[index % len(COLORS)], linestyle=DASHES[index % len(DASHES)],
            label=curve.label,
        )  # fmt: skip
    axes.set(title=title, xlabel="p of the target", xlim=(0, 1), ylim=(0, None))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2 if len(curves) > 4 else 1)


def main() -> None:
    """Draw and write the picture."""
    curves = panels()
    with styled():
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        axes = figure.subplots(1, len(curves))
        for place, (title, lines) in zip(axes, curves.items(), strict=True):
            draw(place, title, lines)
        axes[0].set_ylabel("weight")
    write_png(figure, PICTURE, {DIGEST: digest_of(curves)})
    print(PICTURE)


if __name__ == "__main__":
    main()
