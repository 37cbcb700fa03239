"""Arguments that contradict one another or this machine, found before any work is done."""

import math

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.utils import is_liger_kernel_available

from dft.arguments.data import check_data_arguments
from dft.arguments.deepspeed_file import check_parts, zero_of
from dft.arguments.lora import check_lora, refuse_adapters
from dft.arguments.loss_settings import check_arguments
from dft.arguments.objective import objective_of
from dft.arguments.parser import Arguments
from dft.arguments.training import TrainingArguments
from dft.errors import UserError
from dft.loss.objectives import Dft, Objective, Sft
from dft.loss.schedule import CONSTANT
from dft.metrics import selectable
from dft.ranks import can_shard, data_parallel_size, sequence_parallel_size, world_size

MOST = {
    "per_device_train_batch_size": 10**6,
    "per_device_eval_batch_size": 10**6,
    "gradient_accumulation_steps": 10**6,
    "num_train_epochs": 10**6,
    "max_steps": 10**9,
    "dataloader_num_workers": 1024,
    "dataloader_prefetch_factor": 10**6,
    "learning_rate": 1000,
}
"""Beyond these a number is a slip of the keyboard, and would overflow something or never end."""
MOST_PLANNED = 10**6
"""Devices, and GiB of each."""


def check(arguments: Arguments) -> None:
    """Raises `UserError` for numbers out of range and for flags that contradict one another.

    Settles what follows from several flags at once, and adds a note for each.
    """
    check_ranges(arguments)
    settle_evaluation(arguments)
    check_preflight(arguments)
    check_plan(arguments)
    if arguments.data.prepare_only:
        return  # the rest is about a machine and a training that may be elsewhere
    training = arguments.training
    check_weighing(arguments)
    try:
        check_arguments(training)
    except ValueError as error:
        raise UserError(str(error)) from None
    planned = arguments.watch.plan_world_size  # by --plan True, perhaps for machines that are not here
    check_sequence_parallel(training, arguments.data.packing, planned or world_size())
    check_evaluation(arguments)
    check_precision(arguments)
    check_packages(training)
    check_fsdp(training, planned)
    check_deepspeed(training)
    if not arguments.watch.preflight or arguments.lora.lora_r is not None:  # else nothing is trained
        refuse_adapters(arguments.model.model_name_or_path)
    check_lora(arguments.lora, training, zero_of(training)[0])


def check_ranges(arguments: Arguments) -> None:
    check_data_arguments(arguments.data)
    dft, training = arguments.dft, arguments.training
    positive = {
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": training.num_train_epochs,
        "save_total_limit": training.save_total_limit,
        "preflight_samples": arguments.watch.preflight_samples,
        "dataloader_prefetch_factor": training.dataloader_prefetch_factor,
    }
    for name, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value}: must be greater than 0")
    not_negative = {
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "dataloader_num_workers": training.dataloader_num_workers,
        "logging_steps": training.logging_steps,
        "warmup_steps": training.warmup_steps,
        "save_steps": training.save_steps,
        "eval_steps": training.eval_steps,
    }
    if training.save_strategy == SaveStrategy.STEPS and training.save_steps == 0:
        raise UserError("--save_steps 0: must be greater than 0 with --save_strategy steps")
    if arguments.given["eval_steps"] == 0:  # transformers would take --logging_steps
        raise UserError("--eval_steps 0: must be greater than 0; leave it out for --logging_steps")
    for name, value in not_negative.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value}: must be a finite number, at least 0")
    for name, most in MOST.items():
        value = vars(training)[name]
        if value is not None and value > most:
            raise UserError(f"--{name} {value}: must be at most {most:,}")
    if training.max_steps < 1 and training.max_steps != -1:
        raise UserError(
            f"--max_steps {training.max_steps}: must be greater than 0, or -1 for all of --num_train_epochs"
        )
    for name, value in {"seed": training.seed, "data_seed": training.data_seed}.items():
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"--{name} {value}: must be at least 0 and below 2**32")
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "liger_kernel_config"):
        value = vars(training)[name]
        if value is not None and not isinstance(value, dict):
            raise UserError(f"--{name} {value}: expected a JSON object such as '{{\"name\": 1}}'")
    if not 0 <= dft.dft_alpha <= 1:
        raise UserError(f"--dft_alpha {dft.dft_alpha:g}: must lie in [0, 1]; 1 is the paper's DFT, 0 is SFT")


