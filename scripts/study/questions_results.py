"""The tables and the picture of docs/questions.md."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.report.pages.figures import styled
from scripts.study.study_results import COLORS, header

METHODS = {"SFT": 0.0, "DFT": 1.0}
"""Methods, and their --dft_alpha."""
EDGES = (0.0, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0)
"""Bounds of the groups of tokens by their probability before training."""
GROUPS = [f"{low:g} to {high:g}" for low, high in zip(EDGES[:-1], EDGES[1:], strict=True)]
LORA_R = 8
"""Rank of the adapters."""
LABELS = {"all": "all weights", "LoRA": f"LoRA, rank {LORA_R}"}
STUDIES = {name: ROOT / "docs" / f"{name}.json" for name in ("study", "study_real")}


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables as Markdown, each between empty lines."""
    studies = {name: json.loads(file.read_text()) for name, file in STUDIES.items()}
    parts = [
        size_table(results["scores"]),
        curve_table(results["curves"]["DFT-all"]),
        change_table(results["changes"]),
        rate_table(studies["study"], studies["study_real"]),
        weights_table(results),
        prior_table(studies["study_real"]),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def size_table(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the table of both losses on the same tokens."""
    columns = ["mean p", "SFT loss (nll)", "DFT loss", "times smaller", "p below 0.05", "p above 0.95"]
    lines = header("model", columns)
    for name, label in (
        ("random weights", "random weights"),
        ("base", "base"),
        ("SFT-all", "and SFT"),
        ("DFT-all", "and DFT"),
    ):
        score = scores[name]
        nll, loss = score["nll"], score["dft_loss"]
        cells = [
            f"{score['avg_p_correct']:.4f}", f"{nll:.3f}", f"{loss:.4f}", f"{nll / loss:,.0f}",
            f"{100 * score['below_0.05']:.1f} %", f"{100 * score['above_0.95']:.1f} %",
        ]  # fmt: skip
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def curve_table(records: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the table of a run's evaluations."""
    lines = header("step", ["DFT loss", "objective, 1 - p", "nll", "acc", "entropy"])
    for record in records:
        values = [record[name] for name in ("loss", "objective", "nll", "acc", "entropy")]
        lines.append(f"| {record['step']} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return lines


def change_table(changes: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Return the table of nll before and after training, by p before training."""
    columns = ["tokens", "nll before", "after SFT", "after DFT", "nll rose under SFT", "nll rose under DFT"]
    lines = header("p before", columns)
    for group, sft, dft in zip(GROUPS, changes["SFT-all"], changes["DFT-all"], strict=True):
        cells = [
            f"{100 * sft['share']:.1f} %", f"{sft['nll_before']:.3f}", f"{sft['nll_after']:.3f}",
            f"{dft['nll_after']:.3f}", f"{100 * sft['rose']:.0f} %", f"{100 * dft['rose']:.0f} %",
        ]  # fmt: skip
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return lines


def best_trial(trials: Sequence[Mapping[str, Any]], method: str, data: str) -> tuple[float, float]:
    """Return the learning rate with the highest accuracy, the lowest of several, and this accuracy.

    Args:
        trials: runs that selected learning rates, of docs/study.json or docs/study_real.json.
        method: the method.
        data: the data set.
    """
    of_rate = {
        trial["rate"]: trial["accuracy"] if "accuracy" in trial else next(iter(trial["right"].values()))
        for trial in trials
        if (trial["method"], trial["data"]) == (method, data)
    }
    best = min(of_rate, key=lambda rate: (-of_rate[rate], rate))
    return best, of_rate[best]


def rate_table(small: Mapping[str, Any], real: Mapping[str, Any]) -> list[str]:
    """Return the table of the best learning rates in both studies."""
    lines = header("model and data", ["SFT", "right", "DFT", "right", "DFT's rate to SFT's"])
    rows = [("0.9 M", small["rates"], data) for data in ("right sums", "differences")]
    rows += [("SmolLM2-135M-Instruct", real["trials"], data) for data in ("half known", "new")]
    for model, trials, data in rows:
        (sft, sft_right), (dft, dft_right) = (best_trial(trials, method, data) for method in METHODS)
        ratio = f"{dft / sft:.2g}" if dft_right else "none works"
        lines.append(f"| {model}: {data} | {sft:g} | {sft_right:.1f} | {dft:g} | {dft_right:.1f} | {ratio} |")
    return lines


def weights_table(results: Mapping[str, Any]) -> list[str]:
    """Return the table of training all weights and LoRA."""
    columns = [
        "learning rate",
        "acc",
        "mean p",
        "nll",
        "entropy",
        "p below 0.05",
        "p above 0.95",
        "mean gradient norm",
    ]
    lines = header("run", columns)
    for name, curve in results["curves"].items():
        method, weights = name.split("-")
        score, last = results["scores"][name], curve[-1]
        cells = [
            f"{results['size']['rates'][weights]:g}", f"{last['acc']:.3f}", f"{score['avg_p_correct']:.3f}",
            f"{score['nll']:.3f}", f"{last['entropy']:.2f}", f"{100 * score['below_0.05']:.1f} %",
            f"{100 * score['above_0.95']:.1f} %", f"{results['grad_norm'][name]:.2f}",
        ]  # fmt: skip
        lines.append(f"| {LABELS[weights]}, {method} | {' | '.join(cells)} |")
    return lines


def prior_table(real: Mapping[str, Any]) -> list[str]:
    """Return the table of one instruct model's preflight on several data sets, and what DFT came to there."""
    lines = header("data", ["mean p", "p of ends", "SFT, right", "DFT, right"])
    tasks = {
        "half known": "short arithmetic",
        "half known, 3 in 10 wrong": "short arithmetic",
        "new": "spelling",
    }
    for data, task in tasks.items():
        before = real["base"]["training"][data]["whole"]
        right = {
            method: fmean(
                run["right"][task] for run in real["runs"] if (run["method"], run["data"]) == (method, data)
            )
            for method in METHODS
        }
        cells = [before["avg_p_correct"], before["p_end_of_turn"]]
        text = [f"{value:.2f}" for value in cells] + [f"{value:.1f}" for value in right.values()]
        lines.append(f"| {data} | {' | '.join(text)} |")
    return lines


def phrases(results: Mapping[str, Any]) -> list[str]:
    """Return the parts of sentences of the page that hold figures of the results."""
    scores, changes = results["scores"], results["changes"]["DFT-all"]
    first, last = (results["curves"]["DFT-all"][number] for number in (0, -1))
    early, norms = results["curves"]["DFT-all"][1], results["grad_norm"]
    ratio = {name: of["nll"] / of["dft_loss"] for name, of in scores.items()}
    both_ends = [scores[name]["below_0.05"] + scores[name]["above_0.95"] for name in ("base", "DFT-all")]
    adapters = results["curves"]["DFT-LoRA"][-1]
    sft_last = results["curves"]["SFT-all"][-1]
    real = json.loads(STUDIES["study_real"].read_text())["base"]["scores"]["gsm8k_test.jsonl"]["p_histogram"]
    least = [1 / scores[name]["avg_p_correct"] for name in ("random weights", "base")]
    entropy = [record["entropy"] for record in (first, last, sft_last)]
    low_nll, high_nll = ([group["nll_before"], group["nll_after"]] for group in (changes[0], changes[-2]))
    return [
        f"1 / mean p is {least[0]:,.0f} for the random weights and {least[1]:.1f} for the base model; the "
        f"ratio is {ratio['random weights']:,.0f} and {ratio['base']:.0f}",
        f"from {first['loss']:.3f} to {early['loss']:.3f} in the first {early['step']} steps and to "
        f"{last['loss']:.3f} in the end",
        f"`acc` went from {first['acc']:.3f} to {last['acc']:.3f}",
        f"from {100 * both_ends[0]:.0f} to {100 * both_ends[1]:.0f} %",
        f"nll rose from {low_nll[0]:.1f} to {low_nll[1]:.1f} where p was below 0.01, and fell from "
        f"{high_nll[0]:.2f} to {high_nll[1]:.2f} where it was {GROUPS[-2]}",
        f"{norms['DFT-all']:.2f} under DFT and {norms['SFT-all']:.2f} under SFT",
        f"{entropy[0]:.2f} to {entropy[1]:.2f} under DFT, and to {entropy[2]:.2f} under SFT",
        f"{adapters['nll']:.2f} and {last['nll']:.2f}",
        f"{100 * real[-1] / sum(real):.0f} % of the tokens have p above 0.95, and "
        f"{100 * real[0] / sum(real):.0f} % have p below 0.05",
    ]


def loss_figure(results: Mapping[str, Any]) -> Figure:
    """Draw the losses of one token, their curves in a DFT run, and the change of nll by token."""
    with styled():
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        token, during, after = figure.subplots(1, 3)
        draw_token(token)
        draw_curves(during, results["curves"]["DFT-all"])
        draw_changes(after, results["changes"])
    return figure


def draw_token(axes: Axes) -> None:
    """Draw the loss of one token against its probability."""
    p = np.linspace(0.002, 1, 500)
    axes.plot(p, -np.log(p), color=COLORS["SFT"], label="SFT loss, -log p")
    axes.plot(p, -p * np.log(p), color=COLORS["DFT"], label="DFT loss, -p log p")
    axes.plot(p, 1 - p, color=COLORS["DFT"], linestyle="--", label="what DFT minimizes, 1 - p")
    axes.plot([np.exp(-1)], [np.exp(-1)], "o", color=COLORS["DFT"])
    axes.set(title="One token", xlabel="p of the target token", ylabel="nats", xlim=(0, 1), ylim=(0, 3))
    axes.legend()


def draw_curves(axes: Axes, records: Sequence[Mapping[str, float]]) -> None:
    """Draw the metrics of a DFT run on held-out tokens, relative to those before training."""
    names = {"nll": ("SFT loss (nll)", COLORS["SFT"], "-"), "loss": ("DFT loss", COLORS["DFT"], "-"),
             "objective": ("1 - p", COLORS["DFT"], "--"), "acc": ("acc", "#009e73", "-")}  # fmt: skip
    steps = [record["step"] for record in records]
    for name, (label, color, dashes) in names.items():
        values = [record[name] / records[0][name] for record in records]
        axes.plot(steps, values, color=color, linestyle=dashes, label=label)
    axes.set(
        title="A run of DFT on GSM8K", xlabel="optimizer step", ylabel="relative to the start", ylim=(0, 2.2)
    )
    axes.legend(loc="upper center", ncols=2)


def draw_changes(axes: Axes, changes: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw the mean change of nll of tokens, by their probability before training."""
    for offset, method in ((-0.2, "SFT"), (0.2, "DFT")):
        heights = [group["nll_after"] - group["nll_before"] for group in changes[f"{method}-all"]]
        positions = [number + offset for number in range(len(heights))]
        axes.bar(positions, heights, 0.38, color=COLORS[method], label=method)
    axes.axhline(0, color="#888888", linewidth=0.7)
    axes.set_xticks(range(len(GROUPS)), [group.replace(" to ", "\nto ") for group in GROUPS])
    axes.set(title="Tokens by their p before training", xlabel="p before", ylabel="change of nll, nats")
    axes.legend()
