"""README.md beside a saved model: what it was trained from, on what, how, and what came of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dft.metrics import QUALITY
from dft.report.saved_report import PICTURE
from dft.report.terminal.data import data_summary

PAPER = "https://arxiv.org/abs/2508.05629"
SHOWN = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
"""Flags that a reader looks for; all of them are in run_args.yaml."""


def model_card(
    record: Mapping[str, Any], log: Sequence[Mapping[str, Any]], step: int, steps: int, pictured: bool
) -> str:
    """Markdown with the metadata of the hub.

    Args:
        record: `dft.report.run_record.run_record`.
        log: Trainer's `log_history`.
        step: of this save, of so many `steps`.
        pictured: whether report.png lies beside it.
    """
    name = record["model"]["name"]
    base = {} if Path(name).expanduser().is_dir() else {"base_model": name}  # a path means nothing elsewhere
    head = yaml.safe_dump(
        {
            **base,
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["dft", "fine-tuned"],
        },
        sort_keys=False,
    )
    flags = record["arguments"]
    rows = [f"| {flag} | {flags[flag]} |" for flag in SHOWN if flags.get(flag) is not None]
    machine = {key: value for key, value in record["environment"].items() if value is not None}
    return "\n".join(
        [
            f"---\n{head}---",
            f"# {record['name']}",
            "",
            f"Fine-tuned from `{Path(name).name if not base else name}`, {method(record)}.",
            f"Saved after step {step:,} of {steps:,}.",
            "",
            *lora_lines(flags),
            "## Metrics",
            "",
            *metric_lines(log),
            "",
            *([f"![Curves of training and evaluation]({PICTURE})", ""] if pictured else []),
            "## Data",
            "",
            "```",
            *data_lines(record["data"]),
            "```",
            "",
            "## Training",
            "",
            "| flag | value |",
            "|---|---|",
            *rows,
            "",
            ", ".join(f"{key} {value}" for key, value in machine.items()),
            "",
        ]
    )


def method(record: Mapping[str, Any]) -> str:
    alpha = record["alpha"]
    if record["method"] not in ("SFT", "DFT"):
        share = "" if alpha is None else f", alpha {alpha:g}"
        return f"by {record['method']}{share}: cross-entropy in which a token weighs {record['weight']}"
    if record["method"] == "SFT":
        return "by plain SFT (cross-entropy)"
    dft = f"by [Dynamic Fine-Tuning]({PAPER}): cross-entropy weighted, token by token, by "
    if alpha == 1:
        return dft + "the model's own detached probability p of the right token"
    weight = f"{alpha:g} p + {1 - alpha:g}"
    return f"{dft}{weight}, where p is the model's own detached probability of the right token"


def lora_lines(flags: Mapping[str, Any]) -> list[str]:
    if flags.get("lora_r") is None:
        return []
    return [
        f"These are LoRA adapters of rank {flags['lora_r']}: `AutoModelForCausalLM.from_pretrained` loads "
        "them with their model where peft is installed.",
        "",
    ]


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """What was trained on, without the folders of this machine."""
    files = [one["file"] for split in ("train", "eval") if split in report for one in report[split]["files"]]
    lines = data_summary(report)
    for file in sorted(files, key=len, reverse=True):
        lines = [line.replace(file, Path(file).name) for line in lines]
    return lines


def metric_lines(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the last value of each metric, in training and in evaluation."""
    last = {"train": latest(log, "grad_norm"), "eval": latest(log, "eval_nll")}
    if not any(last.values()):
        return ["None were logged yet."]
    columns = [kind for kind, found in last.items() if found]
    heads = [f"{kind}, step {last[kind]['step']:,}" for kind in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(columns)) + "|"]
    for name in (metric.name for metric in QUALITY):
        values = [last[kind].get(name if kind == "train" else f"eval_{name}") for kind in columns]
        if any(value is not None for value in values):
            shown = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def latest(log: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    return next((record for record in reversed(log) if key in record), {})
