"""The lines that a run prints before its first step and after its last."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import get_model_param_count

from dft.arguments.config_file import RUN_ARGS, write_run_args
from dft.arguments.intervals import INTERVALS, interval
from dft.arguments.lora import lora_options
from dft.arguments.objective import DFTArguments, build_objective, build_schedule
from dft.arguments.parser import Arguments, default_flags, own_flags
from dft.arguments.training import TrainingArguments
from dft.loss.schedule import alpha_of, method_title
from dft.program import command_of
from dft.ranks import (
    count_optimizer_steps,
    data_parallel_size,
    describe_parallelism,
    is_main_process,
    rows_per_step,
    sequence_parallel_size,
    world_size,
)
from dft.training.checkpoints.run_state import weights_step
from dft.training.memory.estimate import estimate_memory
from dft.training.model.adapters import has_adapters
from dft.training.parallel.stopping import Stopped


def write_resolved_arguments(arguments: Arguments, model: PreTrainedModel | None = None) -> None:
    """Write `run_args.yaml` into the output directory, on rank 0.

    The file holds the given flags, for `--config`, and the resolved settings as comments.

    Args:
        arguments: the parsed flags.
        model: the loaded model; None if the run ends before it is loaded, which leaves the comments out.
    """
    if not is_main_process():
        return
    folder = Path(arguments.training.output_dir)
    resolved = {} if model is None else resolved_settings(arguments, model)
    write_run_args(folder, arguments.flags, default_flags(), own_flags(), resolved)


def resolved_settings(arguments: Arguments, model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings not determined by flags alone: device, ranks, dtypes, attention and parallelism."""
    training = arguments.training
    return {
        "device": training.device.type,
        "ranks": world_size(),
        "weights": str(model.dtype).removeprefix("torch."),
        "computes_in": {"bf16": "bfloat16", "fp16": "float16"}.get(
            training.mixed_precision, "the dtype of the weights"
        ),
        "attention": model.config._attn_implementation,
        "parallelism": describe_parallelism(training),
        "alpha": alpha_of(build_objective(arguments.dft)),
        "rows_per_step": rows_per_step(training),
    }


def method_line(dft: DFTArguments) -> str:
    """Return the objective with its schedule, and the formula of the token weight."""
    objective = build_objective(dft)
    title = method_title(objective, build_schedule(dft), dft.end_of_turn_weight)
    return f"{title}; token weight: {objective.formula()}"


def start_lines(
    arguments: Arguments, model: PreTrainedModel, report: dict[str, Any], batching: str
) -> list[str]:
    """Return the summary that is printed before the first step.

    Args:
        arguments: the parsed flags.
        model: the model to train.
        report: `PreparedData.report`.
        batching: how batches are formed, from `describe_batching`.
    """
    training, settings = arguments.training, resolved_settings(arguments, model)
    train = _trained(report)
    steps = count_optimizer_steps(training, train["rows"])
    memory = estimate_memory(model, training, _tokens_per_micro_batch(arguments, train))
    lines = [
        f"model       {arguments.model.model_name_or_path}: {get_model_param_count(model) / 1e6:,.1f} M "
        f"parameters, {settings['weights']} weights, {settings['attention']} attention",
        *_adapter_lines(model),
        f"method      {method_line(arguments.dft)}",
        f"machine     {settings['ranks']} x {settings['device']}, {settings['parallelism']}, computes in "
        f"{settings['computes_in']}",
        f"step        {_step_size(training, train)}; {batching}",
        *_schedule_lines(training, steps),
        f"memory      {memory}",
        f"output      {training.output_dir}; trackers: {', '.join(training.report_to) or 'none'}",
    ]
    if training.logging_steps >= 1 and steps < training.logging_steps:
        lines.append(
            f"note        --logging_steps {training.logging_steps:g}: the run has only {steps} steps, so no "
            "training metrics are logged"
        )
    return lines + _interval_lines(training, steps)


