"""What it costs to watch a run: tokens per second with everything logged, over those with nothing.

    python scripts/bench/bench_logging.py --corpus GSM8K/train.chatml.jsonl [--rounds 10] [--logging_steps 1]

off: no line of a log, no tracker, and no sums either: what counts tokens and looks out for what is not
     finite does nothing.
on:  all metrics every `--logging_steps`, to the console, TensorBoard, wandb and SwanLab (offline) at once.

The model and the batches are those of bench_train.py, on a CPU with the small vocabulary; a tracker that is
not installed is left out. The two take turns in one process; the first steps of each turn do not count, nor
do evaluation and the report, which take their time outside of the steps.
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

from bench_train import BATCH, CONVERSATIONS, ON_GPU, VOCABULARIES, callback, make_model, prepared

WARM_UP, STEPS = 2, 20
TRACKERS = [name for name in ("tensorboard", "wandb", "swanlab") if importlib.util.find_spec(name)]


class Steps:
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def seconds(self) -> float:
        """Of the steps that count, with the log lines between them."""
        return self.ends[-1] - self.ends[WARM_UP - 1]


def train(folder: Path, dataset: Any, logging_steps: int | None) -> float:
    """Seconds of `STEPS` steps; the same batches each time."""
    from transformers import TrainingArguments

    from dft import DFTTrainer

    how = {"logging_strategy": "no"} if logging_steps is None else {"logging_steps": logging_steps}
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=not ON_GPU, learning_rate=1e-4,
        per_device_train_batch_size=BATCH["unpacked"], max_steps=WARM_UP + STEPS, save_strategy="no",
        disable_tqdm=True, logging_nan_inf_filter=False,
        report_to=[] if logging_steps is None else TRACKERS, **how,
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
def uncounted() -> Iterator[None]:
    """Takes out of the trainer what counts and watches."""
    from dft.training.measuring.meter import TokenMeter
    from dft.training.measuring.nonfinite import StepWatch

    with (
        patch.object(TokenMeter, "update", lambda *_args, **_kwargs: None),
        patch.object(StepWatch, "add", lambda *_args, **_kwargs: None),
        patch("dft.training.measuring.measured.is_finite", lambda _norm: True),
        patch("dft.training.measuring.measured.passing_on_nonfinite", lambda loss: loss),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="ChatML .jsonl")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--logging_steps", type=int, default=1)
    wanted = parser.parse_args()
    from make_example import read_conversations, train_tokenizer

    with tempfile.TemporaryDirectory(prefix="bench-logging-") as name:
        folder = Path(name)
        os.environ.update(WANDB_MODE="offline", SWANLAB_MODE="offline", WANDB_SILENT="true")
        for variable in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
            os.environ[variable] = name
        train_tokenizer(read_conversations(wanted.corpus), VOCABULARIES[0]).save_pretrained(
            folder / "tokenizer"
        )
        with open(wanted.corpus, "rb") as lines, open(folder / "data.jsonl", "wb") as stream:
            stream.writelines(islice(lines, CONVERSATIONS))
        dataset = prepared(folder, packed=False)
        times: dict[str, list[float]] = {"off": [], "on": []}
        for number in range(-1, wanted.rounds):  # the first turn of each begins the trackers
            with uncounted():
                off = train(folder, dataset, None)
            on = train(folder, dataset, wanted.logging_steps)
            if number >= 0:
                times["off"].append(off)
                times["on"].append(on)
                print(f"round {number + 1}: off / on {off / on:.3f}", file=sys.stderr)
        ratios = [off / on for off, on in zip(times["off"], times["on"], strict=True)]
        print(
            f"every {wanted.logging_steps} steps: on / off {statistics.median(ratios):.3f} of the tokens per "
            f"second (median of {len(ratios)}; {min(ratios):.3f} to {max(ratios):.3f}); a step takes "
            f"{1000 * statistics.median(times['off']) / STEPS:.0f} ms"
        )


if __name__ == "__main__":
    main()
