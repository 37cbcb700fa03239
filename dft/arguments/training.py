"""Command-line flags of `transformers.TrainingArguments`, with other defaults."""

import sys
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import transformers

from dft.arguments.batch_search import FOUND, found_batch
from dft.arguments.deepspeed_file import read_deepspeed
from dft.errors import UserError
from dft.metrics import LOWER, selection
from dft.ranks import (
    choose_deepspeed_accelerator,
    divide_cores,
    enable_cpu_sharding,
    init_cpu_deepspeed,
    is_launched,
    mute_deepspeed,
)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, with defaults that fit, and names of older releases mapped or explained."""

    _argument_group_name: ClassVar[str] = "training (transformers.TrainingArguments)"

    # A test for NaN on every micro-batch would wait for the device each time, and hide what went wrong.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave non-finite losses out of the logged mean."}
    )
    metric_for_best_model: str | None = field(
        default="eval_acc",
        metadata={"help": "Decides which checkpoint is the best and is never rotated away."},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Trackers, several at once: swanlab, wandb, tensorboard, ...; all, or none."},
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the steps that warm up; the same as --warmup_steps below 1."},
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Where SwanLab, wandb and TensorBoard write their local files."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log the metrics every so many steps; below 1, a share of the run."}
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each sequence (DeepSpeed Ulysses), for sequences too long for one."
        },
    )
    group_by_length: bool = field(
        default=False,
        metadata={"help": "Batches of similar length; --train_sampling_strategy group_by_length."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "auto: go on from the newest complete checkpoint of the output directory, or begin where "
            "there is none. True insists on one. Or the folder of a checkpoint."
        },
    )
    auto_find_batch_size: bool = field(
        default=False,
        metadata={"help": "Out of memory, go on with smaller batches, accumulated to as many rows per step."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint that others own or may write to: it can run code."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start afresh in an output directory that already holds checkpoints."},
    )
    save_safetensors: bool | None = field(
        default=None, metadata={"help": "No effect: weights are safetensors."}
    )
    reduce_logging: bool | None = field(default=None, metadata={"help": "No effect: only rank 0 logs."})
    log_metrics_steps: int | None = field(
        default=None, metadata={"help": "No effect: all metrics come with every --logging_steps."}
    )

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.asked_batch: tuple[int, int] | None = None
        if self.auto_find_batch_size:
            self._take_found_batch()
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True
            self.notes.append("no accelerator found: running on CPU")
        if self.use_cpu:
            choose_deepspeed_accelerator("cpu")
            divide_cores()
        self._map_older_names()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            metric = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = selection(metric) != LOWER
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a bar in a log file is noise
        if self.deepspeed:
            read_deepspeed(self.deepspeed)
            if not is_launched():
                raise UserError(
                    f"--deepspeed {self.deepspeed}: DeepSpeed learns of its ranks from a launcher, also when "
                    "there is one only; start with `deepspeed train_dft.py ...` in place of python"
                )
            mute_deepspeed()
            if self.use_cpu:
                init_cpu_deepspeed()
        # transformers takes the bare flag; True and False are how all other flags are given.
        self.fsdp = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        super().__post_init__()
        if self.fsdp and self.use_cpu:
            enable_cpu_sharding()

    def _take_found_batch(self) -> None:
        """A batch and an accumulation that an earlier attempt found to fit, in place of those asked for.

        Trainer's own search begins anew with weights that are trained already, and makes the steps smaller.
        """
        self.auto_find_batch_size = False
        batch, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self.asked_batch = (batch, accumulation)
        found = found_batch(self.output_dir, self.asked_batch)
        if found is not None:
            self.per_device_train_batch_size, self.gradient_accumulation_steps = found
            self.notes.append(
                f"--auto_find_batch_size True: {found[0]} rows per device and {found[1]} accumulated, in "
                f"place of {batch} and {accumulation}, for which there was too little memory (remove "
                f"{FOUND} from the output directory to try again)"
            )

    def _map_older_names(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps:
                raise UserError(
                    f"--warmup_ratio {self.warmup_ratio:g} and --warmup_steps {self.warmup_steps:g} both set "
                    "the warm-up; give one"
                )
            if not 0 <= self.warmup_ratio < 1:
                raise UserError(f"--warmup_ratio {self.warmup_ratio:g}: must be at least 0 and below 1")
            self.warmup_steps = self.warmup_ratio
        if self.group_by_length:
            if self.train_sampling_strategy not in ("random", "group_by_length"):
                raise UserError(
                    f"--group_by_length True and --train_sampling_strategy {self.train_sampling_strategy} "
                    "contradict each other; give one"
                )
            self.train_sampling_strategy = "group_by_length"
        for name, value, why in (
            ("save_safetensors", self.save_safetensors, "weights are always saved as safetensors"),
            ("reduce_logging", self.reduce_logging, "only rank 0 logs, with values reduced over all ranks"),
            (
                "log_metrics_steps",
                self.log_metrics_steps,
                f"all metrics come with every --logging_steps ({self.logging_steps:g})",
            ),
        ):
            if value is not None:
                self.notes.append(f"--{name} {value} has no effect: {why}")
