"""What a run says about itself before its first step and after its last."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import get_model_param_count

from dft.arguments.config_file import RUN_ARGS, write_run_args
from dft.arguments.objective import DFTArguments, objective_of, schedule_of
from dft.arguments.parser import Arguments, default_flags, own_flags
from dft.arguments.training import TrainingArguments
from dft.loss.schedule import alpha_of, method_title
from dft.ranks import (
    count_optimizer_steps,
    data_parallel_size,
    describe_parallelism,
    is_main_process,
    rows_per_step,
    sequence_parallel_size,
    world_size,
)
from dft.training.memory.estimate import estimate_memory
from dft.training.model.adapters import has_adapters
from dft.training.parallel.stopping import Stopped


def write_resolved_arguments(arguments: Arguments, model: PreTrainedModel | None = None) -> None:
    """`run_args.yaml` in the output directory: the flags to replay, and as comments what came of them."""
    if not is_main_process():
        return
    folder = Path(arguments.training.output_dir)
    came = {} if model is None else derived(arguments, model)
    write_run_args(folder, arguments.given, default_flags(), own_flags(), came)


def derived(arguments: Arguments, model: PreTrainedModel) -> dict[str, Any]:
    """What was chosen where the flags left a choice."""
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
        "alpha": alpha_of(objective_of(arguments.dft)),
        "rows_per_step": rows_per_step(training),
    }


def method_line(dft: DFTArguments) -> str:
    """What a token weighs, and what changes that over the run."""
    objective = objective_of(dft)
    told = method_title(objective, schedule_of(dft), dft.end_of_turn_weight)
    return f"{told}; a token weighs {objective.formula()}"


def start_lines(
    arguments: Arguments, model: PreTrainedModel, report: dict[str, Any], batching: str
) -> list[str]:
    """The summary a run starts with. `batching` is `DFTTrainer.batching`."""
    training, chosen = arguments.training, derived(arguments, model)
    per_step, rows = chosen["rows_per_step"], report["train"]["rows"]
    steps = count_optimizer_steps(training, rows)
    share = report["train"]["supervised_tokens"] / rows
    packed = "packing_density" in report["train"]
    what = "rows" if packed else "sequences"
    longest = arguments.data.max_length if packed else report["train"]["length_percentiles"]["100"]
    if training.logging_steps >= 1 and steps < training.logging_steps:
        arguments.notes.append(
            f"--logging_steps {training.logging_steps:g}: the run has {steps} steps, so none is logged"
        )
    tokens = -(-longest * training.per_device_train_batch_size // sequence_parallel_size(training))
    lines = [
        f"model       {arguments.model.model_name_or_path}: {get_model_param_count(model) / 1e6:,.1f} M "
        f"parameters, {chosen['weights']} weights, {chosen['attention']} attention",
        f"method      {method_line(arguments.dft)}",
        f"machine     {chosen['ranks']} x {chosen['device']}, {chosen['parallelism']}, computes in "
        f"{chosen['computes_in']}",
        f"step        {per_step} {what} ({training.per_device_train_batch_size} per device x "
        f"{training.gradient_accumulation_steps} accumulated x {data_parallel_size(training)} ranks), about "
        f"{share * per_step:,.0f} supervised tokens; {batching}",
        f"schedule    {steps} steps, {training.get_warmup_steps(steps)} of them warm-up, "
        f"{training.lr_scheduler_type.value}, learning rate {training.learning_rate:g}",
        f"memory      {estimate_memory(model, training, tokens)}",
        f"output      {training.output_dir}; trackers: {', '.join(training.report_to) or 'none'}",
    ]
    if has_adapters(model):
        config = model.peft_config["default"]
        trained = get_model_param_count(model, trainable_only=True)
        lines.insert(
            1,
            f"adapters    LoRA, rank {config.r}, alpha {config.lora_alpha:g}, dropout "
            f"{config.lora_dropout:g}: {trained / 1e6:,.2f} M parameters are trained",
        )
    return lines


def new_notes(arguments: Arguments) -> list[str]:
    """What was derived, chosen or left without effect since this was last asked, a line each."""
    lines = [f"note        {note}" for note in arguments.notes]
    arguments.notes.clear()
    return lines


def stopped_lines(stopped: Stopped) -> list[str]:
    """How a run that was asked to stop goes on."""
    if stopped.checkpoint is None:
        return [f"{stopped}, before anything was trained: run the same command again"]
    return [
        f"{stopped}: saved {stopped.checkpoint}",
        "to go on: the same command with --resume_from_checkpoint auto",
    ]


def final_lines(
    state: TrainerState, training: TrainingArguments, report: bool, adapters: bool = False
) -> list[str]:
    """Where everything is."""
    output_dir, metric = training.output_dir, training.metric_for_best_model
    lines = [f"model       {output_dir} (AutoModelForCausalLM.from_pretrained loads it)"]
    if adapters:
        lines = [
            f"adapters    {output_dir} (AutoModelForCausalLM.from_pretrained loads them with their model; "
            f"scripts/merge_lora.py {output_dir} NEW makes one model of both)"
        ]
    if state.best_model_checkpoint:
        lines.append(f"best        {state.best_model_checkpoint} ({metric} {state.best_metric:.4g})")
    lines.append(
        f"records     {output_dir}/trainer_state.json, {output_dir}/data_report.json, {output_dir}/{RUN_ARGS}"
    )
    if report:
        lines.append(f"report      {output_dir}/report.html, for a glance {output_dir}/report.png")
    return lines
