"""The page of an evaluation by generation: scores of models side by side, and some of their answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from dft.report.pages.run import render

MAX_TEXT = 1500
"""Number of characters of a question or an answer that are shown."""
MAX_NAME = 60
"""Number of characters of a model's name that fit above its bar."""


def evaluation_page(
    results: Mapping[str, Any], examples: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> str:
    """Return the HTML of `results.json`, with a few problems of each model and file.

    Args:
        results: the content of `results.json`.
        examples: graded problems by model and file.
    """
    files = list(dict.fromkeys(score["file"] for model in results["models"] for score in model["files"]))
    return render(
        "evaluation.html.jinja",
        settings=results["settings"],
        paths=[(model["name"], model["path"]) for model in results["models"]],
        bars=bars(results, files),
        examples=[
            {"model": model, "file": file, "records": [example(record) for record in records]}
            for (model, file), records in examples.items()
        ],
    )


def bars(results: Mapping[str, Any], files: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for each file, the scores of the models, with avg@n and its interval in percent for a bar."""
    groups = []
    for file in files:
        rows = []
        for model in results["models"]:
            for score in model["files"]:
                if score["file"] == file:
                    percents = {key: round(100 * value, 2) for key, value in score["avg"].items()}
                    name = model["name"]
                    rows.append({"name": name, "short": abbreviate(name), "numbers": score, **percents})
        groups.append({"file": file, "rows": rows})
    return groups


def abbreviate(name: str) -> str:
    """Shorten a long name in the middle, since names of runs often differ at the end."""
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def example(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a problem with its first correct and its first wrong answer."""
    samples = record["samples"]
    first = [
        next((sample for sample in samples if sample["right"] == right), None) for right in (True, False)
    ]
    return {
        "line": record["line"],
        "question": record["question"][-MAX_TEXT:],
        "reference": record["reference"][-MAX_TEXT:],
        "right": sum(sample["right"] for sample in samples),
        "samples": len(samples),
        "answers": [{**sample, "text": sample["text"][:MAX_TEXT]} for sample in first if sample is not None],
    }
