"""SFT against DFT on a task small enough for a laptop: sums worked out step by step.

    python scripts/study.py runs/study              # about 20 minutes on two cores
    python scripts/study.py runs/study --quick      # two minutes, to see that it works; no figures

A base model learns sums of two to five numbers, well enough to be often right. From there it is fine-tuned on
sums of three by SFT, DFT and alpha between them, on right answers and on data of which three in ten hold a
wrong one, and is asked sums of three (in distribution) and of five (lengths that fine-tuning has not shown).
Answers are drawn at temperature 1 and graded by what follows `####`. The learning rate of each method is the
best of four on sums of its own, before the comparison. Seeds draw other data and another order each.

Writes study.json, table.md, accuracy.png and histograms.png. What is there already is not made again.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from make_example import train_tokenizer

from dft.report.images import write_png

ALPHAS = {"SFT": 0.0, "alpha 0.5": 0.5, "DFT": 1.0}
DATA = {"right": 0.0, "3 in 10 wrong": 0.3}
"""Share of the conversations whose chain has a wrong step."""
SETS = {"three": 3, "five": 5}
"""Numbers to add in the sums that are asked."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student's distribution, by seeds: 95 % within."""
BINS = 20


class Size(NamedTuple):
    """How much of everything."""

    pretraining: int
    tuning: int
    asked: int
    samples: int
    seeds: int
    rates: tuple[float, ...]


FULL = Size(24_000, 1_600, 200, 8, 5, (3e-5, 1e-4, 3e-4, 1e-3))
QUICK = Size(160, 32, 4, 2, 2, (1e-3,))


class Run(NamedTuple):
    """A fine-tuning."""

    method: str
    data: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.method}-{self.data}-{self.seed}-{self.rate:g}".replace(" ", "_")


# ---- the task ----


def chain(numbers: Sequence[int], wrong_step: int | None = None, slip: int = 0) -> str:
    """A sum worked out from left to right. A wrong step is off by `slip`, and the rest goes on from it."""
    total, lines = numbers[0], []
    for step, number in enumerate(numbers[1:]):
        result = total + number + (slip if step == wrong_step else 0)
        lines.append(f"{total}+{number}={result}")
        total = result
    return "\n".join([*lines, f"#### {total}"])


def conversation(generator: random.Random, count: int, wrong: float = 0.0) -> dict[str, Any]:
    """A sum of so many numbers with two digits, and its chain, wrong with some probability."""
    numbers = [generator.randint(10, 99) for _ in range(count)]
    step, slip = None, 0
    if generator.random() < wrong:
        step, slip = generator.randrange(count - 1), generator.choice([-10, -2, -1, 1, 2, 10])
    question = "+".join(map(str, numbers))
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": chain(numbers, step, slip)},
        ]
    }


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path, size: Size) -> None:
    """All data of the study, the same each time."""
    pretraining = random.Random("pretraining")
    write(
        folder / "pretraining.jsonl",
        (conversation(pretraining, pretraining.randint(2, 5)) for _ in range(size.pretraining)),
    )
    for name, count in SETS.items():
        asked = random.Random(f"asked {name}")
        write(folder / f"{name}.jsonl", (conversation(asked, count) for _ in range(size.asked)))
    chosen = random.Random("validation")
    write(folder / "validation.jsonl", (conversation(chosen, 3) for _ in range(size.asked)))
    for (data, wrong), seed in product(DATA.items(), range(-1, size.seeds)):
        tuning = random.Random(f"tuning {data} {seed}")
        write(
            folder / f"{tuning_file(data, seed)}",
            (conversation(tuning, 3, wrong) for _ in range(size.tuning)),
        )


def tuning_file(data: str, seed: int) -> str:
    return f"tuning-{data}-{seed}.jsonl".replace(" ", "_")


def write_model(folder: Path, data: Path) -> None:
    """An untrained model of 0.9 million weights, and a tokenizer of single characters."""
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()[:200]]
    tokenizer = train_tokenizer(rows, vocab_size=260)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- training and asking, as a user would ----


def command(*words: object) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def train(model: Path, data: Path, output: Path, alpha: float, rate: float, seed: int, *more: object) -> None:
    if (output / "trainer_state.json").is_file():
        return
    command(
        ROOT / "train_dft.py", "--model_name_or_path", model, "--data_files", data, "--output_dir", output,
        "--dft_alpha", alpha, "--learning_rate", rate, "--seed", seed, "--lr_scheduler_type", "cosine",
        "--warmup_ratio", 0.1, "--per_device_train_batch_size", 32, "--max_length", 128, "--use_cpu", True,
        "--num_train_epochs", 1, "--save_strategy", "no", "--report", False, "--logging_steps", 25,
        "--overwrite_output_dir", True, "--preprocessing_num_workers", 1,
        "--data_cache_dir", data.parent / "cache",
        "--verify_save", False, *more,
    )  # fmt: skip


