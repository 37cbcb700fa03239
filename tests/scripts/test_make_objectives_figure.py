"""scripts/make_objectives_figure.py: the picture shows the current weights of every objective."""

import pytest
import torch
from PIL import Image

from dft.loss.objectives import OBJECTIVES
from scripts.make_objectives_figure import DIGEST, PICTURE, digest_of, panels


def test_the_picture_is_up_to_date():
    with Image.open(PICTURE) as picture:
        assert picture.info[DIGEST] == digest_of(panels()), "run python scripts/make_objectives_figure.py"


def test_every_objective_has_a_curve():
    labels = [curve.label.lower() for lines in panels().values() for curve in lines]
    missing = [name for name in OBJECTIVES if not any(label.startswith(name) for label in labels)]
    assert missing == ["asft"]  # its weight is that of DFT


def test_curves_are_the_weights_of_the_formulas():
    """At p = 0.3 of 1,000 tokens, the others sharing the rest, or one of them having it."""
    curves = {curve.label: curve for lines in panels().values() for curve in lines}

    def at(label: str, p: float) -> tuple[float, float]:
        curve = curves[label]
        return curve.weight[(curve.p - p).abs().argmin()].item(), curve.p[(curve.p - p).abs().argmin()].item()

    weight, p = at("DEFT, one other token", 0.3)
    assert weight == pytest.approx(p ** (p**2 + (1 - p) ** 2), rel=1e-9)
    weight, p = at("DEFT, many other tokens", 0.3)
    assert weight == pytest.approx(p ** (p**2 + (1 - p) ** 2 / 999), rel=1e-9)
    weight, p = at("PSFT (clip 0.28)", 0.3)
    assert weight == pytest.approx(p / 0.3, rel=1e-9)
    weight, p = at("PSFT (clip 0.28)", 0.5)
    assert weight == 0
    assert torch.isfinite(torch.cat([curve.weight for curve in curves.values()])).all()
