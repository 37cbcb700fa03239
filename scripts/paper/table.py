"""Print the paper's results for Qwen2.5-Math-1.5B next to the accuracies of an evaluation.

python scripts/paper/table.py runs/paper/evaluation/results.json
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from dft.errors import UserError, report_user_errors

TITLES = {
    "math500": "Math500", "minerva": "Minerva Math", "olympiad": "Olympiad Bench", "aime24": "AIME 2024",
    "amc23": "AMC 2023",
}  # fmt: skip
PUBLISHED = {
    "base": (31.66, 8.51, 15.88, 4.16, 19.38),
    "sft": (43.76, 13.04, 12.63, 1.87, 18.75),
    "dft": (64.89, 20.94, 27.08, 6.87, 38.13),
}
"""Published avg@16 in percent (arXiv 2508.05629, Table 1, Qwen2.5-Math-1.5B), in the order of `TITLES`."""
MISSING = "–"


def table(results: Mapping[str, Any]) -> str:
    """Return a Markdown table of published and measured accuracies in percent.

    The measured average is shown only if all five benchmarks were measured.

    Args:
        results: the content of results.json.
    """
    measured = {
        model["name"]: {score["file"]: 100 * score["avg"]["value"] for score in model["files"]}
        for model in results["models"]
    }
    lines = [
        f"| published / here | {' | '.join(TITLES.values())} | average |",
        "|---" * (len(TITLES) + 2) + "|",
    ]
    for name, published in PUBLISHED.items():
        here = [measured.get(name, {}).get(file) for file in TITLES]
        is_complete = None not in here
        cells = [*zip(published, here, strict=True)]
        cells.append((sum(published) / len(published), sum(here) / len(here) if is_complete else None))
        shown = [f"{paper:.2f} / {MISSING if ours is None else f'{ours:.2f}'}" for paper, ours in cells]
        lines.append(f"| {name.upper() if name != 'base' else name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of scripts/evaluate.py")
    file = parser.parse_args().results
    try:
        text = table(json.loads(file.read_text()))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); run scripts/paper/evaluate.sh first"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is not a results.json of scripts/evaluate.py") from None
    print(text, end="")


if __name__ == "__main__":
    main()
