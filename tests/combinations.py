"""Marks of tests that train with a combination of features, or have it refused, for docs/compatibility.md.

The features are read from the flags that the test passes, so that the page cannot claim another combination.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

FEATURES = ("objective", "parallel", "weights", "rows", "attention", "compiled", "checkpointing")
"""The features of a combination, in the order in which they are stored."""


def combination(flags: Mapping[str, object], ranks: int = 1) -> dict[str, str]:
    """Return the features that a run has with some flags.

    Args:
        flags: flags of train_dft.py by name; those that are left out have their defaults.
        ranks: number of processes.

    Attention is that which auto selects for the models of the tests.
    """
    return {
        "objective": objective_of(flags),
        "parallel": parallel_of(flags, ranks),
        "weights": weights_of(flags),
        "rows": "packed" if flags.get("packing") else "unpacked",
        "attention": str(flags.get("attn_implementation") or "varlen"),
        "compiled": "compiled" if flags.get("torch_compile") else "not compiled",
        "checkpointing": "checkpointing" if flags.get("enable_gradient_checkpointing") else "all stored",
    }


def objective_of(flags: Mapping[str, object]) -> str:
    if flags.get("objective") is None and flags.get("dft_alpha") == 0:
        return "sft"
    return str(flags.get("objective") or "dft")


def parallel_of(flags: Mapping[str, object], ranks: int) -> str:
    """Return how the ranks share the work."""
    config = flags.get("deepspeed")
    zero = Path(str(config)).stem.replace("zero", "ZeRO-").replace("_offload", " offload") if config else None
    if flags.get("tensor_parallel"):
        return "tensor parallel"
    if int(str(flags.get("sequence_parallel_size") or 1)) > 1:
        return f"sequence parallel, {zero or ('FSDP 2' if flags.get('fsdp') else 'DDP')}"
    if zero:
        return zero
    if flags.get("fsdp"):
        return "FSDP 2"
    return "DDP" if ranks > 1 else "single"


def weights_of(flags: Mapping[str, object]) -> str:
    if flags.get("load_in_4bit"):
        return "QLoRA"
    return "LoRA" if flags.get("lora_r") else "full"


def proves(flags: Mapping[str, object], ranks: int = 1) -> pytest.MarkDecorator:
    """Return the mark of a test that trains with some flags and compares numbers with another run."""
    return pytest.mark.proves(**combination(flags, ranks))


def refuses(error: str, flags: Mapping[str, object], ranks: int = 1) -> pytest.MarkDecorator:
    """Return the mark of a test in which some flags are refused.

    Args:
        error: what the page says about it: the reason in a few words.
        flags: see `combination`.
        ranks: see `combination`.
    """
    return pytest.mark.refuses(error=error, **combination(flags, ranks))
