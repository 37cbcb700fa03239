"""What the samples of a folder come to: `results.json` and `table.md`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dft.evaluation.folder import Note, Record, whole_lines
from dft.evaluation.statistics import avg_at_n, difference, pass_at_n

RESULTS, TABLE = "results.json", "table.md"


def collected(
    folder: Path, note: Note, grader: str
) -> tuple[dict[str, Any], dict[tuple[str, str], list[Record]]]:
    """What `results.json` says, of all models and files of a folder, and the first records of each.

    In the order in which they were first named. A model's samples of a file count once they are complete;
    differences are to the first model that has the file.
    """
    models, first, examples = [], {}, {}
    for name, (path, _) in note["models"].items():
        files = []
        for data, (_, _, count) in note["data"].items():
            records = whole_lines(folder / name / f"{data}.jsonl")
            if len(records) < count:
                continue
            made = summary(data, records)
            if data in first:
                made["difference"] = asdict(difference(right_of(records), first[data]))
            first.setdefault(data, right_of(records))
            examples[name, data] = records[:3]
            files.append(made)
        if files:
            models.append({"name": name, "path": path, "files": files})
    return {"settings": {**note["settings"], "grader": grader}, "models": models}, examples


def summary(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """What `results.json` says of one model on one file."""
    right = right_of(records)
    samples = [one for record in records for one in record["samples"]]
    return {
        "file": name,
        "problems": len(records),
        "samples": len(records[0]["samples"]),
        "avg": asdict(avg_at_n(right)),
        "pass": asdict(pass_at_n(right)),
        "stopped": sum(one["stopped"] for one in samples) / len(samples),
        "mean_tokens": sum(one["tokens"] for one in samples) / len(samples),
    }


def right_of(records: Sequence[Record]) -> list[list[bool]]:
    return [[one["right"] for one in record["samples"]] for record in records]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a row for each model and file."""
    size = results["settings"]["samples"]
    lines = [
        f"| model | file | problems | avg@{size} | pass@{size} | to the first | ended | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        for one in model["files"]:
            gap = one.get("difference")
            lines.append(
                f"| {model['name']} | {one['file']} | {one['problems']:,} | {percent(one['avg'])} "
                f"| {percent(one['pass'])} | {'' if gap is None else percent(gap, sign='+')} "
                f"| {100 * one['stopped']:.0f} % | {one['mean_tokens']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def percent(share: dict[str, float], sign: str = "") -> str:
    """`31.6 % (29.8 to 33.4)`"""
    value, low, high = (f"{100 * share[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"