def check_preflight(arguments: Arguments) -> None:
    if not arguments.watch.preflight:
        return
    if arguments.data.prepare_only:
        raise UserError("--preflight True needs the model, --prepare_only True leaves it out; give one")
    resume = arguments.training.resume_from_checkpoint
    if resume is not None and resume.lower() != "false":
        raise UserError(
            f"--preflight True scores --model_name_or_path, not --resume_from_checkpoint {resume}; leave "
            "that out, or name the checkpoint as the model"
        )


def check_plan(arguments: Arguments) -> None:
    watch = arguments.watch
    for name, value in (
        ("plan_world_size", watch.plan_world_size),
        ("plan_device_memory", watch.plan_device_memory),
    ):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name} {value}: must be greater than 0")
        if value is not None and value > MOST_PLANNED:
            raise UserError(f"--{name} {value}: must be at most {MOST_PLANNED:,}")
        if value is not None and not watch.plan:
            raise UserError(f"--{name} {value} says what to plan for; add --plan True, or leave it out")
    if watch.plan and (watch.preflight or arguments.data.prepare_only):
        other = "--preflight" if watch.preflight else "--prepare_only"
        raise UserError(f"--plan True and {other} True each end without training; give one")


def settle_evaluation(arguments: Arguments) -> None:
    data = arguments.data
    if data.eval_data_files and data.validation_split_percentage:
        arguments.notes.append(
            f"--validation_split_percentage {data.validation_split_percentage:g} has no effect: "
            "--eval_data_files says what to evaluate on"
        )
        data.validation_split_percentage = 0.0


