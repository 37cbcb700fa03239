"""Command line -> six dataclasses."""

import argparse
import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
import transformers
from transformers import HfArgumentParser

from dft.config_file import SECRETS, expand_config
from dft.data.arguments import DataArguments
from dft.deepspeed_file import read_deepspeed, zero_stage
from dft.errors import UserError
from dft.loss.objectives import OBJECTIVES
from dft.training.distributed import (
    choose_deepspeed_accelerator,
    init_cpu_deepspeed,
    is_launched,
    let_cpus_shard,
    mute_deepspeed,
    share_cores,
)
from dft.training.lora import LoraArguments
from dft.training.metrics import LOWER_IS_BETTER
from dft.training.oom import FOUND, found_batch
from dft.training.schedule import KINDS

DTYPES = ("float32", "bfloat16", "float16")

SECRET_FLAGS = [f"--{one}" for name in SECRETS for one in (name, name.replace("_", "-"))]
OF_THE_DEVICE = {"deepspeed": None, "tf32": None, "fsdp": None, "bf16": False, "fp16": False}
"""Flags on which no data depends and which a machine without a GPU may refuse, as --prepare_only has them."""


@dataclass
class ModelArguments:
    """Which model, and how it is held in memory."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model and its tokenizer."})
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the weights: float32, bfloat16, float16, or auto (as in the checkpoint). "
            "Default: under DeepSpeed the dtype it computes in (it keeps float32 master weights), else "
            "float32.",
            "choices": [*DTYPES, "auto"],
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "auto (flash_attention_2 where it can be imported on CUDA, else sdpa), "
            "flash_attention_2, sdpa, eager, or any name transformers knows."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model or its tokenizer."}
    )
    enable_gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass: slower, far less memory."},
    )


@dataclass
class DFTArguments:
    """The method."""

    _argument_group_name: ClassVar[str] = "DFT"

    dft_alpha: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a token: alpha * p + (1 - alpha). 1 is the paper's DFT, 0 is plain SFT."
        },
    )
    objective: str = field(
        default="dft",
        metadata={
            "help": "What a token weighs: dft, sft, power (p^k), threshold (1 where p >= q), eaft (entropy), "
            "asft (dft, held near the base model), chord (p (1 - p)).",
            "choices": list(OBJECTIVES),
        },
    )
    objective_args: str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the objective, as k=0.5: k of power, q of threshold, kl_weight of asft."
        },
    )
    dft_alpha_schedule: str = field(
        default="constant",
        metadata={
            "help": "How alpha comes to its value: constant, or rising from 0 (SFT) as linear or cosine.",
            "choices": list(KINDS),
        },
    )
    dft_alpha_schedule_share: float = field(
        default=0.5, metadata={"help": "Share of the steps over which alpha rises."}
    )
    end_of_turn_weight: float = field(
        default=0.0,
        metadata={"help": "The least that tokens which end a turn weigh, so that stopping is learned."},
    )
    fused_head: str = field(
        default="auto",
        metadata={
            "help": "Compute loss and gradient without ever holding the logits: on, off, or auto, which does "
            "wherever the result is that of the model's own logits.",
            "choices": ["auto", "on", "off"],
        },
    )
    use_simple_dft: bool = field(
        default=True, metadata={"help": "False trains by plain SFT: alpha becomes 0."}
    )


@dataclass
class WatchArguments:
    """What is said of a run, and what it does when something is wrong."""

    _argument_group_name: ClassVar[str] = "watching"

    report: bool = field(
        default=True,
        metadata={"help": "Write report.html and report.png at each evaluation and at the end."},
    )
    log_per_file: bool = field(
        default=False, metadata={"help": "Evaluation gives nll and avg_p_correct of each data file, too."}
    )
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "When a loss or gradient is not finite: stop with the step, the rank and the "
            "conversations, or skip the update.",
            "choices": ["stop", "skip"],
        },
    )
    verify_save: str = field(
        default="True",
        metadata={
            "help": "Look at a saved model before it takes its place: True reads the files of every "
            "checkpoint, and loads the final model and compares its logits; all loads every one; or False.",
            "choices": ["True", "False", "all"],
        },
    )
    preflight: bool = field(
        default=False,
        metadata={
            "help": "Score a sample of the training data with the untouched model, say whether DFT fits, and "
            "end without training."
        },
    )
    preflight_samples: int = field(
        default=512, metadata={"help": "Sequences of each data file that --preflight scores, at most."}
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Say how much memory the run will take, without loading weights, and end."},
    )
    plan_world_size: int | None = field(
        default=None, metadata={"help": "Devices to plan for. Default: those of this run."}
    )
    plan_device_memory: float | None = field(
        default=None, metadata={"help": "GiB of each device to plan for. Default: what this machine has."}
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
            share_cores()
        self._map_older_names()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            metric = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = metric not in LOWER_IS_BETTER
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
            let_cpus_shard()

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


@dataclass(frozen=True)
class Arguments:
    """All of a run's arguments.

    Attributes:
        given: what was asked for, before anything was derived from it.
        notes: what was derived, chosen or left without effect, one line each.
    """

    model: ModelArguments
    data: DataArguments
    dft: DFTArguments
    lora: LoraArguments
    watch: WatchArguments
    training: TrainingArguments
    given: dict[str, Any]
    notes: list[str]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind explanations, but no `None`, which says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Flags of the six dataclasses; a mistake is a `UserError` instead of a page of usage."""

    def __init__(self) -> None:
        kinds = (
            ModelArguments,
            DataArguments,
            DFTArguments,
            LoraArguments,
            WatchArguments,
            TrainingArguments,
        )
        super().__init__(kinds, allow_abbrev=False, prog="train_dft.py", formatter_class=Help)
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS  # transformers' twin of a flag, under the other's explanation
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="Read flags from a file; flags on the command line override it.",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (train_dft.py --help lists every flag)")

    def parse(self, argv: list[str]) -> Arguments:
        """Raises `UserError` for an unknown flag or a value that cannot be read."""
        refuse_secrets(argv)
        words = expand_config(argv)
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(self._unknown(unknown))
        given = vars(namespace)
        del given["config"]
        wanted = dict(given)
        if given["prepare_only"]:
            wanted.update(OF_THE_DEVICE)
        if given["preflight"] and given["deepspeed"] and zero_stage(given["deepspeed"]) != 3:
            wanted["deepspeed"] = None  # which scores models with ZeRO-3 alone, and others need none to score
        try:
            model, data, dft, lora, watch, training = self.parse_dict(wanted, allow_extra_keys=False)
        except UserError:
            raise
        except (ValueError, ImportError, OSError) as error:  # how transformers refuses a value
            raise UserError(" ".join(str(error).split())) from None
        if model.enable_gradient_checkpointing:
            training.activation_checkpointing = training.gradient_checkpointing = True
        return Arguments(
            model, data, dft, lora, watch, training, given, [*given_again(argv), *training.notes]
        )

    def _unknown(self, unknown: list[str]) -> str:
        flag = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = flag.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else " (train_dft.py --help lists every flag)"
        return f"unknown argument {name}{hint}"


