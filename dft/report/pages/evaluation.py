"""The page of an evaluation by generation: models side by side, and what they answered."""

from collections.abc import Mapping, Sequence
from typing import Any

from dft.report.pages.run import render

PAGE = "report.html"
SHOWN_TEXT = 1500
"""Characters of a question or an answer that are shown."""
SHOWN_NAME = 60
"""Characters of a model's name that there is room for above its bar."""


def evaluation_page(
    results: Mapping[str, Any], examples: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> str:
    """HTML of `results.json`, with a few problems of each model and file.

    Args:
        examples: records by model and file.
    """
    files = list(dict.fromkeys(one["file"] for model in results["models"] for one in model["files"]))
    return render(
        "evaluation.html.jinja",
        settings=results["settings"],
        paths=[(model["name"], model["path"]) for model in results["models"]],
        files=files,
        bars=bars(results, files),
        examples=[
            {"model": model, "file": file, "records": [shown(one) for one in records]}
            for (model, file), records in examples.items()
        ],
    )


def bars(results: Mapping[str, Any], files: Sequence[str]) -> list[dict[str, Any]]:
    """For each file the models, with places in percent for a bar of avg@n and its interval."""
    made = []
    for file in files:
        rows = []
        for model in results["models"]:
            for one in model["files"]:
                if one["file"] == file:
                    place = {key: round(100 * value, 2) for key, value in one["avg"].items()}
                    rows.append(
                        {"name": model["name"], "short": short(model["name"]), "numbers": one, **place}
                    )
        made.append({"file": file, "rows": rows})
    return made


def short(name: str) -> str:
    """Without its middle, where it is too long: names of runs differ at the end."""
    half = SHOWN_NAME // 2
    return name if len(name) <= SHOWN_NAME else f"{name[: half - 1]}…{name[-half:]}"


def shown(record: Mapping[str, Any]) -> dict[str, Any]:
    """A problem with its first right and its first wrong answer."""
    samples = record["samples"]
    first = [next((one for one in samples if one["right"] == right), None) for right in (True, False)]
    return {
        "line": record["line"],
        "question": record["question"][-SHOWN_TEXT:],
        "reference": record["reference"][-SHOWN_TEXT:],
        "right": sum(one["right"] for one in samples),
        "samples": len(samples),
        "answers": [{**one, "text": one["text"][:SHOWN_TEXT]} for one in first if one is not None],
    }
