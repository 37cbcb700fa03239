"""Print the first and last metrics of a run, its answer to a held-out question, and the files it wrote.

    python scripts/summarize_run.py runs/example/output [--question runs/example/data/eval.jsonl] [--log FILE]

Fails if the saved model cannot be loaded by AutoModelForCausalLM.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.metrics import CURVES, EVAL, QUALITY, evaluation_prefixes
from dft.ranks import quiet_libraries
from dft.report.pages.run import REPORT_PAGE
from dft.report.pages.sections import RUN_FILES
from dft.report.saved_report import load_report

METRICS = tuple(metric.name for metric in CURVES if metric in QUALITY)
FILES = {name: RUN_FILES[name] for name in ("trainer_state.json", "data_report.json", "run_args.yaml")} | {
    REPORT_PAGE: "report of the run: curves, histogram of p, conversations token by token"
}
"""Files that are listed if they exist, with their descriptions."""


def first_and_last(history: list[dict[str, Any]], key: str) -> tuple[float, float] | None:
    """Return the first and the last logged value of a metric; None if it was never logged."""
    values = [record[key] for record in history if key in record]
    return (values[0], values[-1]) if values else None


def table(history: list[dict[str, Any]]) -> str:
    """Return a table of the first and the last value of each metric in training and in each evaluation."""
    prefixes = evaluation_prefixes(history) or [EVAL]
    heads = {"": f"{'train first':>12}"} | {
        prefix: f"{prefix.rstrip('_') + ' first':>13}" for prefix in prefixes
    }
    # Names of evaluation sets may be wider than the column.
    heads = {prefix: head if len(head) <= 13 else f"  {head}" for prefix, head in heads.items()}
    rows = [f"{'':<14}" + "".join(f"{head}{'last':>9}" for head in heads.values())]
    for metric in METRICS:
        row = f"{metric:<14}"
        for prefix, head in heads.items():
            pair = first_and_last(history, prefix + metric)
            first, last = ("-", "-") if pair is None else (f"{pair[0]:.4f}", f"{pair[1]:.4f}")
            row += f"{first:>{len(head)}}{last:>9}"
        rows.append(row)
    return "\n".join(rows)


def answer(folder: Path, prompt: list[dict[str, str]]) -> str:
    """Generate an answer with the saved model by greedy decoding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def held_out_question(file: Path, line: int) -> tuple[list[dict[str, str]], str]:
    """Return the turns before the first assistant turn on a line of a file, and the content of that turn.

    Raises:
        UserError: the file cannot be read, has fewer lines, or has no conversation with an answer there.
    """
    if line < 1:
        raise UserError(f"--line {line}: must be at least 1")
    try:
        with file.open(encoding="utf-8") as lines:
            row = next(islice(lines, line - 1, None), None)
    except OSError as error:
        raise UserError(f"--question {file}: cannot be read ({error.strerror})") from None
    if row is None:
        raise UserError(f"--line {line}: {file} has fewer lines")
    try:
        messages = json.loads(row)["messages"]
        turn = [message["role"] for message in messages].index("assistant")
        return messages[:turn], messages[turn]["content"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}:{line}: is not a row with messages that have an answer") from None


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Summarize a finished training run.")
    parser.add_argument("folder", type=Path, help="the --output_dir of the run")
    parser.add_argument("--question", type=Path, help="ask the model a question of this .jsonl file")
    parser.add_argument("--line", type=int, default=1, help="line of the question, from 1")
    parser.add_argument("--before", type=Path, help="folder of the model before training, to ask it, too")
    parser.add_argument("--log", type=Path, help="a log file to list with the other files")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.before and not (arguments.before / "config.json").is_file():
        raise UserError(f"--before: {arguments.before / 'config.json'} does not exist")
    quiet_libraries()
    history = load_report(folder)["log"]
    print(f"\n{table(history)}\n")
    if arguments.question:
        prompt, expected = held_out_question(arguments.question, arguments.line)
        print(f"question   {prompt[-1]['content']}")
        print(f"expected   {expected}")
        if arguments.before:
            print(f"before     {answer(arguments.before, prompt)!r}")
            print(f"after      {answer(folder, prompt)!r}\n")
        else:
            print(f"answered   {answer(folder, prompt)}\n")
    print(f"{folder}\n  the model; AutoModelForCausalLM.from_pretrained loads this folder")
    for name, meaning in FILES.items():
        if (folder / name).is_file():
            print(f"{folder / name}\n  {meaning}")
    if arguments.log:
        print(f"{arguments.log}\n  the log file")


if __name__ == "__main__":
    main()
