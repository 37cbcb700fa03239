"""Importing the package loads only the modules that are used."""

import subprocess
import sys

import pytest

import dft

HEAVY = (
    "transformers",
    "transformers.trainer",
    "matplotlib",
    "datasets",
    "accelerate",
    "deepspeed",
    "dft.training",
)


@pytest.mark.parametrize("name", ["dft_loss", "linear_dft_loss", "make_objective", "Objective", "TokenStats"])
def test_importing_the_loss_does_not_load_the_trainer(name):
    code = f"import sys; from dft import {name}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []


def test_every_public_name_can_be_imported():
    assert {name: getattr(dft, name).__name__ for name in dft.__all__} == {name: name for name in dft.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dft' has no attribute 'dft_los'"):
        dft.dft_los  # noqa: B018