def check_evaluation(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    evaluates = bool(data.eval_data_files or data.validation_split_percentage)
    needs = {
        f"--eval_strategy {training.eval_strategy.value}": training.eval_strategy != IntervalStrategy.NO,
        "--eval_on_start True": training.eval_on_start,
        "--save_strategy best": training.save_strategy == SaveStrategy.BEST,
        "--load_best_model_at_end True": training.load_best_model_at_end,
    }
    for flag, wanted in needs.items():
        if wanted and not evaluates:
            raise UserError(f"{flag} needs --eval_data_files or --validation_split_percentage")
    metric = training.metric_for_best_model
    known = [f"eval_{name}" for name in selectable()]
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in known:
        raise UserError(
            f"--metric_for_best_model {metric}: not measured, or no measure of quality; choose one of "
            f"{', '.join(known)}"
        )
    if evaluates and metric is not None and metric.removeprefix("eval_") == "loss":
        arguments.notes.append(
            f"--metric_for_best_model {metric}: the DFT loss -p log p is not monotone in quality (a model "
            "that knows nothing has a loss near 0 too); eval_objective is what training descends"
        )
    evaluated = training.eval_strategy != IntervalStrategy.NO
    if evaluated and training.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
        apart = training.save_strategy.value != training.eval_strategy.value
        if apart or (
            training.save_strategy == SaveStrategy.STEPS and training.save_steps % training.eval_steps
        ):
            arguments.notes.append(
                "the best checkpoint is sought only where a save and an evaluation fall on the same step; "
                "let --save_strategy be --eval_strategy, and --save_steps a multiple of --eval_steps"
            )
    plateau = training.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    mode = (training.lr_scheduler_kwargs or {}).get("mode", "min")
    if plateau and (mode == "max") != training.greater_is_better:
        wanted = "max" if training.greater_is_better else "min"
        raise UserError(
            f"--lr_scheduler_type reduce_lr_on_plateau watches {metric} with mode {mode!r}; it is better "
            f"when {'greater' if training.greater_is_better else 'lower'}, so give --lr_scheduler_kwargs "
            f'\'{{"mode": "{wanted}"}}\' or another --metric_for_best_model'
        )


def check_precision(arguments: Arguments) -> None:
    model, training = arguments.model, arguments.training
    if training.deepspeed:
        return
    if model.torch_dtype == "float16" and training.fp16:
        raise UserError(
            "--torch_dtype float16 with --fp16 True: float16 gradients cannot be scaled back; let the "
            "weights be float32 (--torch_dtype float32), or use --deepspeed, which keeps float32 master "
            "weights itself"
        )
    raised = training.fsdp and training.mixed_precision != "no"  # to float32, by accelerate
    if model.torch_dtype in ("float16", "bfloat16") and not raised:
        arguments.notes.append(
            f"--torch_dtype {model.torch_dtype} without --deepspeed: there are no float32 master weights, "
            "and an update below about 1/256 of a weight is lost; small learning rates want float32 with "
            "--bf16 True"
        )


def check_packages(training: TrainingArguments) -> None:
    """Optional packages, asked for here: transformers finds them missing only once the model is loaded."""
    for tracker in training.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {tracker}: no such tracker; choose from "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        if tracker not in get_available_reporting_integrations():
            raise UserError(f"--report_to {tracker}: its package is not installed; pip install {tracker}")
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel True: liger-kernel is not installed; pip install liger-kernel")


def check_fsdp(training: TrainingArguments, planned_ranks: int | None = None) -> None:
    if not training.fsdp:
        return
    if training.deepspeed:
        raise UserError(f"--fsdp and --deepspeed {training.deepspeed} both shard the model; give one")
    if not can_shard() and planned_ranks is None:
        raise UserError(
            "--fsdp True shards a model over ranks, and this run has none; start it with torchrun "
            "--nproc_per_node N train_dft.py ..."
        )
    config = training.fsdp_config
    if int(config.get("version", 2)) != 2:
        raise UserError(
            f"--fsdp_config: version {config['version']} of FSDP was not tried with this loss; leave it out "
            "for version 2, or use --deepspeed ds_config/zero3.json"
        )
    kind = config.get("state_dict_type", "FULL_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"--fsdp_config: state_dict_type {kind} saves no model that from_pretrained loads; leave it out"
        )


def check_deepspeed(training: TrainingArguments) -> None:
    if not training.deepspeed:
        return
    zero = training.hf_deepspeed_config
    check_parts(zero.config, f"--deepspeed {training.deepspeed}")
    if zero.mismatches:
        raise UserError(
            f"--deepspeed {training.deepspeed} contradicts the flags: {'; '.join(zero.mismatches)}; the "
            'easiest way is "auto" for these values in the file'
        )
    # DeepSpeed steps in for these flags, and where its file lacks the key it would do without.
    needed = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps > 1,
        "gradient_clipping": training.max_grad_norm > 0,
        "bf16.enabled": training.bf16,
        "fp16.enabled": training.fp16,
    }
    missing = [key for key, matters in needed.items() if matters and zero.get_value(key) is None]
    if missing:
        raise UserError(
            f"--deepspeed {training.deepspeed}: has no {', '.join(missing)}, so flags of this run would have "
            'no effect; set them to "auto", as the files in ds_config/ do'
        )
    if zero.get_value("zero_optimization.stage", 0) == 0:
        raise UserError(
            f"--deepspeed {training.deepspeed}: without ZeRO, DeepSpeed does not tell the norm of the "
            "gradient, so a step that is not finite would reach the weights; set 'zero_optimization: "
            "{stage: 1}' or more, or leave --deepspeed out for DDP"
        )
    if zero.is_false("bf16.check_grad_overflow"):
        raise UserError(
            f"--deepspeed {training.deepspeed}: 'bf16: {{check_grad_overflow: false}}' would let a gradient "
            "that is not finite reach the weights; leave it out"
        )
    if zero.get_value("tensor_parallel.autotp_size", 0) > 1:
        raise UserError(f"--deepspeed {training.deepspeed}: tensor parallelism is not supported; remove it")
    if zero.is_zero3() and not zero.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            f"--deepspeed {training.deepspeed}: ZeRO-3 needs 'stage3_gather_16bit_weights_on_model_save: "
            "true' in 'zero_optimization', or no model can be saved that from_pretrained loads"
        )
    if training.save_only_model and training.load_best_model_at_end:
        raise UserError(
            "--load_best_model_at_end True with --save_only_model True: DeepSpeed cannot load a checkpoint "
            "that holds the model alone; the best checkpoint is kept in the output directory either way"
        )


def check_batches(arguments: Arguments, sequences: int) -> None:
    """Raises `UserError` where --dataloader_drop_last would drop all there is."""
    training = arguments.training
    groups = data_parallel_size(training, arguments.watch.plan_world_size)
    batch = training.per_device_train_batch_size * groups
    if training.dataloader_drop_last and sequences < batch:
        raise UserError(
            f"--dataloader_drop_last True: {sequences} sequences do not fill one batch of {batch} over all "
            "ranks, so nothing would be trained on"
        )


