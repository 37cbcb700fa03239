"""The model card: the README.md of a saved model, with its base model, data, training and metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerState

from dft.data.preparing.evaluation_sets import splits_of
from dft.files import REPORT_PICTURE
from dft.metrics import NLL, QUALITY, evaluation_prefixes
from dft.report.terminal.data import data_summary
from dft.training.checkpoints.run_settings import CHANGES

PAPER = "https://arxiv.org/abs/2508.05629"
LISTED_FLAGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "freeze",
    "add_tokens",
    "lora_args",
    "ema_decay",
)
"""Flags that the card lists; run_args.yaml has all flags that were given."""


def saved_model_card(record: dict[str, Any], state: TrainerState, step: int, has_picture: bool) -> str:
    """Return the text of the model card of a saved model.

    Args:
        record: see `model_card`.
        state: the trainer's state.
        step: the optimizer step of the weights, which is not the last one if the best model was loaded.
        has_picture: see `model_card`.
    """
    # Flags that changed after a step do not concern the weights of that step.
    log = [entry for entry in state.log_history if entry["step"] + (CHANGES in entry) <= step]
    origin = f"Saved after step {step:,} of {state.max_steps:,}."
    if step != state.global_step:
        metric = f"{record['arguments']['metric_for_best_model']} {state.best_metric:.4g}"
        origin = (
            f"The weights are those after step {step:,} of {state.global_step:,}, the best of the run "
            f"({metric})."
        )
    return model_card(record, log, origin, has_picture)


def model_card(
    record: Mapping[str, Any], log: Sequence[Mapping[str, Any]], origin: str, has_picture: bool
) -> str:
    """Return the card as Markdown, headed by the metadata that the Hugging Face Hub reads.

    Args:
        record: `dft.report.run_record.run_record`.
        log: `log_history` of the trainer's state, up to the step of the weights.
        origin: sentence about the step of the weights.
        has_picture: whether report.png is saved in the same folder.
    """
    name = record["model"]["name"]
    is_local = Path(name).expanduser().is_dir()
    head = yaml.safe_dump(
        {
            **({} if is_local else {"base_model": name}),  # the hub cannot link to a local path
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["dft", "fine-tuned"],
        },
        sort_keys=False,
    )
    flags = record["arguments"]
    rows = [f"| {flag} | {_shown(flags[flag])} |" for flag in LISTED_FLAGS if flags.get(flag) is not None]
    machine = {key: value for key, value in record["environment"].items() if value is not None}
    return "\n".join(
        [
            f"---\n{head}---",
            f"# {record['name']}",
            "",
            f"Fine-tuned from `{Path(name).name if is_local else name}`, {method_text(record)}.",
            origin,
            "",
            *lora_lines(flags, record["model"]["adapter_loader"]),
            "## Metrics",
            "",
            *metric_lines(log),
            "",
            *([f"![Curves of training and evaluation]({REPORT_PICTURE})", ""] if has_picture else []),
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
            *changed_flags(log),
            ", ".join(f"{key} {value}" for key, value in machine.items()),
            "",
        ]
    )


def _shown(value: Any) -> str:
    """Return the value of a flag as a cell of a table."""
    text = ", ".join(f"`{item}`" for item in value) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")  # it would end the cell, also inside backticks


def changed_flags(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a paragraph for each time that the run was resumed with other flags."""
    lines = []
    for entry in log:
        if CHANGES in entry:
            changes = [f"`{name}` from {old} to {new}" for name, (old, new) in entry[CHANGES].items()]
            lines += [f"Changed after step {entry['step']:,}: {', '.join(changes)}.", ""]
    return lines


def method_text(record: Mapping[str, Any]) -> str:
    """Describe how the model was trained; follows "Fine-tuned from ..."."""
    alpha = record["alpha"]
    if record["method"] not in ("SFT", "DFT"):
        share = "" if alpha is None else f", alpha {alpha:g}"
        return f"by {record['method']}{share}: cross-entropy with token weight {record['weight']}"
    if record["method"] == "SFT":
        return "by plain SFT (cross-entropy)"
    dft = f"by [Dynamic Fine-Tuning]({PAPER}): cross-entropy weighted, token by token, by "
    if alpha == 1:
        return dft + "the model's own detached probability p of the target token"
    weight = f"{alpha:g} p + {1 - alpha:g}"
    return f"{dft}{weight}, where p is the model's own detached probability of the target token"


def lora_lines(flags: Mapping[str, Any], loader: str | None) -> list[str]:
    """Return instructions for loading the adapters; empty if the whole model was trained.

    Args:
        flags: every flag with its value.
        loader: the function that loads them; None if there are none.
    """
    if loader is None:
        return []
    kind = "DoRA" if json.loads(flags.get("lora_args") or "{}").get("use_dora") else "LoRA"
    loading = f"`{loader}` loads them together with their base model."
    return [f"These are {kind} adapters of rank {flags['lora_r']}. With peft installed, {loading}", ""]


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the summary of the data, with file names in place of the paths of this machine."""
    files = [entry["file"] for split in splits_of(report) for entry in report[split]["files"]]
    lines = data_summary(report)
    for file in sorted(files, key=len, reverse=True):
        lines = [line.replace(file, Path(file).name) for line in lines]
    return lines


def metric_lines(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the last logged value of each metric in training and in evaluation."""
    last = {"": latest(log, "grad_norm")}
    last |= {prefix: latest(log, prefix + NLL.name) for prefix in evaluation_prefixes(log)}
    if not any(last.values()):
        return ["No metrics have been logged yet."]
    columns = [prefix for prefix, metrics in last.items() if metrics]
    heads = [f"{prefix.rstrip('_') or 'train'}, step {last[prefix]['step']:,}" for prefix in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + len(columns)) + "|"]
    for name in (metric.name for metric in QUALITY):
        values = [last[prefix].get(prefix + name) for prefix in columns]
        if any(value is not None for value in values):
            shown = ["" if value is None else f"{value:.4g}" for value in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def latest(log: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """Return the last record that has a key; an empty one if there is none."""
    return next((record for record in reversed(log) if key in record), {})
