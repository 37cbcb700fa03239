"""Checks for flags that contradict one another or this machine, before any work is done."""

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import is_liger_kernel_available

from dft.arguments.data import check_data_arguments
from dft.arguments.deepspeed_file import zero_of
from dft.arguments.inherited import check_inherited, unused_notes
from dft.arguments.intervals import is_multiple
from dft.arguments.lora import check_freeze, check_lora, check_not_adapters
from dft.arguments.loss_settings import check_loss_settings
from dft.arguments.objective import build_objective, check_base_scores, check_objective, objective_notes
from dft.arguments.parallelism import check_deepspeed, check_fsdp, check_sequence_parallel
from dft.arguments.parser import Arguments
from dft.arguments.trackers import artifact_notes, check_trackers
from dft.arguments.training import TrainingArguments
from dft.arguments.watch import WatchArguments
from dft.data.preparing.evaluation_sets import parse_evaluation_files
from dft.errors import UserError
from dft.metrics import parse_name, selectable
from dft.ranks import data_parallel_size, sequence_parallel_size, world_size

UNSCALABLE = (
    "with --fp16 True: the gradients of float16 weights cannot be unscaled; use float32 weights "
    "(--torch_dtype float32), or --deepspeed, which keeps float32 master weights"
)
"""Why float16 weights cannot be trained, and what to do."""


def check_arguments(arguments: Arguments) -> None:
    """Raise `UserError` for flags that contradict one another. Does not modify the arguments."""
    check_data_arguments(arguments.data)
    check_steps(arguments)
    check_preflight(arguments)
    check_plan(arguments)
    check_scoring(arguments)
    if arguments.data.prepare_only:
        return  # the other checks concern the training machine, which may be a different one
    training, planned_ranks = arguments.training, arguments.watch.plan_world_size
    check_inherited(arguments.flags)
    check_objective(arguments.dft)
    if not arguments.watch.preflight:  # which scores a sample itself
        check_base_scores(arguments.dft)
    check_objective_support(arguments)
    try:
        check_loss_settings(training)
    except ValueError as error:
        raise UserError(str(error)) from None
    attention = arguments.model.attn_implementation
    check_sequence_parallel(training, arguments.data.packing, attention, planned_ranks or world_size())
    check_evaluation(arguments)
    check_early_stopping(training)
    check_samples(arguments)
    check_precision(arguments)
    check_average(arguments.training)
    check_packages(training)
    check_fsdp(training, planned_ranks)
    check_deepspeed(training)
    if not arguments.watch.preflight or arguments.lora.lora_r is not None:  # a preflight can score adapters
        check_not_adapters(arguments.model.model_name_or_path)
    check_lora(arguments.lora, training, zero_of(training)[0])
    check_freeze(arguments.model.freeze, arguments.lora)


def check_steps(arguments: Arguments) -> None:
    """Raise `UserError` for step counts and JSON flags that transformers would misinterpret."""
    training = arguments.training
    if training.save_strategy == SaveStrategy.STEPS and training.save_steps == 0:
        raise UserError("--save_steps 0: must be greater than 0 with --save_strategy steps")
    if arguments.flags["eval_steps"] == 0:  # transformers replaces it by --logging_steps
        raise UserError("--eval_steps 0: must be greater than 0; leave it out to use --logging_steps")
    if training.max_steps == 0:
        raise UserError("--max_steps 0: must be greater than 0, or -1 to train for --num_train_epochs")
    if training.dataloader_num_workers == 0:
        for name in ("dataloader_multiprocessing_context", "dataloader_persistent_workers"):
            value = arguments.flags[name]
            if value:
                raise UserError(
                    f"--{name} {value} concerns the processes that load batches, and there are none; add "
                    "--dataloader_num_workers 2, or remove it"
                )
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"):
        value = vars(training)[name]
        if value is not None and not isinstance(value, dict):
            raise UserError(f"--{name} {value}: expected a JSON object such as '{{\"name\": 1}}'")


def check_preflight(arguments: Arguments) -> None:
    """Raise `UserError` for flags that conflict with `--preflight`."""
    if not arguments.watch.preflight:
        return
    if arguments.data.prepare_only:
        raise UserError(
            "--preflight True needs the model, which --prepare_only True does not load; remove one"
        )
    resume = arguments.training.resume_from_checkpoint
    if resume is not None and resume.lower() != "false":
        raise UserError(
            f"--preflight True scores --model_name_or_path, not --resume_from_checkpoint {resume}; remove "
            "the latter, or pass the checkpoint as the model"
        )
    if arguments.training.fsdp:  # accelerate shards a model only together with its optimizer
        raise UserError(
            "--preflight True with --fsdp is not supported: FSDP shards a model when training starts; remove "
            "--fsdp, or use --deepspeed zero3 if the model does not fit on one device"
        )
    if (size := arguments.training.sequence_parallel_size) > 1:
        raise UserError(f"--preflight True scores whole sequences; remove --sequence_parallel_size {size}")


