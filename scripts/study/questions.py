"""Measure what docs/questions.md answers: how DFT's loss behaves, with all weights and with LoRA.

    python scripts/study/questions.py runs/questions --gsm8k GSM8K          # 5 minutes on one core
    python scripts/study/questions.py runs/quick --gsm8k GSM8K --quick      # 10 seconds, to test the script

GSM8K is a folder with train.chatml.jsonl and test.chatml.jsonl. A model of 0.9 million weights learns from it
by SFT, which makes the base model; from there it is trained by SFT and by DFT, with all weights and with
LoRA. The tokens of held-out answers are scored under all of these models.

The script writes questions.json, table.md and loss.png. It reuses the results that are in the folder already.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dft.data.batches.dataset import Sequences
from dft.data.preparing.prepare import DATA_REPORT
from dft.errors import UserError, report_user_errors
from dft.evaluation.sampling import load_for_sampling
from dft.loss.dft import dft_loss
from dft.ranks import quiet_libraries
from scripts.study.questions_results import EDGES, LORA_R, METHODS, loss_figure, tables
from scripts.study.study_results import write_results
from scripts.study.study_runs import claim_folder, prepare, run_script

CURVE = ("loss", "nll", "objective", "avg_p_correct", "acc", "entropy")
"""Evaluation metrics of the curves."""


class Size(NamedTuple):
    """The amount of data and training. Its fields are keys of questions.json.

    Attributes:
        rows: conversations to train on; None for all.
        held_out: conversations to score.
        steps: optimizer steps from the base model.
        interval: steps from one evaluation to the next.
        base_rate: learning rate of the base model.
        rates: those of the runs from there, by the weights that they train.
    """

    rows: int | None
    held_out: int
    steps: int
    interval: int
    base_rate: float
    rates: dict[str, float]


FULL = Size(None, 150, 60, 12, 3e-3, {"all": 1e-3, "LoRA": 1e-2})
QUICK = FULL._replace(rows=64, held_out=8, steps=2, interval=1)


def token_nll(model: Path, rows: Iterable[Mapping[str, np.ndarray]]) -> Tensor:
    """Return the nll of all supervised tokens under a model, (tokens,) float32.

    Args:
        model: folder of the model.
        rows: sequences with `input_ids` and `labels`, (tokens,) each.
    """
    scorer = load_for_sampling(str(model), "float32", False, "cpu").eval()
    nll = []
    with torch.inference_mode():
        for row in rows:
            ids, labels = (torch.tensor(row[name]).long()[None] for name in ("input_ids", "labels"))
            nll.append(dft_loss(scorer(input_ids=ids).logits, labels)[1].nll)
    return torch.cat(nll)


def read_held_out(run: Path) -> Sequences:
    """Return the sequences on which a run was evaluated."""
    prepared = Path(json.loads((run / DATA_REPORT).read_text())["prepared_path"])
    return Sequences(prepared / "eval.arrow", np.load(prepared / "eval.order.npy"))


def describe(nll: Tensor) -> dict[str, float]:
    """Return the losses and the mean probability of tokens, and the share of unlikely and certain ones.

    Args:
        nll: (tokens,).
    """
    p = nll.neg().exp()
    return {
        "tokens": len(nll),
        "avg_p_correct": p.mean().item(),
        "nll": nll.mean().item(),
        "dft_loss": (p * nll).mean().item(),
        "below_0.05": (p < 0.05).float().mean().item(),
        "above_0.95": (p > 0.95).float().mean().item(),
    }


def changes(before: Tensor, after: Tensor) -> list[dict[str, float]]:
    """Return what training did to tokens, grouped by their probability before, between neighboring `EDGES`.

    Args:
        before: (tokens,) nll before training.
        after: (tokens,) nll of the same tokens after training.
    """
    group = torch.bucketize(before.neg().exp(), torch.tensor(EDGES[1:-1]), right=True)
    result = []
    for number in range(len(EDGES) - 1):
        old, new = before[group == number], after[group == number]
        result.append(
            {
                "share": len(old) / len(before),
                "nll_before": old.mean().item(),
                "nll_after": new.mean().item(),
                "p_after": new.neg().exp().mean().item(),
                "rose": (new > old).float().mean().item(),
            }
        )
    return result


class Comparison:
    """Trains on GSM8K and scores held-out tokens.

    Args:
        folder: output folder.
        gsm8k: folder of the data.
        size: amount of data and training.

    Raises:
        UserError: a file of the data is missing.
    """

    def __init__(self, folder: Path, gsm8k: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.train_file, self.test_file = (gsm8k / f"{name}.chatml.jsonl" for name in ("train", "test"))
        for file in (self.train_file, self.test_file):
            if not file.is_file():
                raise UserError(f"--gsm8k {gsm8k}: has no {file.name}; name the folder of GSM8K as chat")

    def train(self, model: Path, output: Path, alpha: float, rate: float, *more: object) -> None:
        """Train a model with train_dft.py, unless the output has a finished run."""
        if (output / "trainer_state.json").is_file():
            return
        print(f"training {output.name}", flush=True)
        rows = () if self.size.rows is None else ("--max_train_samples", self.size.rows)
        run_script(
            ROOT / "train_dft.py", "--model_name_or_path", model, "--data_files", self.train_file,
            "--eval_data_files", self.test_file, "--max_eval_samples", self.size.held_out, *rows,
            "--output_dir", output, "--dft_alpha", alpha, "--learning_rate", rate, "--max_length", 512,
            "--per_device_train_batch_size", 32, "--per_device_eval_batch_size", 32,
            "--group_by_length", True, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.05,
            "--weight_decay", 0.01, "--use_cpu", True, "--save_strategy", "no", "--report", False,
            "--verify_save", False, "--preprocessing_num_workers", 1, "--overwrite_output_dir", True,
            "--data_cache_dir", self.folder / "cache", "--logging_steps", 1, *more,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Return scores, changes by token, and curves."""
        untrained, base, size = self.folder / "model", self.folder / "base", self.size
        if not (untrained / "config.json").is_file():
            corpus = ("--corpus", self.train_file, "--vocab_size", 4096)
            run_script(ROOT / "scripts/make_example.py", self.folder, *corpus)
        self.train(untrained, base, 0.0, size.base_rate, "--num_train_epochs", 1)
        evaluation = ("--eval_strategy", "steps", "--eval_steps", size.interval, "--eval_on_start", True)
        runs = {
            f"{method}-{weights}": self.folder / f"{method}-{weights}"
            for weights in size.rates
            for method in METHODS
        }
        for name, output in runs.items():
            method, weights = name.split("-")
            more = ("--lora_r", LORA_R) if weights == "LoRA" else ()
            length = ("--max_steps", size.steps)
            self.train(base, output, METHODS[method], size.rates[weights], *length, *evaluation, *more)
        sequences = read_held_out(runs["DFT-all"])
        held_out = [sequences[row] for row in range(len(sequences))]
        models = {"random weights": untrained, "base": base, **runs}
        nll = {name: token_nll(model, held_out) for name, model in models.items()}
        logs = {name: read_log(run) for name, run in runs.items()}
        return {
            "scores": {name: describe(values) for name, values in nll.items()},
            "changes": {name: changes(nll["base"], nll[name]) for name in runs},
            "curves": {name: curve(records) for name, records in logs.items()},
            "grad_norm": {
                name: fmean(record["grad_norm"] for record in records if "grad_norm" in record)
                for name, records in logs.items()
            },
        }


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the logged records of a run."""
    records: list[dict[str, Any]] = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return records


def curve(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the step and the metrics of each evaluation."""
    return [
        {"step": record["step"], **{name: record[f"eval_{name}"] for name in CURVE}}
        for record in records
        if "eval_nll" in record
    ]


def measure(folder: Path, gsm8k: Path, size: Size) -> dict[str, Any]:
    """Run everything, and return the content of questions.json."""
    with claim_folder(folder, size._asdict()):
        return {"size": size._asdict(), **Comparison(folder, gsm8k, size).run()}


def main() -> None:
    report_user_errors()
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of GSM8K as chat")
    parser.add_argument("--quick", action="store_true", help="almost no data, to test the script")
    options = parser.parse_args()
    quiet_libraries()
    results = measure(options.folder, options.gsm8k, QUICK if options.quick else FULL)
    write_results(results, options.folder, "questions", tables(results), {"loss": loss_figure(results)})
    if options.quick:
        print("--quick: these figures only show that every step ran")


if __name__ == "__main__":
    main()