def least_weight(objective: Objective) -> float:
    """What the most unlikely token weighs, where it weighs anything for sure."""
    return objective.affine[1] if objective.affine is not None else 0.0


def check_weighing(arguments: Arguments) -> None:
    """Raises `UserError` for flags about weights that contradict one another. Settles `--use_simple_dft`."""
    dft = arguments.dft
    if not 0 <= dft.end_of_turn_weight <= 1:
        raise UserError(
            f"--end_of_turn_weight {dft.end_of_turn_weight:g}: must lie in [0, 1]; 1 supervises the ends of "
            "turns as SFT does, 0 leaves them to the objective"
        )
    if not 0 < dft.dft_alpha_schedule_share <= 1:
        raise UserError(
            f"--dft_alpha_schedule_share {dft.dft_alpha_schedule_share:g}: must be above 0 and at most 1, "
            "the share of the steps over which alpha rises"
        )
    if dft.dft_alpha_schedule == CONSTANT.kind and dft.dft_alpha_schedule_share != CONSTANT.share:
        raise UserError(
            f"--dft_alpha_schedule_share {dft.dft_alpha_schedule_share:g}: alpha is constant; give "
            "--dft_alpha_schedule linear or cosine, or leave it out"
        )
    if not dft.use_simple_dft:
        if dft.objective not in (Dft.name, Sft.name):
            raise UserError(
                f"--use_simple_dft False is plain SFT, --objective {dft.objective} is not; give one"
            )
        if dft.objective == Dft.name and dft.dft_alpha != 0:
            dft.dft_alpha = 0.0
            arguments.notes.append("--use_simple_dft False: alpha is 0, plain SFT")
    objective = objective_of(dft)
    if 0 < dft.end_of_turn_weight <= least_weight(objective):
        arguments.notes.append(
            f"--end_of_turn_weight {dft.end_of_turn_weight:g} has no effect: no token weighs less than "
            f"{least_weight(objective):g} as it is"
        )
    if not isinstance(objective, Dft):
        if dft.dft_alpha != Dft.alpha:
            raise UserError(
                f"--dft_alpha {dft.dft_alpha:g}: the objective {dft.objective} has no alpha; leave it out, "
                f"or use --objective {Dft.name}"
            )
        if dft.dft_alpha_schedule != "constant":
            raise UserError(
                f"--dft_alpha_schedule {dft.dft_alpha_schedule}: the objective {dft.objective} has no alpha; "
                f"leave it out, or use --objective {Dft.name}"
            )
    if dft.dft_alpha_schedule != "constant" and dft.dft_alpha == 0:
        raise UserError(
            f"--dft_alpha_schedule {dft.dft_alpha_schedule}: alpha rises from 0 to --dft_alpha, which is 0; "
            "give the alpha to arrive at"
        )
    if objective.kl_weight > 0 and arguments.training.sequence_parallel_size > 1:
        raise UserError(
            f"--sequence_parallel_size {arguments.training.sequence_parallel_size}: --objective "
            f"{dft.objective} scores whole sequences with the base model; leave one of them out"
        )
    metric = (arguments.training.metric_for_best_model or "").removeprefix("eval_")
    if metric == "objective" and objective.potential(torch.zeros(1)) is None:
        raise UserError(
            f"--metric_for_best_model objective: --objective {dft.objective} descends nothing that is a "
            "function of p; choose eval_acc or eval_nll"
        )


def check_sequence_parallel(training: transformers.TrainingArguments, packing: bool, ranks: int) -> None:
    """Raises `UserError` for flags that sequence parallelism does not go with on so many ranks."""
    size = sequence_parallel_size(training)
    flag = f"--sequence_parallel_size {size}"
    if size < 1:
        raise UserError(f"{flag}: must be at least 1, which is none")
    if size == 1:
        return
    if ranks % size:
        raise UserError(
            f"{flag}: {ranks} process(es) make no whole number of groups of {size}; start, or plan for, a "
            "multiple of that (deepspeed --num_gpus, torchrun --nproc_per_node), or choose another size"
        )
    if packing:
        raise UserError(
            f"{flag} with --packing True: attention would see the conversations of a row as one; use "
            "--packing False, long conversations are what sequence parallelism is for"
        )
    if training.fsdp:
        raise UserError(f"{flag} with --fsdp: not tried; use --deepspeed ds_config/zero3.json")
    if training.torch_compile:
        raise UserError(f"{flag} with --torch_compile True: not tried; leave one of them out")