def check_plan(arguments: Arguments) -> None:
    """Raise `UserError` for flags that conflict with `--plan`, and for planning flags without `--plan`."""
    watch = arguments.watch
    for name in ("plan_world_size", "plan_device_memory"):
        value = vars(watch)[name]
        if value is not None and not watch.plan:
            raise UserError(
                f"--{name} {value} has no effect without --plan True; add that or remove the flag"
            )
    if watch.plan and (watch.preflight or arguments.data.prepare_only):
        other = "--preflight" if watch.preflight else "--prepare_only"
        raise UserError(f"--plan True and {other} True both end without training; remove one of them")


def check_scoring(arguments: Arguments) -> None:
    """Raise `UserError` for kinds of runs that conflict with `--base_scores`."""
    value, watch = arguments.dft.base_scores, arguments.watch
    if value and arguments.data.prepare_only:
        raise UserError(
            f"--base_scores {value} needs the model, which --prepare_only True does not load; remove one "
            "(--base_scores only prepares the data, scores it, and exits)"
        )
    if value == "only" and (watch.preflight or watch.plan):
        other = "--preflight" if watch.preflight else "--plan"
        raise UserError(f"--base_scores only and {other} True both end without training; remove one of them")


def check_objective_support(arguments: Arguments) -> None:
    """Raise `UserError` for training flags that the objective does not support."""
    training, objective = arguments.training, build_objective(arguments.dft)
    size = sequence_parallel_size(training)
    if objective.kl_weight > 0 and size > 1:
        raise UserError(
            f"--sequence_parallel_size {size}: --objective {objective.name} needs whole sequences to score "
            "them with the base model; remove one of them"
        )
    metric = compared_metric(training)
    if metric == "objective" and objective.potential(torch.zeros(1)) is None:
        raise UserError(
            f"--metric_for_best_model objective: --objective {objective.name} has no potential that is a "
            "function of p; use eval_acc or eval_nll"
        )


def check_evaluation(arguments: Arguments) -> None:
    """Raise `UserError` for flags that need an evaluation if there is none, and for unknown metrics."""
    training = arguments.training
    is_patient = training.early_stopping_patience is not None
    flags = {
        f"--eval_strategy {training.eval_strategy.value}": training.eval_strategy != IntervalStrategy.NO,
        "--eval_on_start True": training.eval_on_start,
        "--save_strategy best": training.save_strategy == SaveStrategy.BEST,
        "--load_best_model_at_end True": training.load_best_model_at_end,
        f"--early_stopping_patience {training.early_stopping_patience}": is_patient,
    }
    for flag, is_set in flags.items():
        if is_set and not has_evaluation(arguments):
            raise UserError(f"{flag} needs --eval_data_files or --validation_split_percentage")
    metric = training.metric_for_best_model
    sets = parse_evaluation_files(arguments.data.eval_data_files).names
    prefixes = [f"eval_{name}_" for name in sets] or ["eval_"]
    choices = [f"{prefix}{name}" for prefix in prefixes for name in selectable()]
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in choices:
        raise UserError(
            f"--metric_for_best_model {metric}: unknown, or not a measure of quality; choose one of "
            f"{', '.join(choices)}"
        )
    plateau = training.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    mode = (training.lr_scheduler_kwargs or {}).get("mode", "min")
    if plateau and (mode == "max") != training.greater_is_better:
        direction = "greater" if training.greater_is_better else "lower"
        needed = "max" if training.greater_is_better else "min"
        raise UserError(
            f"--lr_scheduler_type reduce_lr_on_plateau watches {metric} with mode {mode!r}, but {direction} "
            "values of "
            f'it are better; add --lr_scheduler_kwargs \'{{"mode": "{needed}"}}\' or choose another '
            "--metric_for_best_model"
        )


def compared_metric(training: TrainingArguments) -> str | None:
    """Return the metric that selects checkpoints, without the evaluation set that it is of."""
    parsed = parse_name((training.metric_for_best_model or "").removeprefix("eval_"))
    return parsed and parsed[1].name


def check_early_stopping(training: TrainingArguments) -> None:
    """Raise `UserError` if --early_stopping_patience has no evaluations or no metric to watch."""
    patience, threshold = training.early_stopping_patience, training.early_stopping_threshold
    if patience is None:
        if threshold:
            raise UserError(
                f"--early_stopping_threshold {threshold:g} has no effect without --early_stopping_patience; "
                "add that or remove the flag"
            )
        return
    flag = f"--early_stopping_patience {patience}"
    if training.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            f"{flag} counts evaluations during training, and there are none; add --eval_strategy steps or "
            "epoch"
        )
    if training.metric_for_best_model is None:
        raise UserError(f"{flag} watches --metric_for_best_model, which is not set; use eval_acc or eval_nll")


def check_samples(arguments: Arguments) -> None:
    """Raise `UserError` if there are no prompts for `--generate_samples`, or no evaluation to use them."""
    count, training = arguments.watch.generate_samples, arguments.training
    if not count:
        return
    if not has_evaluation(arguments):
        raise UserError(
            f"--generate_samples {count} continues prompts of the evaluation data, and there is none; add "
            "--eval_data_files or --validation_split_percentage"
        )
    if not evaluates(training):
        raise UserError(
            f"--generate_samples {count} generates at each evaluation, and there is none; add "
            "--eval_strategy steps or epoch, or --eval_on_start True"
        )


