"""The tables and pictures of the study on a pretrained model."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.study import study_results
from scripts.study.real_tasks import COLUMNS, DATA, TASKS, held_out, is_right, task_file
from scripts.study.study_results import (
    BINS,
    Mean,
    accuracy,
    cell,
    difference_to_sft,
    header,
    mean,
    runs_of,
)

COLORS = ("#d55e00", "#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#e69f00")
OWN_ANSWERS = "own-answers.jsonl"
EXAMPLES = 2
"""Number of problems of each task whose answers are shown."""
LEFT_OUT = ("answers", "silenced", "model")
Results = Mapping[str, Any]
"""The content of study.json."""


def write_results(results: Results, folder: Path) -> None:
    """Write study.json, figures.json, table.md and the pictures into a folder, and print the tables."""
    (folder / "study.json").write_text(json.dumps(results) + "\n")
    figures = {
        "accuracy": accuracy_figure(results), "histograms": histogram_figure(results),
        "curves": curve_figure(results),
    }  # fmt: skip
    study_results.write_results(without_answers(results), folder, "figures", tables(results), figures)


def without_answers(results: Results) -> dict[str, Any]:
    """Return results without generated texts, lists of silenced tokens, and folders of this machine."""

    def trim(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: trim(item) for key, item in value.items() if key not in LEFT_OUT}
        if isinstance(value, list):
            return [trim(item) for item in value]
        return round(value, 6) if isinstance(value, float) else value

    return trim(dict(results))


def tables(results: Results) -> str:
    """Return all tables as Markdown."""
    parts = (
        accuracy_table, difference_table, forgetting_table, ending_table, preflight_table, rate_table,
        example_list,
    )  # fmt: skip
    return "\n".join(line for part in parts for line in [*part(results), ""])


def accuracy_table(results: Results) -> list[str]:
    """Return the table of accuracies."""
    lines = header("fine-tuned on: asked", [f"{data}: {asked}" for data, asked in COLUMNS])
    base = [f"{results['base']['right'][asked]:.1f}" for _, asked in COLUMNS]
    lines.append(f"| base | {' | '.join(base)} |")
    for method in results["methods"]:
        cells = [cell(accuracy(results, method, data, asked)) for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Percent of held-out problems that are right by greedy decoding, mean of "
        f"{results['size']['seeds']} seeds ± half of its 95 % interval.",
    ]


def difference_table(results: Results) -> list[str]:
    """Return the table of differences to SFT."""
    lines = header("to SFT", [f"{data}: {asked}" for data, asked in COLUMNS])
    for method in [name for name in results["methods"] if name != "SFT"]:
        cells = [cell(difference_to_sft(results, method, data, asked), "+") for data, asked in COLUMNS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Points above SFT on the same data, mean of the seeds' differences ± half of its 95 % interval.",
    ]


def score_mean(results: Results, method: str, data: str, file: str, metric: str) -> Mean:
    """Return the mean over seeds of a metric on a scored file."""
    return mean([run["scores"][file][metric] for run in runs_of(results, method, data)])


def unrelated_files(results: Results) -> list[str]:
    """Return the names of the scored files that have nothing to do with the tasks."""
    tasks = {task_file(Path(), "test", task).name for task in TASKS}
    return [file for file in results["base"]["scores"] if file not in tasks]


def forgetting_table(results: Results) -> list[str]:
    """Return the table of scores on texts that have nothing to do with the tasks."""
    names = {file: "own answers" if file == OWN_ANSWERS else "GSM8K" for file in unrelated_files(results)}
    columns = [f"{name}: {metric}" for name in names.values() for metric in ("nll", "mean p")]
    lines = header("fine-tuned on", ["method", *columns])
    keys = [(file, metric) for file in names for metric in ("nll", "avg_p_correct")]
    base = " | ".join(f"{results['base']['scores'][file][metric]:.3f}" for file, metric in keys)
    lines.append(f"| | base | {base} |")
    for data in DATA:
        for method in results["methods"]:
            cells = [cell(score_mean(results, method, data, file, metric), digits=3) for file, metric in keys]
            lines.append(f"| {data} | {method} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Scores of texts that no model was fine-tuned on: held-out problems of GSM8K with their worked "
        "answers, and the answers of the untouched model to plain questions.",
    ]


def ending_table(results: Results) -> list[str]:
    """Return the table of how well models end their answers."""
    lines = header("fine-tuned on", ["method", "p of end-of-turn tokens", "answers that end"])
    for data, of_data in DATA.items():
        task = of_data.learned
        file = task_file(Path(), "test", task).name
        base = results["base"]
        lines.append(
            f"| {data} | base | {base['scores'][file]['p_end_of_turn']:.3f} | {base['stopped'][task]:.0f} % |"
        )
        for method in results["methods"]:
            p = score_mean(results, method, data, file, "p_end_of_turn")
            stopped = mean([run["stopped"][task] for run in runs_of(results, method, data)])
            lines.append(f"| {data} | {method} | {cell(p, digits=3)} | {stopped.value:.0f} % |")
    return [
        *lines,
        "",
        "p on the reference answers of the task trained on, and the share of the generated "
        "answers that end before the limit of 48 tokens.",
    ]


def preflight_table(results: Results) -> list[str]:
    """Return what the preflight says about each data set, and which method was best."""
    columns = ["mean p", "p < 0.01", "gradient kept", "p of ends", "best method", "DFT to SFT"]
    lines = header("fine-tuned on", columns)
    for data, of_data in DATA.items():
        whole = results["base"]["training"][data]["whole"]
        right = {
            method: accuracy(results, method, data, of_data.learned).value for method in results["methods"]
        }
        best = max(right, key=lambda method: right[method])
        lines.append(
            f"| {data} | {whole['avg_p_correct']:.2f} | {100 * whole['silenced_share']:.0f} % | "
            f"{100 * whole['gradient_kept']:.0f} % | {whole['p_end_of_turn']:.3f} | "
            f"{best} ({right[best]:.1f}) | {right['DFT'] - right['SFT']:+.1f} |"
        )
    advice = [
        f"- {data}: {item['recommendation']}"
        for data in DATA
        for item in results["base"]["training"][data]["advice"]
    ]
    return [
        *lines,
        "",
        "What `--preflight True` says about the training data of the first seed:",
        "",
        *advice,
    ]


def rate_table(results: Results) -> list[str]:
    """Return the table of accuracies used to select the learning rates."""
    trials = results["trials"]
    methods = list(dict.fromkeys(trial["method"] for trial in trials))
    lines = header("learning rate: data", methods)
    for data in dict.fromkeys(trial["data"] for trial in trials):
        for rate in results["size"]["rates"][DATA[data].group]:
            cells = []
            for method in methods:
                values = [
                    trial["right"][DATA[data].learned]
                    for trial in trials
                    if (trial["data"], trial["method"], trial["rate"]) == (data, method, rate)
                ]
                cells.append(f"{values[0]:.1f}" if values else "")
            lines.append(f"| {rate:g}: {data} | {' | '.join(cells)} |")
    return [*lines, "", "Percent right on the validation problems of the task trained on, one seed."]


def example_list(results: Results) -> list[str]:
    """Return examples of answers of the first seed."""
    lines = ["Answers of the first seed, ✓ where the verifier accepts them:", ""]
    for data, asked in ((name, of_data.learned) for name, of_data in DATA.items()):
        chosen = held_out(asked)
        for index in range(0, len(chosen), len(chosen) // EXAMPLES):
            problem = chosen[index]
            lines.append(f"- *{problem.question}* ({data})")
            answers = {"base": results["base"]["answers"][asked][index]}
            answers |= {
                run["method"]: run["answers"][asked][index]
                for run in results["runs"]
                if (run["data"], run["seed"]) == (data, 0)
            }
            for name, text in answers.items():
                mark = " ✓" if is_right(problem, text) else ""
                shown = text if len(text) <= 70 else f"{text[:69]}…"
                lines.append(f"    - {name}: `{shown!r}`{mark}")
    return lines


def colors(results: Results) -> dict[str, str]:
    """Return the color of each method."""
    return dict(zip(results["methods"], COLORS, strict=False))


def accuracy_figure(results: Results) -> Figure:
    """Draw the means over seeds as bars with intervals, the seeds as dots, and the base model as lines."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = figure.subplots(
        1, len(DATA), sharey=True, width_ratios=[len(data.asked) for data in DATA.values()]
    )
    step = 0.84 / len(results["methods"])
    for axes, (name, data) in zip(panels, DATA.items(), strict=True):
        for index, (method, color) in enumerate(colors(results).items()):
            means = [accuracy(results, method, name, asked) for asked in data.asked]
            positions = [position - 0.42 + step * (index + 0.5) for position in range(len(data.asked))]
            heights, halves = [value.value for value in means], [value.half for value in means]
            axes.bar(positions, heights, 0.92 * step, color=color, label=method)
            axes.errorbar(positions, heights, halves, fmt="none", ecolor="#1c1c1c", capsize=2, linewidth=0.8)
            for position, asked in zip(positions, data.asked, strict=True):
                dots = [run["right"][asked] for run in runs_of(results, method, name)]
                axes.plot([position] * len(dots), dots, ".", color="#1c1c1c", markersize=3)
        for position, asked in enumerate(data.asked):
            label = "base" if position == 0 else None
            height = results["base"]["right"][asked]
            axes.hlines(
                height, position - 0.46, position + 0.46, color="#8a8a8a", linestyle="--", label=label
            )
        axes.set_xticks(range(len(data.asked)), data.asked, fontsize=8)
        axes.set_title("fine-tuned on:\n" + name.replace(", ", ",\n"), fontsize=9)
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("answers right, %")
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Add the legend of the first panel above all panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=7, frameon=False, fontsize=8)


