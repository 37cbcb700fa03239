"""Write docs/compatibility.md from the marks of the tests: which features work together.

    python scripts/make_compatibility_page.py

tests/test_compatibility_page.py fails if the page is not current.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


from dft.loss.objectives import OBJECTIVES
from tests.combinations import FEATURES

PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """# What works with what

<!-- Written by scripts/make_compatibility_page.py from the marks of the tests. Do not edit. -->

Which objectives, parallel forms, weights, rows and attention are tested together, and which are refused.

- **yes**: a test trains with it and compares numbers (losses, gradient norms or weights) with another run.
  The last section names it, and what else it uses at the same time.
- **yes, slow**: likewise, by a test that only `python -m pytest -m slow` runs.
- **no**: it is refused with an error, which a test checks. The cell says why.
- *not tested*: no test has this pair. It is not refused, and may work.

All of it runs on CPUs, with two ranks where there are several. flash-attn, 4-bit weights and CUDA kernels
need a GPU: `scripts/gpu_check.sh` checks those, and the cells of QLoRA and flash_attention_2 are empty here.
Pipeline parallelism is not part of this program.
"""
PARALLEL = (
    "single", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload", "FSDP 2", "sequence parallel, DDP",
    "sequence parallel, ZeRO-2", "sequence parallel, ZeRO-3", "sequence parallel, FSDP 2", "tensor parallel",
)  # fmt: skip
SETTINGS = {
    "all weights": ("weights", "full"),
    "LoRA": ("weights", "LoRA"),
    "QLoRA": ("weights", "QLoRA"),
    "packed rows": ("rows", "packed"),
    "padded rows (sdpa)": ("attention", "sdpa"),
    "compiled layers": ("compiled", "compiled"),
    "gradient checkpointing": ("checkpointing", "checkpointing"),
}
"""Columns of the first table, each with the feature and its value."""
ATTENTION = ("eager", "sdpa", "varlen", "flash_attention_2")
OF_ATTENTION = {
    "unpacked": ("rows", "unpacked"),
    "packed": ("rows", "packed"),
    "LoRA": ("weights", "LoRA"),
    "compiled": ("compiled", "compiled"),
    "checkpointing": ("checkpointing", "checkpointing"),
    "sequence parallel": ("parallel", "sequence parallel, DDP"),
}


@dataclass(frozen=True)
class Claim:
    """A combination of features, and the test that trains with it or has it refused.

    Attributes:
        features: value of each feature.
        error: why it is refused; None if it works.
        test: file and function of the test.
        is_slow: whether the default run of the tests leaves it out.
    """

    features: dict[str, str]
    error: str | None
    test: str
    is_slow: bool

    def has(self, *pairs: tuple[str, str]) -> bool:
        return all(self.features[name] == value for name, value in pairs)


def main() -> None:
    PAGE.write_text(compatibility_page(), encoding="utf-8")
    print(PAGE)


def compatibility_page() -> str:
    """Return the text of the page."""
    claims = list(read_claims())
    parts = [HEAD, "\n## Parallel forms\n\n"]
    parts += table("parallel", PARALLEL, SETTINGS, claims)
    parts.append("\n## Objectives\n\n")
    parts += table("objective", OBJECTIVES, {name: ("parallel", name) for name in PARALLEL[:10]}, claims)
    parts.append("\n## Attention\n\n")
    parts += table("attention", ATTENTION, OF_ATTENTION, claims)
    parts.append("\n## The tests\n\nEach combination with its tests in `tests/`.\n\n")
    parts.append(f"| {' | '.join(FEATURES)} | tests |\n{'|---' * (len(FEATURES) + 1)}|\n")
    parts += proofs(claims)
    return "".join(parts)


def table(
    feature: str, values: Any, columns: dict[str, tuple[str, str]], claims: list[Claim]
) -> Iterator[str]:
    """Yield the lines of a table with the values of a feature as rows and other features as columns."""
    yield f"| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|\n"
    for value in values:
        cells = (
            cell([claim for claim in claims if claim.has((feature, value), pair)])
            for pair in columns.values()
        )
        yield f"| {value} | {' | '.join(cells)} |\n"


def cell(claims: list[Claim]) -> str:
    """Return the text of a cell from all claims about its pair of features."""
    works = [claim for claim in claims if claim.error is None]
    if works:
        return "yes, slow" if all(claim.is_slow for claim in works) else "yes"
    return f"no: {claims[0].error}" if claims else "*not tested*"


def proofs(claims: list[Claim]) -> list[str]:
    """Return one line for each combination of features that works, and each that is refused."""
    tests: dict[tuple[str, ...], set[str]] = {}
    for claim in claims:
        key = tuple(claim.features[name] for name in FEATURES)
        prefix = f"refused ({claim.error}): " if claim.error else ""
        tests.setdefault(key, set()).add(f"{prefix}`{claim.test}`")
    return [f"| {' | '.join(key)} | {', '.join(sorted(names))} |\n" for key, names in sorted(tests.items())]


def read_claims() -> Iterator[Claim]:
    """Yield the claims of all test files that have marks of `tests.combinations`."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "from tests.combinations import" in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield from claims_of(importlib.import_module(name), str(path.relative_to(ROOT / "tests")))


def claims_of(module: ModuleType, file: str) -> Iterator[Claim]:
    """Yield the claims of a module: the marks of its test functions and of their parameters."""
    for name, function in vars(module).items():
        if not name.startswith("test_"):
            continue
        marks = list(getattr(function, "pytestmark", []))
        groups = [marks]
        for mark in marks:
            if mark.name == "parametrize":
                groups += [
                    [*parameters.marks, *marks] for parameters in mark.args[1] if hasattr(parameters, "marks")
                ]
        seen: set[int] = set()
        for group in groups:
            is_slow = any(mark.name == "slow" for mark in group)
            for mark in group:
                if mark.name in ("proves", "refuses") and id(mark) not in seen:
                    seen.add(id(mark))
                    features = {**mark.kwargs}
                    yield Claim(features, features.pop("error", None), f"{file}::{name}", is_slow)


if __name__ == "__main__":
    main()