def has_evaluation(arguments: Arguments) -> bool:
    """Return whether the run has data to evaluate on."""
    return bool(arguments.data.eval_data_files or arguments.data.validation_split_percentage)


def evaluates(training: transformers.TrainingArguments) -> bool:
    """Return whether there is an evaluation during training or before it."""
    return training.eval_strategy != IntervalStrategy.NO or training.eval_on_start


def check_precision(arguments: Arguments) -> None:
    """Raise `UserError` for flags of dtypes that do not support training.

    `dft.training.model.precision` checks the weights as they are loaded.
    """
    training = arguments.training
    if not training.deepspeed and arguments.model.torch_dtype == "float16" and training.fp16:
        raise UserError(f"--torch_dtype float16 {UNSCALABLE}")


def check_average(training: TrainingArguments) -> None:
    """Raise `UserError` if the weights cannot be averaged, or the average of the best model is not saved."""
    decay, (_, *offloaded) = training.ema_decay, zero_of(training)
    if decay is None:
        return
    if any(offloaded):
        raise UserError(
            f"--ema_decay {decay:g}: the average of weights that DeepSpeed offloads to the CPU is not "
            "supported; use --deepspeed zero3, or remove --ema_decay"
        )
    if training.load_best_model_at_end and training.save_only_model:
        raise UserError(
            f"--ema_decay {decay:g}: --save_only_model True saves no average, so --load_best_model_at_end "
            "True could not load that of the best step; remove one of them"
        )


def check_packages(training: transformers.TrainingArguments) -> None:
    """Raise `UserError` for missing packages, which transformers notices only after the model is loaded."""
    check_trackers(training.report_to)
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel True: liger-kernel is not installed; pip install liger-kernel")


def check_batches(arguments: Arguments, sequences: int) -> None:
    """Raise `UserError` if --dataloader_drop_last would drop all of the training sequences."""
    training = arguments.training
    groups = data_parallel_size(training, arguments.watch.plan_world_size)
    batch = training.per_device_train_batch_size * groups
    if training.dataloader_drop_last and sequences < batch:
        raise UserError(
            f"--dataloader_drop_last True: {sequences} sequences do not fill one batch of {batch} over all "
            "ranks, so nothing would be trained on"
        )


def find_notes(arguments: Arguments) -> list[str]:
    """Return a note for each valid but potentially surprising combination of flags."""
    if arguments.data.prepare_only:
        return []
    training, watch = arguments.training, arguments.watch
    notes = unused_notes(arguments.flags)
    if watch.preflight_samples != WatchArguments.preflight_samples and not watch.preflight:
        notes.append(f"--preflight_samples {watch.preflight_samples} has no effect without --preflight True")
    tokens = watch.generate_samples_max_tokens
    if tokens != WatchArguments.generate_samples_max_tokens and not watch.generate_samples:
        notes.append(f"--generate_samples_max_tokens {tokens} has no effect without --generate_samples")
    resume = arguments.flags["resume_from_checkpoint"]
    if arguments.watch.plan and resume is not None and resume.lower() != "false":
        notes.append(
            f"--plan True ignores --resume_from_checkpoint {resume}: a resumed run needs the same memory"
        )
    notes.extend(artifact_notes(training.report_to, watch.log_artifacts))
    is_inspection = watch.plan or watch.preflight
    adds_tokens = bool(arguments.model.add_tokens) and not is_inspection
    notes.extend(objective_notes(arguments.dft, adds_tokens, watch.report or is_inspection))
    if has_evaluation(arguments) and not evaluates(training) and not is_inspection:
        flag = "--eval_data_files" if arguments.data.eval_data_files else "--validation_split_percentage"
        notes.append(f"{flag}: no evaluation uses these data; add --eval_strategy steps or epoch")
    metric = training.metric_for_best_model
    if has_evaluation(arguments) and compared_metric(training) == "loss":
        notes.append(
            f"--metric_for_best_model {metric}: the DFT loss -p log p does not decrease with quality (a "
            "model that knows nothing also has a loss near 0); eval_objective is what training minimizes"
        )
    if training.early_stopping_patience is not None and not training.load_best_model_at_end:
        notes.append(
            f"--early_stopping_patience {training.early_stopping_patience}: the model of a run that stops "
            "early is that of its last step; --load_best_model_at_end True saves the best checkpoint instead"
        )
    by_steps = training.save_strategy == SaveStrategy.STEPS
    if training.eval_strategy != IntervalStrategy.NO and (
        by_steps or training.save_strategy == SaveStrategy.EPOCH
    ):
        differs = training.save_strategy.value != training.eval_strategy.value
        if differs or (by_steps and is_multiple(training.save_steps, training.eval_steps) is False):
            notes.append(
                "the best checkpoint is searched only among steps with both a save and an evaluation; use "
                "the same --save_strategy and --eval_strategy, and a multiple of --eval_steps as "
                "--save_steps"
            )
    return notes