def refuse_secrets(argv: list[str]) -> None:
    """Raises `UserError` for a token on the command line, without repeating it."""
    for word in argv:
        if word.partition("=")[0] in SECRET_FLAGS:
            raise UserError(
                f"{word.partition('=')[0]}: a token on the command line is seen by everyone on this machine, "
                "and launchers and trackers record it; let it be HF_TOKEN in the environment, or stand in a "
                "--config file"
            )


def given_again(argv: list[str]) -> list[str]:
    """A note of the flags that the command line has twice, as scripts/train.sh gives those it is given."""
    found: dict[str, list[str]] = {}
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            values = found.setdefault(name, [])
            values.append(value if equals else "")
        elif found:
            values[-1] = f"{values[-1]} {word}".strip()
    twice = [
        f"{name} {values[-1]}".strip()
        for name, values in found.items()
        if name != "--config" and len(set(values)) > 1
    ]
    return [f"given more than once, so the last one counts: {', '.join(twice)}"] if twice else []


def default_flags() -> dict[str, Any]:
    """What every flag is when it is not given."""
    required = ["--model_name_or_path", "", "--data_files", ""]
    return vars(Parser().parse_known_args(required)[0])


def own_flags() -> set[str]:
    """Names of the flags that are not transformers' own."""
    kinds = (ModelArguments, DataArguments, DFTArguments, LoraArguments, WatchArguments)
    return {one.name for kind in kinds for one in dataclasses.fields(kind)}


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The arguments of this run, readable one by one; `dft.conflicts.check` looks at them together.

    Raises:
        UserError: an unknown flag or a value that cannot be read.
    """
    return Parser().parse(sys.argv[1:] if argv is None else argv)
