"""Results of the samples in an evaluation folder: `results.json` and `table.md`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dft.evaluation.folder import Manifest, SampleRecord, read_records
from dft.evaluation.statistics import avg_at_n, difference, pass_at_n

RESULTS, TABLE = "results.json", "table.md"


def collect_results(
    folder: Path, manifest: Manifest, grader: str
) -> tuple[dict[str, Any], dict[tuple[str, str], list[SampleRecord]]]:
    """Compute the results of all models and data files of a folder, in the order in which they were added.

    A model's samples of a data file are included once they are complete. Differences are to the first model
    that has samples of the data file.

    Returns:
        The content of `results.json`, and the first records of each model and data file as examples.
    """
    models = []
    first: dict[str, list[list[bool]]] = {}
    examples: dict[tuple[str, str], list[SampleRecord]] = {}
    for name, (path, _) in manifest["models"].items():
        files = []
        for data, (_, _, count) in manifest["data"].items():
            records = read_records(folder / name / f"{data}.jsonl")
            if len(records) < count:
                continue
            result = summarize(data, records)
            if data in first:
                result["difference"] = asdict(difference(_grades(records), first[data]))
            first.setdefault(data, _grades(records))
            examples[name, data] = records[:3]
            files.append(result)
        if files:
            models.append({"name": name, "path": path, "files": files})
    return {"settings": {**manifest["settings"], "grader": grader}, "models": models}, examples


def summarize(name: str, records: Sequence[SampleRecord]) -> dict[str, Any]:
    """Return the results of one model on one data file."""
    grades = _grades(records)
    samples = [sample for record in records for sample in record["samples"]]
    return {
        "file": name,
        "problems": len(records),
        "samples": len(records[0]["samples"]),
        "avg": asdict(avg_at_n(grades)),
        "pass": asdict(pass_at_n(grades)),
        "stopped": sum(sample["stopped"] for sample in samples) / len(samples),
        "mean_tokens": sum(sample["tokens"] for sample in samples) / len(samples),
    }


def _grades(records: Sequence[SampleRecord]) -> list[list[bool]]:
    """Return, for each problem, whether each of its samples is correct."""
    return [[sample["right"] for sample in record["samples"]] for record in records]


def format_table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table with a row for each model and data file."""
    size = results["settings"]["samples"]
    lines = [
        f"| model | file | problems | avg@{size} | pass@{size} | to the first | ended | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        for result in model["files"]:
            gap = result.get("difference")
            lines.append(
                f"| {model['name']} | {result['file']} | {result['problems']:,} "
                f"| {format_percent(result['avg'])} | {format_percent(result['pass'])} "
                f"| {'' if gap is None else format_percent(gap, sign='+')} "
                f"| {100 * result['stopped']:.0f} % | {result['mean_tokens']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def format_percent(share: dict[str, float], sign: str = "") -> str:
    """Format a share with its interval, such as `31.6 % (29.8 to 33.4)`."""
    value, low, high = (f"{100 * share[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"