def ask(
    models: Mapping[str, Path], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, float]]:
    """avg@n of each model on each file, in percent."""
    if models:
        command(
            ROOT / "scripts/evaluate.py", "--model", *(f"{name}={path}" for name, path in models.items()),
            "--data", *files, "--output", output, "--samples", size.samples, "--temperature", 1.0,
            "--max_new_tokens", 64, "--batch_size", 400, "--grader", "hash",
        )  # fmt: skip
    found = json.loads((output / "results.json").read_text())["models"] if models else []
    return {one["name"]: {file["file"]: 100 * file["avg"]["value"] for file in one["files"]} for one in found}


def halves(
    pool: ThreadPoolExecutor, models: dict[str, Path], files: Sequence[Path], output: Path, size: Size
) -> dict[str, dict[str, float]]:
    """`ask`, in two processes."""
    names = list(models)
    parts = [{name: models[name] for name in names[part::2]} for part in range(2)]
    tasks = [
        pool.submit(ask, one, files, Path(f"{output}-{number}"), size) for number, one in enumerate(parts)
    ]
    return {name: values for task in tasks for name, values in task.result().items()}


def study(folder: Path, size: Size) -> dict[str, Any]:
    """Everything, from the data to the numbers."""
    data, runs = folder / "data", folder / "runs"
    write_data(data, size)
    if not (folder / "untrained/config.json").is_file():
        write_model(folder / "untrained", data / "pretraining.jsonl")
    print("the base model", flush=True)
    base = folder / "base"
    train(folder / "untrained", data / "pretraining.jsonl", base, 0.0, 3e-3, 0)
    held_out = (
        "--eval_data_files",
        data / "three.jsonl",
        "--eval_strategy",
        "epoch",
        "--eval_on_start",
        True,
    )

    def tune(run: Run) -> None:
        train(
            base,
            data / tuning_file(run.data, run.seed),
            runs / run.name,
            ALPHAS[run.method],
            run.rate,
            run.seed + 1,
            *held_out,
        )

    with ThreadPoolExecutor(2) as pool:
        print("the learning rate of each method", flush=True)
        tried = [Run(method, "right", -1, rate) for method, rate in product(ALPHAS, size.rates)]
        list(pool.map(tune, tried))
        found = halves(
            pool,
            {run.name: runs / run.name for run in tried},
            [data / "validation.jsonl"],
            folder / "asked-rates",
            size,
        )
        rates = {run: found[run.name]["validation"] for run in tried}
        best = {
            method: max((run for run in tried if run.method == method), key=rates.__getitem__).rate
            for method in ALPHAS
        }
        print("the comparison", flush=True)
        compared = [
            Run(method, kind, seed, best[method])
            for method, kind, seed in product(ALPHAS, DATA, range(size.seeds))
        ]
        list(pool.map(tune, compared))
        files = [data / f"{name}.jsonl" for name in SETS]
        models = {"base": base, **{run.name: runs / run.name for run in compared}}
        right = halves(pool, models, files, folder / "asked", size)
    tried_rates = [{"method": one.method, "rate": one.rate, "accuracy": rates[one]} for one in tried]
    return {
        "size": size._asdict(),
        "rates": tried_rates,
        "base": {**right["base"], "histogram": histograms(runs / compared[0].name)[0]},
        "runs": [
            {
                "method": run.method, "data": run.data, "seed": run.seed, "rate": run.rate,
                **right[run.name], "histogram": histograms(runs / run.name)[-1],
            }
            for run in compared
        ],
    }  # fmt: skip


def histograms(run: Path) -> list[list[int]]:
    """Tokens of the held-out sums by p, before and after fine-tuning."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [one["eval_p_histogram"] for one in log if "eval_p_histogram" in one]


# ---- what came of it ----


class Mean(NamedTuple):
    """Over seeds; half the 95 % interval by Student's distribution."""

    value: float
    half: float


def mean(values: Sequence[float]) -> Mean:
    spread = stdev(values) / math.sqrt(len(values)) * T_95[len(values)] if len(values) > 1 else math.nan
    return Mean(fmean(values), spread)


def accuracy(found: Mapping[str, Any], method: str, data: str, asked: str) -> Mean:
    return mean([one[asked] for one in found["runs"] if (one["method"], one["data"]) == (method, data)])


