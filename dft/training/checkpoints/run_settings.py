"""Settings of a run that its checkpoints record, and what a different value does when a run resumes.

Most of them take effect from the next step on. Those that would make the state of the checkpoint meaningless
are refused. docs/interruptions.md has the table.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from dft.arguments.lora import LORA_OPTIONS
from dft.errors import UserError
from dft.metrics import parse_name
from dft.training.checkpoints.folder import new_run_advice
from dft.training.model.adapters import has_adapters
from dft.training.model.freezing import describe_frozen
from dft.training.run_options import RunOptions

CONTROLLED_OPTIONS = ("lr", "betas", "eps", "weight_decay")
"""Optimizer parameters of a DeepSpeed file that equal the flags of the same meaning."""
ADAPTIVE_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU.value, SchedulerType.GREEDY.value)
"""Schedules whose learning rate follows from earlier metrics and not from the number of the step."""
ADAPTIVE_FLAGS = ("--learning_rate", "--lr_scheduler_kwargs")
"""Flags that cannot be changed under an adaptive schedule."""
METRIC = "--metric_for_best_model"
EVALUATION_DATA = "evaluation data"
EMA_DECAY = "--ema_decay"
OBJECTIVE = "objective"
OBJECTIVE_METRICS = ("loss", "objective")
"""Metrics that depend on the objective."""
NEW_BEST = "; the best checkpoint is chosen from here on"
CHANGES = "changed_flags"
"""Key of an entry of the log history that holds the flags with which a run was resumed, before and after."""

STATE_OF_OPTIMIZER = "the state of the optimizer would not fit"
OPTIMIZER = "--optim"
SAME_STATE = {OptimizerNames.ADAMW_TORCH.value, OptimizerNames.ADAMW_TORCH_FUSED.value}
"""Implementations of the same optimizer with the same state. Each continues the other without DeepSpeed."""
DEEPSPEED_PRECISION = "precision under DeepSpeed (--bf16, --fp16)"


@dataclass(frozen=True)
class Setting:
    """A setting that is derived from the training arguments.

    Attributes:
        name: the flag, or a description.
        read: returns the value; None if the setting does not apply to the run.
        refusal: why another value is refused; None if it takes effect.
        of_optimizer: whether it has no effect in runs with an optimizer that the caller created.
    """

    name: str
    read: Callable[[transformers.TrainingArguments], Any]
    refusal: str | None = None
    of_optimizer: bool = False


def _uses_betas(args: transformers.TrainingArguments) -> bool:
    return any(kind in args.optim.value for kind in ("adam", "lion", "muon"))


def _deepspeed_part(args: transformers.TrainingArguments, part: str, without: tuple[str, ...] = ()) -> Any:
    """Return a section of the DeepSpeed file, without the parameters that have flags of their own."""
    section = args.hf_deepspeed_config.config.get(part) if args.deepspeed else None
    if section is None:
        return None
    params = {name: value for name, value in section.get("params", {}).items() if name not in without}
    return {"type": section.get("type"), **params}


def _deepspeed_schedule(args: transformers.TrainingArguments) -> str | None:
    section = _deepspeed_part(args, "scheduler")
    return section and section["type"]


TRAINING_SETTINGS = (
    Setting("--learning_rate", lambda args: args.learning_rate, of_optimizer=True),
    Setting("--weight_decay", lambda args: args.weight_decay, of_optimizer=True),
    Setting("--adam_beta1", lambda args: args.adam_beta1 if _uses_betas(args) else None, of_optimizer=True),
    Setting("--adam_beta2", lambda args: args.adam_beta2 if _uses_betas(args) else None, of_optimizer=True),
    Setting(
        "--adam_epsilon", lambda args: args.adam_epsilon if _uses_betas(args) else None, of_optimizer=True
    ),
    Setting("--lr_scheduler_type", lambda args: args.lr_scheduler_type.value, of_optimizer=True),
    Setting("--lr_scheduler_kwargs", lambda args: args.lr_scheduler_kwargs or None, of_optimizer=True),
    Setting("--warmup_steps", lambda args: args.warmup_steps, of_optimizer=True),
    Setting("--max_steps", lambda args: args.max_steps if args.max_steps > 0 else None),
    Setting("--num_train_epochs", lambda args: None if args.max_steps > 0 else args.num_train_epochs),
    Setting("--max_grad_norm", lambda args: args.max_grad_norm),
    Setting("--per_device_train_batch_size", lambda args: args.per_device_train_batch_size),
    Setting("--gradient_accumulation_steps", lambda args: args.gradient_accumulation_steps),
    Setting(
        "mixed precision (--bf16, --fp16)", lambda args: None if args.deepspeed else args.mixed_precision
    ),
    Setting(
        DEEPSPEED_PRECISION,
        lambda args: args.mixed_precision.replace("no", "float32") if args.deepspeed else None,
        "DeepSpeed stores the optimizer of each precision differently",
    ),
    Setting("--neftune_noise_alpha", lambda args: args.neftune_noise_alpha),
    Setting(METRIC, lambda args: args.metric_for_best_model),
    Setting("--greater_is_better", lambda args: args.greater_is_better),
    Setting(OPTIMIZER, lambda args: args.optim.value, STATE_OF_OPTIMIZER, True),
    Setting("--optim_args", lambda args: args.optim_args, STATE_OF_OPTIMIZER, True),
    Setting("--optim_target_modules", lambda args: args.optim_target_modules, STATE_OF_OPTIMIZER, True),
    Setting(
        "'optimizer' in the DeepSpeed file",
        lambda args: _deepspeed_part(args, "optimizer", CONTROLLED_OPTIONS),
        STATE_OF_OPTIMIZER,
    ),
    Setting(
        "'scheduler' in the DeepSpeed file", _deepspeed_schedule, "the state of the schedule would not fit"
    ),
)
"""Settings of the training arguments, in the order in which changes are reported."""

LORA_ALPHA = "--lora_alpha"
LORA_DROPOUT = "--lora_dropout"
LORA_ARGS = "--lora_args"
WEIGHTS = "--torch_dtype"
FROZEN = "frozen weights (--freeze)"
NEW_TOKENS = "added tokens"
BASE = "--model_name_or_path"
REFUSALS = {setting.name: setting.refusal for setting in TRAINING_SETTINGS if setting.refusal} | {
    LORA_ALPHA: "the adapters that are trained already would be scaled differently",
    LORA_ARGS: "the adapters that are trained already would be scaled differently",
    FROZEN: STATE_OF_OPTIMIZER,
    NEW_TOKENS: "the embeddings of the checkpoint are those of its tokens",
}
"""Why another value of a setting is refused."""


def training_settings(args: transformers.TrainingArguments, creates_optimizer: bool = True) -> dict[str, Any]:
    """Return the settings of the training arguments as values that JSON preserves.

    Args:
        args: the training arguments.
        creates_optimizer: whether optimizer and schedule are created from the arguments.
    """
    values = {
        setting.name: setting.read(args)
        for setting in TRAINING_SETTINGS
        if creates_optimizer or not setting.of_optimizer
    }
    return json.loads(json.dumps(values, default=str))


def model_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of the model that do not show in the names and shapes of its weights."""
    name = model.name_or_path
    settings: dict[str, Any] = {
        BASE: Path(name).name if Path(name).is_dir() else name,
        WEIGHTS: str(model.dtype).removeprefix("torch."),
        FROZEN: describe_frozen(model),
    }
    if has_adapters(model):
        config = next(iter(model.peft_config.values())).to_dict()  # other adapters than LoRA lack these
        settings |= {flag: config.get(flag.removeprefix("--")) for flag in (LORA_ALPHA, LORA_DROPOUT)}
        scaling = {name: config.get(name) for name, option in LORA_OPTIONS.items() if option.scales}
        settings[LORA_ARGS] = {name: value for name, value in scaling.items() if value} or None
    return settings


