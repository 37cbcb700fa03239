"""Measure the cost of logging: tokens per second with all metrics logged, relative to none.

    python scripts/bench/bench_logging.py --corpus GSM8K/train.chatml.jsonl [--rounds 10] [--logging_steps 1]

off: nothing is logged, there are no trackers, metrics are not summed and non-finite values are not detected.
on:  all metrics every `--logging_steps`, to the console, TensorBoard, wandb and SwanLab (offline) at once.

Model and batches are those of bench_train.py, on a CPU with the small vocabulary. Trackers that are not
installed are skipped. The two take turns in one process. The first steps of each turn are not measured;
evaluation and the report, which take place between steps, are not included.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_train import CONVERSATIONS, VOCABULARIES
from train_contenders import BATCH, ON_GPU, callback, make_model, prepare_dataset

WARM_UP, STEPS = 2, 20
TRACKERS = [name for name in ("tensorboard", "wandb", "swanlab") if importlib.util.find_spec(name)]


class Steps:
    """Records the time at which each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def seconds(self) -> float:
        """Return the duration of the measured steps, including the logging between them."""
        return self.ends[-1] - self.ends[WARM_UP - 1]


def train(folder: Path, dataset: Any, logging_steps: int | None) -> float:
    """Return the seconds of `STEPS` training steps, on the same batches in each call."""
    from transformers import TrainingArguments

    from dft import DFTTrainer

    logging = {"logging_strategy": "no"} if logging_steps is None else {"logging_steps": logging_steps}
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=not ON_GPU, learning_rate=1e-4,
        per_device_train_batch_size=BATCH["unpacked"], max_steps=WARM_UP + STEPS, save_strategy="no",
        disable_tqdm=True, logging_nan_inf_filter=False,
        report_to=[] if logging_steps is None else TRACKERS, **logging,
    )  # fmt: skip
    steps = Steps()
    trainer = DFTTrainer(
        make_model(folder, VOCABULARIES[ON_GPU]),
        arguments,
        train_dataset=dataset,
        callbacks=[callback(steps)],
    )
    trainer.train()
    return steps.seconds()


@contextmanager
def without_metrics() -> Iterator[None]:
    """Disable the trainer's metrics and its detection of non-finite values."""
    from dft.training.measuring.meter import TokenMeter
    from dft.training.measuring.nonfinite import NonfiniteGuard, StepWatch

    with (
        patch.object(TokenMeter, "update", lambda *_args, **_kwargs: None),
        patch.object(StepWatch, "add", lambda *_args, **_kwargs: None),
        patch.object(NonfiniteGuard, "handle_gradient", lambda *_args, **_kwargs: None),
        patch("dft.training.measuring.nonfinite.pass_on_nonfinite", lambda loss: loss),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="ChatML .jsonl")
    parser.add_argument("--rounds", type=int, default=10, help="number of turns of each")
    parser.add_argument("--logging_steps", type=int, default=1)
    arguments = parser.parse_args()
    from make_example import read_conversations, train_tokenizer

    with tempfile.TemporaryDirectory(prefix="bench-logging-") as name:
        folder = Path(name)
        os.environ.update(WANDB_MODE="offline", SWANLAB_MODE="offline", WANDB_SILENT="true")
        for variable in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
            os.environ[variable] = name
        train_tokenizer(read_conversations(arguments.corpus), VOCABULARIES[0]).save_pretrained(
            folder / "tokenizer"
        )
        with open(arguments.corpus, "rb") as lines, open(folder / "data.jsonl", "wb") as stream:
            stream.writelines(islice(lines, CONVERSATIONS))
        dataset = prepare_dataset(folder, packed=False)
        times: dict[str, list[float]] = {"off": [], "on": []}
        for number in range(-1, arguments.rounds):  # the first turn of each starts the trackers
            with without_metrics():
                off = train(folder, dataset, None)
            on = train(folder, dataset, arguments.logging_steps)
            if number >= 0:
                times["off"].append(off)
                times["on"].append(on)
                print(f"round {number + 1}: off / on {off / on:.3f}", file=sys.stderr)
        ratios = [off / on for off, on in zip(times["off"], times["on"], strict=True)]
        print(
            f"every {arguments.logging_steps} steps: on / off {statistics.median(ratios):.3f} of the tokens "
            f"per second (median of {len(ratios)}; {min(ratios):.3f} to {max(ratios):.3f}); a step takes "
            f"{1000 * statistics.median(times['off']) / STEPS:.0f} ms"
        )


if __name__ == "__main__":
    main()