def tables(found: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    seeds = found["size"]["seeds"]
    heads = [f"{data}: {asked}" for data, asked in product(DATA, SETS)]
    lines = [f"| fine-tuned on, asked sums of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    base = [f"{found['base'][asked]:.1f}" for _, asked in product(DATA, SETS)]
    lines.append(f"| base | {' | '.join(base)} |")
    for method in ALPHAS:
        cells = [accuracy(found, method, data, asked) for data, asked in product(DATA, SETS)]
        lines.append(f"| {method} | {' | '.join(f'{one.value:.1f} ± {one.half:.1f}' for one in cells)} |")
    lines += ["", f"Percent right, mean of {seeds} seeds ± half of its 95 % interval.", ""]
    lines += ["| tokens of right answers with | p < 0.05 | 0.05 to 0.95 | p >= 0.95 |", "|---|---|---|---|"]
    shares = {"base": [found["base"]["histogram"]]}
    for method, data in product(ALPHAS, DATA):
        shares[f"{method}, {data}"] = [
            one["histogram"] for one in found["runs"] if (one["method"], one["data"]) == (method, data)
        ]
    for name, some in shares.items():
        total = [sum(column) for column in zip(*some, strict=True)]
        parts = (total[0], sum(total[1:-1]), total[-1])
        lines.append(f"| {name} | {' | '.join(f'{100 * one / sum(total):.2f} %' for one in parts)} |")
    lines += ["", "| learning rate | " + " | ".join(ALPHAS) + " |", "|---" * (len(ALPHAS) + 1) + "|"]
    for rate in dict.fromkeys(one["rate"] for one in found["rates"]):
        cells = [one["accuracy"] for one in found["rates"] if one["rate"] == rate]
        lines.append(f"| {rate:g} | {' | '.join(f'{one:.1f}' for one in cells)} |")
    return "\n".join([*lines, "", "Percent right on sums of three for choosing, one seed.", ""])


COLORS = {"SFT": "#d55e00", "alpha 0.5": "#009e73", "DFT": "#0072b2", "base": "#8a8a8a"}


def accuracy_figure(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, asked in zip(figure.subplots(1, len(SETS), sharey=True), SETS, strict=True):
        for number, method in enumerate(ALPHAS):
            cells = [accuracy(found, method, data, asked) for data in DATA]
            places = [place + 0.26 * (number - 1) for place in range(len(DATA))]
            axes.bar(places, [one.value for one in cells], 0.24, color=COLORS[method], label=method)
            axes.errorbar(
                places,
                [one.value for one in cells],
                [one.half for one in cells],
                fmt="none",
                ecolor="#1c1c1c",
                capsize=3,
            )
            for place, data in zip(places, DATA, strict=True):
                dots = [one[asked] for one in found["runs"] if (one["method"], one["data"]) == (method, data)]
                axes.plot([place] * len(dots), dots, ".", color="#1c1c1c", markersize=3)
        axes.axhline(found["base"][asked], color=COLORS["base"], linestyle="--", label="base")
        axes.set_xticks(range(len(DATA)), [f"trained on: {data}" for data in DATA])
        axes.set_title(
            f"sums of {asked}" + (" (longer than fine-tuned on)" if asked == "five" else ""), fontsize=10
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("answers right, %")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def histogram_figure(found: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    edges = [index / BINS for index in range(BINS + 1)]
    for axes, data in zip(figure.subplots(1, len(DATA), sharey=True), DATA, strict=True):
        shown = {"base": [found["base"]["histogram"]]}
        for method in ALPHAS:
            shown[method] = [
                one["histogram"] for one in found["runs"] if (one["method"], one["data"]) == (method, data)
            ]
        for name, some in shown.items():
            total = [sum(column) for column in zip(*some, strict=True)]
            axes.stairs(
                [one / sum(total) for one in total], edges, color=COLORS[name], label=name, linewidth=1.6
            )
        axes.set_yscale("log")
        axes.set_title(f"fine-tuned on: {data}", fontsize=10)
        axes.set_xlabel("p of the right token, sums of three")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of tokens")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="next to no data, to see that it works")
    given = parser.parse_args()
    found = study(given.folder, QUICK if given.quick else FULL)
    (given.folder / "study.json").write_text(json.dumps(found) + "\n")
    (given.folder / "table.md").write_text(tables(found))
    write_png(accuracy_figure(found), given.folder / "accuracy.png")
    write_png(histogram_figure(found), given.folder / "histograms.png")
    print(tables(found))


if __name__ == "__main__":
    main()