def _trained(report: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the training data, without what --drop_tokens_below_base_p leaves out."""
    train, counts = report["train"], report.get("base_filter")
    if counts is None:
        return train
    supervised = train["supervised_tokens"] - counts["dropped_tokens"]
    return {**train, "rows": counts["rows"], "supervised_tokens": supervised}


def _interval_lines(training: TrainingArguments, steps: int) -> list[str]:
    """Return a line on the intervals that are a share of the run of `steps` optimizer steps, if any are."""
    strategies = (training.logging_strategy, training.eval_strategy, training.save_strategy)
    shares = [
        f"--{name} {vars(training)[name]:g} is every {_ordinal_steps(vars(training)[name], steps)}"
        for name, strategy in zip(INTERVALS, strategies, strict=True)
        if strategy.value == "steps" and vars(training)[name] < 1
    ]
    return [f"intervals   {', '.join(shares)}"] if shares else []


def _ordinal_steps(share: float, steps: int) -> str:
    count = interval(share, steps)
    return "step" if count == 1 else f"{count} steps"


def _schedule_lines(training: TrainingArguments, steps: int) -> list[str]:
    """Return the lines on the learning-rate schedule of a run of `steps` optimizer steps."""
    warmup, rate = training.get_warmup_steps(steps), training.learning_rate
    kind = training.lr_scheduler_type.value
    lines = [
        f"schedule    {steps:,} optimizer steps ({min(warmup, steps):,} for warm-up), {kind}, learning rate "
        f"{rate:g}"
    ]
    if warmup >= steps:
        lines.append(
            f"note        --warmup_steps {warmup}: the run has only {steps} steps, so its learning rate "
            f"never reaches {rate:g}"
        )
    return lines


def _adapter_lines(model: PreTrainedModel) -> list[str]:
    if not has_adapters(model):
        return []
    config = model.peft_config["default"]
    trainable = get_model_param_count(model, trainable_only=True)
    kind = ("DoRA" if config.use_dora else "LoRA") + (
        " with rank-stabilized scaling" if config.use_rslora else ""
    )
    return [
        f"adapters    {kind}, rank {config.r}, alpha {config.lora_alpha:g}, dropout {config.lora_dropout:g}: "
        f"{trainable / 1e6:,.2f} M trainable parameters"
    ]


def adapter_loader(arguments: Arguments) -> str | None:
    """Return the function that loads the adapters of a run; None if it trains none."""
    if arguments.lora.lora_r is None:
        return None
    # transformers neither adds rows to the embeddings of the base model nor loads the magnitudes of DoRA.
    needs_peft = arguments.new_tokens or lora_options(arguments.lora).get("use_dora", False)
    return f"{'AutoPeftModelForCausalLM' if needs_peft else 'AutoModelForCausalLM'}.from_pretrained"


def _step_size(training: TrainingArguments, train: dict[str, Any]) -> str:
    """Describe the rows of an optimizer step, their composition, and the supervised tokens among them."""
    per_step, ranks = rows_per_step(training), data_parallel_size(training)
    unit = "rows" if "packing_density" in train else "sequences"
    supervised = per_step * train["supervised_tokens"] / train["rows"]
    return (
        f"{per_step} {unit} ({training.per_device_train_batch_size} per device x "
        f"{training.gradient_accumulation_steps} accumulated x {ranks} rank{'' if ranks == 1 else 's'}), "
        f"about {supervised:,.0f} supervised tokens"
    )


def _tokens_per_micro_batch(arguments: Arguments, train: dict[str, Any]) -> int:
    """Return the maximum number of tokens that one rank processes at once."""
    training = arguments.training
    longest = arguments.data.max_length if "packing_density" in train else train["length_percentiles"]["100"]
    return -(-longest * training.per_device_train_batch_size // sequence_parallel_size(training))


def new_notes(arguments: Arguments) -> list[str]:
    """Return one line for each note added since the last call and clear the notes."""
    lines = [f"note        {note}" for note in arguments.notes]
    arguments.notes.clear()
    return lines


def stopped_lines(stopped: Stopped) -> list[str]:
    """Return the lines printed after a signal stopped the run: what was saved and how to resume."""
    if stopped.checkpoint is None:
        return [f"{stopped}, before training started: run the same command again"]
    return [
        f"{stopped}: saved {stopped.checkpoint}",
        "to resume: run the same command with --resume_from_checkpoint auto",
    ]


def final_lines(
    state: TrainerState,
    training: TrainingArguments,
    report: bool,
    loader: str | None = None,
    early: str = "",
) -> list[str]:
    """Return the last lines of a run: the locations of the model, its records and its report.

    Args:
        state: the trainer's state at the end.
        training: the training arguments.
        report: whether a report was written.
        loader: the function that loads the adapters; None if the run trained none.
        early: why the run stopped early, if it did.
    """
    folder, metric = training.output_dir, training.metric_for_best_model
    step = weights_step(state, training, is_training=False)
    place = folder if step == state.global_step else f"{folder}, with the weights of step {step:,}"
    if training.ema_decay is not None:
        place += f", averaged over the steps (--ema_decay {training.ema_decay:g})"
    if loader is not None:
        lines = [
            f"adapters    {place} ({loader} loads them with their base model; "
            f"{command_of('scripts/merge_lora.py')} {folder} NEW merges both into one model)"
        ]
    else:
        lines = [f"model       {place} (AutoModelForCausalLM.from_pretrained loads it)"]
    if early:
        lines.insert(0, f"stopped     early at step {state.global_step:,}: {early}")
    if state.best_model_checkpoint:
        lines.append(f"best        {state.best_model_checkpoint} ({metric} {state.best_metric:.4g})")
    lines.append(f"records     {folder}/trainer_state.json, {folder}/data_report.json, {folder}/{RUN_ARGS}")
    if report:
        lines.append(f"report      {folder}/report.html, and its main figures in {folder}/report.png")
    return lines
