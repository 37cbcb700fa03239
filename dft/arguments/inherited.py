"""What this trainer does with each flag of transformers.TrainingArguments.

tests/arguments/test_inherited.py compares `TREATMENTS` with the installed transformers, so that a flag that
an upgrade brings fails there first. docs/transformers_flags.md is generated from it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any

import transformers

from dft.errors import UserError


class Treatment(Enum):
    """What is done with a flag."""

    HERE = "handled here"
    """The flag has another default, meaning or implementation, or its values are checked."""
    REFUSED = "refused"
    """Values other than the default are an error, because they would break a promise of this trainer."""
    UNUSED = "no effect"
    """Nothing in a run of train_dft.py uses the flag; another value than the default is noted."""
    PASSED = "passed on"
    """transformers, accelerate or the tracker implements it, whatever the loss or the head."""


@dataclass(frozen=True)
class Inherited:
    """The treatment of a flag.

    Attributes:
        treatment: what is done with it.
        text: how, or why.
    """

    treatment: Treatment
    text: str = ""


_HERE, _REFUSED, _UNUSED, _PASSED = Treatment
_METRICS = "train_dft.py has no compute_metrics; metrics are sums over tokens, which are made on the device"
_EVALUATIONS = "what a run does is decided by --eval_strategy"
_DDP, _HUB, _TRACKER = "of DistributedDataParallel", "see docs/training.md", "of the tracker"

TREATMENTS = {
    "output_dir": Inherited(_HERE, "locked while a run writes to it, and checked against the inputs"),
    "per_device_train_batch_size": Inherited(_HERE, "the loss does not depend on it"),
    "num_train_epochs": Inherited(_PASSED),
    "max_steps": Inherited(_PASSED),
    "learning_rate": Inherited(_HERE, "takes effect when a run resumes"),
    "lr_scheduler_type": Inherited(_HERE, "created once before the model is loaded, to find errors early"),
    "lr_scheduler_kwargs": Inherited(_HERE, "created once before the model is loaded, to find errors early"),
    "warmup_steps": Inherited(_HERE, "also as --warmup_ratio"),
    "optim": Inherited(_HERE, "also muon; created once before the model is loaded; see docs/training.md"),
    "optim_args": Inherited(_HERE, "checked with --optim"),
    "weight_decay": Inherited(_PASSED),
    "adam_beta1": Inherited(_PASSED),
    "adam_beta2": Inherited(_PASSED),
    "adam_epsilon": Inherited(_PASSED),
    "optim_target_modules": Inherited(_PASSED, "of GaLore and APOLLO"),
    "gradient_accumulation_steps": Inherited(_HERE, "the loss does not depend on it"),
    "average_tokens_across_devices": Inherited(
        _REFUSED, "the loss is divided by the tokens of the step on all ranks"
    ),
    "max_grad_norm": Inherited(_PASSED),
    "label_smoothing_factor": Inherited(
        _REFUSED, "the weight of a token is the probability of its single target"
    ),
    "bf16": Inherited(_PASSED),
    "fp16": Inherited(_HERE, "needs float32 weights"),
    "bf16_full_eval": Inherited(_UNUSED, "evaluations during training have the precision of training"),
    "fp16_full_eval": Inherited(_UNUSED, "evaluations during training have the precision of training"),
    "tf32": Inherited(_PASSED),
    "activation_checkpointing": Inherited(_PASSED, "also as --enable_gradient_checkpointing"),
    "activation_checkpointing_kwargs": Inherited(_PASSED),
    "gradient_checkpointing": Inherited(_PASSED),
    "gradient_checkpointing_kwargs": Inherited(_PASSED),
    "torch_compile": Inherited(_HERE, "compiles the layers of the model, and not the loss"),
    "torch_compile_backend": Inherited(_HERE, "of the layers"),
    "torch_compile_mode": Inherited(_HERE, "of the layers"),
    "use_liger_kernel": Inherited(_HERE, "the kernels of the layers; those of the loss are disabled"),
    "liger_kernel_config": Inherited(_HERE, "kernels that replace the loss are refused"),
    "use_cache": Inherited(_HERE, "refused with packed rows"),
    "neftune_noise_alpha": Inherited(_PASSED, "the fused head gives the loss and gradient of the plain head"),
    "torch_empty_cache_steps": Inherited(_PASSED),
    "auto_find_batch_size": Inherited(_HERE, "resumes with the same number of rows per step"),
    "logging_strategy": Inherited(_PASSED),
    "logging_steps": Inherited(_HERE, "default 10; a share is rounded up to a whole step"),
    "logging_first_step": Inherited(_PASSED),
    "log_on_each_node": Inherited(_PASSED),
    "logging_nan_inf_filter": Inherited(_HERE, "default False; see --on_nonfinite"),
    "include_num_input_tokens_seen": Inherited(_PASSED, "padding counts with all, not with non_padding"),
    "log_level": Inherited(_PASSED),
    "log_level_replica": Inherited(_PASSED),
    "disable_tqdm": Inherited(_HERE, "no progress bars unless the output is a terminal"),
    "report_to": Inherited(_HERE, "default none"),
    "run_name": Inherited(_HERE, "also the name of the report"),
    "project": Inherited(_PASSED, _TRACKER),
    "trackio_space_id": Inherited(_PASSED, _TRACKER),
    "trackio_bucket_id": Inherited(_PASSED, _TRACKER),
    "trackio_static_space_id": Inherited(_PASSED, _TRACKER),
    "eval_strategy": Inherited(_HERE, "needs evaluation data"),
    "eval_steps": Inherited(_HERE, "a share is rounded up to a whole step"),
    "eval_delay": Inherited(_PASSED),
    "per_device_eval_batch_size": Inherited(_HERE, "the metrics do not depend on it"),
    "prediction_loss_only": Inherited(_UNUSED, _METRICS),
    "eval_on_start": Inherited(_HERE, "not repeated when a run resumes"),
    "eval_do_concat_batches": Inherited(_UNUSED, _METRICS),
    "eval_use_gather_object": Inherited(_UNUSED, _METRICS),
    "eval_accumulation_steps": Inherited(_UNUSED, _METRICS),
    "include_for_metrics": Inherited(_UNUSED, _METRICS),
    "batch_eval_metrics": Inherited(_UNUSED, _METRICS),
    "save_only_model": Inherited(_HERE, "such checkpoints cannot be resumed, which resuming says"),
    "save_strategy": Inherited(_PASSED),
    "save_steps": Inherited(_HERE, "a share is rounded up to a whole step"),
    "save_on_each_node": Inherited(_PASSED),
    "save_total_limit": Inherited(_HERE, "keeps the best checkpoint, and the newest that can be resumed"),
    "enable_jit_checkpoint": Inherited(_REFUSED, "every run saves when it gets SIGTERM"),
    "push_to_hub": Inherited(_HERE, _HUB),
    "hub_token": Inherited(_HERE, "refused on the command line, which every user of a machine can read"),
    "hub_private_repo": Inherited(_PASSED, _HUB),
    "hub_model_id": Inherited(_PASSED, _HUB),
    "hub_strategy": Inherited(_HERE, _HUB),
    "hub_always_push": Inherited(_HERE, _HUB),
    "hub_revision": Inherited(_HERE, _HUB),
    "load_best_model_at_end": Inherited(_HERE, "the card and the last lines name the step of the weights"),
    "metric_for_best_model": Inherited(_HERE, "default eval_acc; only metrics of quality"),
    "greater_is_better": Inherited(_HERE, "default: the direction of the metric"),
    "ignore_data_skip": Inherited(_HERE, "noted, because sequences are trained again"),
    "restore_callback_states_from_checkpoint": Inherited(
        _REFUSED, "the state of a run is always restored, and this would replace it by that of an ended run"
    ),
    "full_determinism": Inherited(_PASSED),
    "seed": Inherited(_PASSED),
    "data_seed": Inherited(_HERE, "also of the validation split, of samples and of packing"),
    "use_cpu": Inherited(_HERE, "set where there is no accelerator"),
    "accelerator_config": Inherited(_HERE, "settings that change which rank gets which rows are refused"),
    "parallelism_config": Inherited(_HERE, "context, sequence and tensor parallelism are refused"),
    "dataloader_drop_last": Inherited(_HERE, "an error if it would drop all rows"),
    "dataloader_num_workers": Inherited(_PASSED),
    "dataloader_pin_memory": Inherited(_PASSED),
    "dataloader_persistent_workers": Inherited(_HERE, "an error without workers"),
    "dataloader_prefetch_factor": Inherited(_PASSED),
    "dataloader_multiprocessing_context": Inherited(_HERE, "an error without workers"),
    "dataloader_in_order": Inherited(
        _REFUSED, "rows would come in an order that depends on time, which no run can resume"
    ),
    "remove_unused_columns": Inherited(_PASSED),
    "label_names": Inherited(_HERE, "the columns that the loss reads are added"),
    "train_sampling_strategy": Inherited(_HERE, "random, sequential or group_by_length"),
    "length_column_name": Inherited(_UNUSED, "lengths are those of the token ids"),
    "ddp_find_unused_parameters": Inherited(_HERE, "False, unless a batch may not use all weights"),
    "ddp_bucket_cap_mb": Inherited(_PASSED, _DDP),
    "ddp_broadcast_buffers": Inherited(_PASSED, _DDP),
    "ddp_static_graph": Inherited(_PASSED, _DDP),
    "ddp_backend": Inherited(_PASSED, _DDP),
    "ddp_timeout": Inherited(_HERE, "also of the watchdog over the ranks"),
    "fsdp": Inherited(_HERE, "see docs/distributed.md"),
    "fsdp_config": Inherited(_HERE, "see docs/distributed.md"),
    "deepspeed": Inherited(_HERE, "see docs/distributed.md"),
    "debug": Inherited(_PASSED),
    "skip_memory_metrics": Inherited(_PASSED),
    "do_train": Inherited(_UNUSED, _EVALUATIONS),
    "do_eval": Inherited(_UNUSED, _EVALUATIONS),
    "do_predict": Inherited(_UNUSED, _EVALUATIONS),
    "resume_from_checkpoint": Inherited(_HERE, "see docs/interruptions.md"),
    "local_rank": Inherited(_PASSED, "set by launchers"),
}
"""The treatment of every field of transformers.TrainingArguments, in their order."""

REFUSED_HERE = ("restore_callback_states_from_checkpoint", "dataloader_in_order")
"""Refused flags without a check of their own elsewhere."""


def default_values() -> dict[str, Any]:
    """Return the default of each flag of transformers."""
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(transformers.TrainingArguments)
    }


def check_inherited(flags: Mapping[str, Any]) -> None:
    """Raise `UserError` for a flag that transformers has and that would break a promise of this trainer.

    Args:
        flags: the values that the user gave, or the defaults.
    """
    defaults = default_values()
    for name in REFUSED_HERE:
        if flags[name] != defaults[name]:
            raise UserError(f"--{name} {flags[name]}: {TREATMENTS[name].text}; leave it out")


def unused_notes(flags: Mapping[str, Any]) -> list[str]:
    """Return a note for each flag of transformers that was given and that nothing uses."""
    defaults = default_values()
    return [
        f"--{name} {' '.join(flags[name]) if isinstance(flags[name], list) else flags[name]} has no effect: "
        f"{inherited.text}"
        for name, inherited in TREATMENTS.items()
        if inherited.treatment is Treatment.UNUSED and flags[name] != defaults[name]
    ]