def option_settings(options: RunOptions) -> dict[str, Any]:
    """Return the settings among the options of a run."""
    return {EMA_DECAY: options.ema_decay, NEW_TOKENS: " ".join(options.new_tokens) or None}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that both runs record with different values."""
    return [name for name in now if name in before and before[name] != now[name]]


def check_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` for a setting that must be the same as in the checkpoint.

    Args:
        folder: the checkpoint.
        before: its settings; empty in checkpoints of earlier versions.
        now: the settings of this run.
    """
    changed = changed_settings(before, now)
    schedule = "--lr_scheduler_type"
    adaptive = {kind for run in (before, now) if (kind := run.get(schedule)) in ADAPTIVE_SCHEDULES}
    refusals = dict(REFUSALS)
    if {before.get(OPTIMIZER), now.get(OPTIMIZER)} <= SAME_STATE and now.get(DEEPSPEED_PRECISION) is None:
        del refusals[OPTIMIZER]
    if adaptive:
        reason = f"the learning rate of {adaptive.pop()} follows from the evaluations so far"
        refusals |= dict.fromkeys((schedule, *ADAPTIVE_FLAGS), reason)
    for name in changed:
        if name in refusals:
            raise UserError(
                f"--resume_from_checkpoint {folder}: saved with {_described(name, before[name])}, and this "
                f"run has {_described(name, now[name])}: {refusals[name]}; use the former, or "
                f"{new_run_advice(folder)}"
            )


def change_lines(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """Return a line for each setting that changes at this point of the run.

    Args:
        before: the settings of the checkpoint; empty in checkpoints of earlier versions.
        now: the settings of this run.
        step: the step of the checkpoint.
    """
    if now and not before:
        return [
            "note        the checkpoint is of an earlier version, which did not record its flags: those of "
            f"this run apply from step {step + 1:,} on"
        ]
    remarks = {
        **dict.fromkeys((METRIC, EVALUATION_DATA), NEW_BEST),
        BASE: ", which has no effect: the weights are those of the checkpoint",
    }
    if LORA_ALPHA in now:
        remarks[BASE] = ": the adapters of the checkpoint continue on other frozen weights"
    return [
        f"note        {name}: from {_shown(before[name])} to {_shown(now[name])}, from step {step + 1:,} on"
        f"{remarks.get(name, '')}"
        for name in changed_settings(before, now)
    ]


def changes_record(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """Return an entry of the log history for the settings that change after `step`; None if none does."""
    changed = changed_settings(before, now)
    if not changed:
        return None
    return {"step": step, CHANGES: {name: [_shown(before[name]), _shown(now[name])] for name in changed}}


def changes_best(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the best checkpoint so far was chosen by other values than this run compares."""
    changed = changed_settings(before, now)
    if OBJECTIVE in changed and compares_objective(now):
        return True
    return not {METRIC, "--greater_is_better", EVALUATION_DATA}.isdisjoint(changed)


def compares_objective(settings: Mapping[str, Any]) -> bool:
    """Return whether the best checkpoint is chosen by a metric that depends on the objective."""
    parsed = parse_name((settings.get(METRIC) or "").removeprefix("eval_"))
    return parsed is not None and parsed[1].name in OBJECTIVE_METRICS


def _described(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name} {_shown(value)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
