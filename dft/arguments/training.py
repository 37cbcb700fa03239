"""Command-line flags of `transformers.TrainingArguments`, with different defaults and additional flags."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import transformers
from transformers.training_args import OptimizerNames
from transformers.utils import ExplicitEnum

from dft.arguments.batch_search import BATCH_FILE, load_batch
from dft.arguments.deepspeed_file import deepspeed_flag, read_deepspeed
from dft.bounds import Bounds, check_bounds
from dft.errors import UserError
from dft.metrics import LOWER, selection
from dft.program import launch_command
from dft.ranks import (
    choose_deepspeed_accelerator,
    divide_cores,
    enable_cpu_sharding,
    init_cpu_deepspeed,
    is_launched,
    mute_deepspeed,
)

INHERITED_BOUNDS = {
    "per_device_train_batch_size": Bounds(above=0, maximum=10**6),
    "per_device_eval_batch_size": Bounds(above=0, maximum=10**6),
    "gradient_accumulation_steps": Bounds(above=0, maximum=10**6),
    "num_train_epochs": Bounds(above=0, maximum=10**6),
    "max_steps": Bounds(minimum=-1, maximum=10**9),
    "learning_rate": Bounds(minimum=0, maximum=1000),
    "weight_decay": Bounds(minimum=0),
    "max_grad_norm": Bounds(minimum=0),
    "warmup_steps": Bounds(minimum=0),
    "save_steps": Bounds(minimum=0),
    "eval_steps": Bounds(minimum=0),
    "save_total_limit": Bounds(above=0),
    "dataloader_num_workers": Bounds(minimum=0, maximum=1024),
    "dataloader_prefetch_factor": Bounds(above=0, maximum=10**6),
    "seed": Bounds(minimum=0, below=2**32),
    "data_seed": Bounds(minimum=0, below=2**32),
}
"""Valid ranges of the flags that transformers declares."""


class OwnOptimizer(ExplicitEnum):
    """Values of --optim that transformers does not have."""

    MUON = "muon"


def optimizer_name(args: transformers.TrainingArguments) -> str:
    """Return the value of --optim: the name of an optimizer of transformers, or of `OwnOptimizer`."""
    return args.optim.value


LOW_RANK = ("galore", "apollo")
"""Parts of the names of optimizers that project weight matrices."""


def needs_whole_matrices(args: transformers.TrainingArguments) -> bool:
    """Return whether the optimizer computes with rows and columns of whole matrices, not with shards."""
    name = optimizer_name(args)
    has_matrices = name in (OwnOptimizer.MUON, OptimizerNames.ADAFACTOR)
    return has_matrices or any(kind in name for kind in LOW_RANK)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments with new defaults, additional flags and names of older releases.

    Attributes:
        notes: messages about values that were derived or have no effect.
        requested_batch: batch size per device and accumulation steps of the command line, with
            `--auto_find_batch_size True`.
    """

    _argument_group_name: ClassVar[str] = "training (transformers.TrainingArguments)"

    # Checking every micro-batch for NaN would synchronize with the device each time and hide the cause.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave non-finite losses out of the logged mean."}
    )
    metric_for_best_model: str | None = field(
        default="eval_acc",
        metadata={"help": "Metric that determines the best checkpoint, which is never rotated away."},
    )
    optim: str = field(
        default=OptimizerNames.ADAMW_TORCH_FUSED.value,
        metadata={
            "help": "Optimizer: one of transformers.training_args.OptimizerNames, or muon, which trains the "
            "matrices of the hidden layers, and everything else with AdamW."
        },
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "Trackers: one or several of swanlab, wandb, tensorboard, mlflow, trackio and the others "
            "that transformers knows; all, or none."
        },
    )
    warmup_ratio: Annotated[float | None, Bounds(minimum=0, below=1)] = field(
        default=None,
        metadata={"help": "Fraction of the steps used for warmup; the same as --warmup_steps below 1."},
    )
    logging_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the local files of SwanLab, wandb, TensorBoard, mlflow and trackio."},
    )
    logging_steps: Annotated[float, Bounds(minimum=0)] = field(
        default=10,
        metadata={"help": "Log the metrics every this many steps; below 1, a fraction of the run."},
    )
    sequence_parallel_size: Annotated[int, Bounds(minimum=1)] = field(
        default=1,
        metadata={
            "help": "Number of ranks that share each sequence (DeepSpeed Ulysses), for sequences too long "
            "for one device."
        },
    )
    group_by_length: bool = field(
        default=False,
        metadata={
            "help": "Batch sequences of similar length; the same as --train_sampling_strategy "
            "group_by_length."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from: a folder; auto, the newest complete checkpoint of the "
            "output folder if there is one; or True, which fails if there is none."
        },
    )
    auto_find_batch_size: bool = field(
        default=False,
        metadata={
            "help": "After running out of memory, resume with a smaller batch and more gradient "
            "accumulation, with the same number of rows per optimizer step."
        },
    )
    early_stopping_patience: Annotated[int | None, Bounds(above=0)] = field(
        default=None,
        metadata={
            "help": "End the run after this many evaluations in a row without a better value of "
            "--metric_for_best_model. Default: train to the end."
        },
    )
    early_stopping_threshold: Annotated[float, Bounds(minimum=0)] = field(
        default=0.0,
        metadata={"help": "A value is better for --early_stopping_patience if it differs by more than this."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Allow resuming from a checkpoint that other users own or can write to. Loading a "
            "checkpoint can run code."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start a new run in an output folder that already holds checkpoints."},
    )
    ema_decay: Annotated[float | None, Bounds(above=0, below=1)] = field(
        default=None,
        metadata={
            "help": "Average the weights exponentially over the optimizer steps, with this factor for the "
            "previous average, such as 0.999. Evaluations and the final model use the average. Default: none."
        },
    )
    save_safetensors: bool | None = field(
        default=None, metadata={"help": "No effect: weights are always saved as safetensors."}
    )
    reduce_logging: bool | None = field(
        default=None, metadata={"help": "No effect: rank 0 logs metrics that are reduced over all ranks."}
    )
    log_metrics_steps: int | None = field(
        default=None, metadata={"help": "No effect: all metrics are logged every --logging_steps."}
    )

    # mypy does not read transformers and does not know its fields, so the methods annotate `self` as Any.
    def __post_init__(self: Any) -> None:
        check_bounds(self, INHERITED_BOUNDS)
        self.notes: list[str] = []
        self.requested_batch: tuple[int, int] | None = None
        if self.auto_find_batch_size:
            self._use_stored_batch()
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
            self.disable_tqdm = not sys.stderr.isatty()  # no progress bars in log files
        if self.deepspeed:
            read_deepspeed(self.deepspeed)
            if not is_launched():
                raise UserError(
                    f"{deepspeed_flag(self.deepspeed)}: DeepSpeed needs a launcher, even for a single rank; "
                    f"start the run with `{launch_command('deepspeed')} ...`"
                )
            mute_deepspeed()
            if self.use_cpu:
                init_cpu_deepspeed()
        # transformers expects the bare flag; accept True and False as for all other flags.
        self.fsdp = {"true": True, "false": None}.get(str(self.fsdp).lower(), self.fsdp)
        self._copy_without_waiting()
        own = self.optim if self.optim in [*OwnOptimizer] else None
        self.optim = OptimizerNames.ADAMW_TORCH if own else self.optim  # transformers does not know the name
        super().__post_init__()
        if own:
            self.optim = OwnOptimizer(own)
        if self.fsdp and self.use_cpu:
            enable_cpu_sharding()

    def _copy_without_waiting(self: Any) -> None:
        """Copy batches to a GPU while it computes, unless `--accelerator_config` is set.

        Otherwise each copy waits until the GPU has nothing to do.
        """
        if self.accelerator_config is None and self.dataloader_pin_memory and not self.use_cpu:
            self.accelerator_config = {"non_blocking": True}

    def _use_stored_batch(self: Any) -> None:
        """Use the batch size that an earlier attempt of the same command stored, if there is one.

        The batch size search of transformers' Trainer is disabled: it restarts with weights that are already
        trained, and it changes the number of rows per optimizer step.
        """
        self.auto_find_batch_size = False
        batch, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        self.requested_batch = (batch, accumulation)
        stored = load_batch(self.output_dir, self.requested_batch)
        if stored is not None:
            self.per_device_train_batch_size, self.gradient_accumulation_steps = stored
            self.notes.append(
                f"--auto_find_batch_size True: using batch size {stored[0]} with {stored[1]} accumulation "
                f"steps instead of {batch} with {accumulation}, which ran out of memory (remove {BATCH_FILE} "
                "from the output folder to try again)"
            )

    def _map_older_names(self: Any) -> None:
        """Map flags of older releases to their replacements and note flags without effect."""
        if self.warmup_ratio is not None:
            if self.warmup_steps:
                raise UserError(
                    f"--warmup_ratio {self.warmup_ratio:g} and --warmup_steps {self.warmup_steps:g} both set "
                    "the warmup; remove one of them"
                )
            self.warmup_steps = self.warmup_ratio
        if self.group_by_length:
            if self.train_sampling_strategy not in ("random", "group_by_length"):
                raise UserError(
                    f"--group_by_length True and --train_sampling_strategy {self.train_sampling_strategy} "
                    "contradict each other; remove one of them"
                )
            self.train_sampling_strategy = "group_by_length"
        for name, value, reason in (
            ("save_safetensors", self.save_safetensors, "weights are always saved as safetensors"),
            ("reduce_logging", self.reduce_logging, "rank 0 logs metrics that are reduced over all ranks"),
            (
                "log_metrics_steps",
                self.log_metrics_steps,
                f"all metrics are logged every --logging_steps ({self.logging_steps:g})",
            ),
        ):
            if value is not None:
                self.notes.append(f"--{name} {value} has no effect: {reason}")
