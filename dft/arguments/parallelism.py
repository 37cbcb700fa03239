"""Checks for the flags of DeepSpeed, FSDP and sequence parallelism."""

import transformers

from dft.arguments.deepspeed_file import check_parts, deepspeed_flag
from dft.errors import UserError
from dft.program import launch_command
from dft.ranks import can_shard, sequence_parallel_size


def check_fsdp(training: transformers.TrainingArguments, planned_ranks: int | None = None) -> None:
    """Raise `UserError` for unsupported FSDP settings.

    Args:
        planned_ranks: number of ranks to plan for; they need not exist on this machine.
    """
    if not training.fsdp:
        return
    if training.deepspeed:
        raise UserError(
            f"--fsdp and {deepspeed_flag(training.deepspeed)} both shard the model; remove one of them"
        )
    if not can_shard() and planned_ranks is None:
        raise UserError(
            "--fsdp True shards a model over several ranks, and this run has only one; start it with "
            f"{launch_command('torchrun --nproc_per_node N')} ..."
        )
    config = training.fsdp_config
    if int(config.get("version", 2)) != 2:
        raise UserError(
            f"--fsdp_config: version {config['version']} of FSDP is not supported; leave it out for version "
            "2, or use --deepspeed zero3"
        )
    kind = config.get("state_dict_type", "FULL_STATE_DICT")
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"--fsdp_config: models saved with state_dict_type {kind} cannot be loaded with from_pretrained; "
            "leave it out"
        )


def check_deepspeed(training: transformers.TrainingArguments) -> None:
    """Raise `UserError` for a DeepSpeed configuration that contradicts the flags or is not supported."""
    if not training.deepspeed:
        return
    config, flag = training.hf_deepspeed_config, deepspeed_flag(training.deepspeed)
    check_parts(config.config, flag)
    if config.mismatches:
        raise UserError(
            f'{flag} contradicts the flags: {"; ".join(config.mismatches)}; set these values to "auto" in '
            "the file"
        )
    # DeepSpeed takes over the effect of these flags and ignores them if its file lacks the key.
    required = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps > 1,
        "gradient_clipping": training.max_grad_norm > 0,
        "bf16.enabled": training.bf16,
        "fp16.enabled": training.fp16,
    }
    missing = [key for key, is_used in required.items() if is_used and config.get_value(key) is None]
    if missing:
        raise UserError(
            f"{flag}: has no {', '.join(missing)}, so flags of this run would have no effect; set them to "
            '"auto", as '
            "--deepspeed zero3 does"
        )
    if config.get_value("zero_optimization.stage", 0) == 0:
        raise UserError(
            f"{flag}: without ZeRO, DeepSpeed does not report the gradient norm, so a non-finite step would "
            "reach the "
            "weights; set 'zero_optimization: {stage: 1}' or higher, or remove --deepspeed to use DDP"
        )
    for section, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if config.is_false(f"{section}.{name}"):
            raise UserError(
                f"{flag}: with '{section}: {{{name}: false}}' a non-finite gradient would reach the "
                "weights; remove that setting"
            )
    if config.get_value("tensor_parallel.autotp_size", 0) > 1:
        raise UserError(f"{flag}: tensor parallelism is not supported; remove 'tensor_parallel'")
    if config.is_zero3() and not config.is_true(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ):
        raise UserError(
            f"{flag}: set 'stage3_gather_16bit_weights_on_model_save: true' in 'zero_optimization' (in "
            "accelerate's configuration, 'zero3_save_16bit_model: true'); without it no model can be saved "
            "that from_pretrained loads"
        )
    if training.save_only_model and training.load_best_model_at_end:
        raise UserError(
            "--load_best_model_at_end True with --save_only_model True: DeepSpeed cannot load a checkpoint "
            "without optimizer states; remove one of them (the best checkpoint is kept in the output folder "
            "either way)"
        )


def check_sequence_parallel(
    training: transformers.TrainingArguments, packing: bool, attention: str, ranks: int
) -> None:
    """Raise `UserError` for flags that sequence parallelism does not support.

    Args:
        packing: whether rows hold several conversations.
        attention: value of --attn_implementation.
        ranks: number of ranks of the run or the plan.
    """
    size = sequence_parallel_size(training)
    flag = f"--sequence_parallel_size {size}"
    if size == 1:
        return
    if ranks % size:
        raise UserError(
            f"{flag}: {ranks} rank(s) cannot be divided into groups of {size}; use a multiple of {size} "
            "ranks (deepspeed --num_gpus, torchrun --nproc_per_node, --plan_world_size), or another size"
        )
    if packing and attention not in ("auto", "varlen"):
        raise UserError(
            f"{flag} with --packing True: with {attention} attention the conversations of a row would attend "
            "to one another; use --attn_implementation varlen or --packing False"
        )
    if training.fsdp:
        raise UserError(f"{flag} with --fsdp is not supported; use --deepspeed zero3")
    if training.torch_compile:
        raise UserError(f"{flag} with --torch_compile True is not supported; remove one of them")