def histogram_figure(results: Results) -> Figure:
    """Draw the histograms of p on the reference answers before and after fine-tuning."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    edges = [index / BINS for index in range(BINS + 1)]
    for axes, (name, data) in zip(figure.subplots(1, len(DATA), sharey=True), DATA.items(), strict=True):
        file = task_file(Path(), "test", data.learned).name
        histograms = {"base": [results["base"]["scores"][file]["p_histogram"]]} | {
            method: [run["scores"][file]["p_histogram"] for run in runs_of(results, method, name)]
            for method in results["methods"]
        }
        for label, parts in histograms.items():
            counts = [sum(values) for values in zip(*parts, strict=True)]
            color = colors(results).get(label, "#8a8a8a")
            shares = [count / sum(counts) for count in counts]
            axes.stairs(shares, edges, color=color, label=label, linewidth=1.4)
        axes.set_yscale("log")
        axes.set_title(f"fine-tuned on: {name}", fontsize=9)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("p of the right token, held-out problems of the task trained on", fontsize=9)
    figure.axes[0].set_ylabel("share of tokens")
    add_legend(figure)
    return figure


def curve_figure(results: Results) -> Figure:
    """Draw nll and mean p on validation problems during training, for the first seed."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.subplots(2, len(DATA), sharex="col", squeeze=False)
    for column, name in enumerate(DATA):
        for line, (metric, label) in enumerate(
            (("eval_nll", "nll"), ("eval_avg_p_correct", "p of the right token"))
        ):
            axes = grid[line][column]
            for method, color in colors(results).items():
                (run,) = [run for run in runs_of(results, method, name) if run["seed"] == 0]
                steps = [record["step"] for record in run["curve"]]
                values = [record[metric] for record in run["curve"]]
                axes.plot(steps, values, ".-", color=color, label=method, linewidth=1.2)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label)
        grid[0][column].set_title(f"fine-tuned on: {name}", fontsize=9)
    figure.supxlabel("optimizer step, validation problems, first seed", fontsize=9)
    add_legend(figure)
    return figure
