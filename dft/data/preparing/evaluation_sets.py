"""Named evaluation sets: the values NAME=FILE of --eval_data_files."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dft.errors import UserError
from dft.metrics import METRICS, parse_name

EVAL = "eval"
"""The split of the only evaluation set. Those with names are `eval_<name>`."""
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?")
FLAG = "--eval_data_files"


@dataclass(frozen=True)
class EvaluationSets:
    """The parsed values of --eval_data_files.

    Attributes:
        files: the values without their names.
        names: the name of the set of each value; empty if the values have none, so that they are one set.
    """

    files: list[str]
    names: list[str]

    def splits(self) -> list[str]:
        """Return the split of each value."""
        return [f"{EVAL}_{name}" for name in self.names] or [EVAL] * len(self.files)


def parse_evaluation_files(values: Sequence[str]) -> EvaluationSets:
    """Parse the values of --eval_data_files, which are all NAME=FILE, or all files.

    A value that exists as a file, or that has a slash before its first equals sign, is a file.

    Raises:
        UserError: a name is illegal or appears twice, or only some values have one.
    """
    pairs = [_split(value) for value in values]
    names = [name for name, _ in pairs if name is not None]
    for name, file in pairs:
        if name is not None:
            _check_name(name, file)
    if names and len(names) < len(pairs):
        unnamed = next(file for name, file in pairs if name is None)
        raise UserError(
            f"{FLAG} {unnamed}: has no name, and other evaluation sets have; name all of them (NAME=FILE) or "
            "none"
        )
    name, count = Counter(names).most_common(1)[0] if names else ("", 1)
    if count > 1:
        raise UserError(
            f"{FLAG}: {count} evaluation sets have the name {name!r}; give each its own name, or one "
            f"name to a folder or a pattern with the files of the set, such as {name}='folder/*.jsonl'"
        )
    return EvaluationSets([file for _, file in pairs], names)


def _split(value: str) -> tuple[str | None, str]:
    """Return the name, or None, and the file of a value."""
    name, separator, file = value.partition("=")
    if not separator or "/" in name or os.path.exists(os.path.expanduser(value)):
        return None, value
    return name, file


def _check_name(name: str, file: str) -> None:
    flag = f"{FLAG} {name}={file}"
    if not NAME.fullmatch(name):
        raise UserError(
            f"{flag}: {name!r} cannot name an evaluation set; use letters, digits, '_', '-' and '.' (if "
            f"all of it is the name of a file, write ./{name}={file})"
        )
    if not file:
        raise UserError(f"{flag}: no file follows the name; write {name}=FILE")
    for metric in METRICS:
        if parse_name(f"{name}_{metric.name}") != (name, metric):
            raise UserError(
                f"{flag}: {name}_{metric.name} would read as the metric "
                f"{name.rpartition('_')[2]}_{metric.name}; choose another name"
            )


def splits_of(report: Mapping[str, Any]) -> list[str]:
    """Return the splits that a data report describes: "train", and "eval" or "eval_<name>" of each set."""
    # Reports of earlier versions have no list, and at most one evaluation set.
    return report.get("splits") or [split for split in ("train", EVAL) if split in report]
