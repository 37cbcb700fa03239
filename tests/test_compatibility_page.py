"""docs/compatibility.md is generated from the marks of the tests."""

import re

import pytest

from scripts.make_compatibility_page import PAGE, Claim, cell, compatibility_page, read_claims
from tests.combinations import FEATURES, combination


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == compatibility_page(), (
        "run python scripts/make_compatibility_page.py"
    )


def test_the_parallel_forms_of_the_promise_are_proven_by_default_tests():
    claims = [claim for claim in read_claims() if claim.error is None and not claim.is_slow]
    forms = {claim.features["parallel"] for claim in claims}
    assert {"single", "DDP", "ZeRO-2", "ZeRO-3", "FSDP 2", "sequence parallel, ZeRO-3"} <= forms
    assert all(claim.features.keys() == set(FEATURES) for claim in claims)
    assert all(re.fullmatch(r"[\w/]+\.py::test_\w+", claim.test) for claim in claims)


@pytest.mark.parametrize(
    ("flags", "ranks", "feature", "value"),
    [
        ({}, 1, "parallel", "single"),
        ({}, 2, "parallel", "DDP"),
        ({"deepspeed": "/x/zero3_offload.json"}, 2, "parallel", "ZeRO-3 offload"),
        ({"fsdp": True}, 2, "parallel", "FSDP 2"),
        ({"sequence_parallel_size": 2, "deepspeed": "zero2"}, 2, "parallel", "sequence parallel, ZeRO-2"),
        ({"sequence_parallel_size": 2, "fsdp": True}, 2, "parallel", "sequence parallel, FSDP 2"),
        ({"dft_alpha": 0}, 1, "objective", "sft"),
        ({"objective": "asft"}, 1, "objective", "asft"),
        ({"lora_r": 4, "load_in_4bit": True}, 1, "weights", "QLoRA"),
    ],
)
def test_features_are_read_from_flags(flags, ranks, feature, value):
    assert combination(flags, ranks)[feature] == value


def test_a_cell_shows_the_strongest_claim():
    works, slow, refused = (
        Claim({}, error, "", is_slow) for error, is_slow in ((None, False), (None, True), ("reason", False))
    )
    assert cell([refused, slow, works]) == "yes" and cell([refused, slow]) == "yes, slow"
    assert cell([refused]) == "no: reason" and cell([]) == "*not tested*"
