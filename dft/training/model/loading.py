"""Load the model of a run: weights, adapters, and embeddings for every token of the tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from dft.arguments.objective import build_objective
from dft.arguments.parser import Arguments
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError, describe_loading_error
from dft.ranks import first_failure
from dft.training.model.adapters import add_adapters, embeddings_note, pack_linear
from dft.training.model.attention import VARLEN, resolve_attention, resolve_dtype, use_varlen_attention
from dft.training.model.companion_files import fetch_companions, left_out_note
from dft.training.model.freezing import freeze_matching
from dft.training.model.generation import resolve_generation_config
from dft.training.model.new_tokens import NEW_TOKEN_FLAGS, add_embeddings, check_embeddings_not_frozen
from dft.training.model.precision import check_trained_dtype, dtype_notes
from dft.training.model.quantized import resolve_loading
from dft.training.model.weight_checks import (
    check_causal,
    check_finite,
    check_loaded_keys,
    check_weight_files,
    unused_weights_note,
)
from dft.training.model.weight_names import source_names
from dft.training.parameters import GIB, freeze_unused_parts
from dft.training.patches import keep_source_names

CONFIG_ERRORS = (ArithmeticError, LookupError)
"""Exceptions raised when building a model from nonsensical values in config.json."""
SHAPE_ERROR = "size mismatch"
FILE_ERRORS = ("negative dimension", SHAPE_ERROR, "conversion of the weights")
"""Texts that identify a RuntimeError while loading as a fault of the model's files."""


def load_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model to train, with adapters if the flags request them.

    Under ZeRO-3 each rank holds a part of every weight. Notes are added to `arguments.notes`.

    Raises:
        UserError: there is no such model; its weights are broken, missing or not finite; it is an encoder;
            or the tokenizer does not belong to it.
    """
    name = arguments.model.model_name_or_path
    model = _load_checked(arguments)
    if arguments.model.dequantize and is_deepspeed_zero3_enabled():
        arguments.notes.append("--dequantize True: each rank loads all weights before ZeRO-3 shards them")
    arguments.new_tokens[:] = add_embeddings(model, tokenizer, arguments)
    model.generation_config, note = resolve_generation_config(model.generation_config, name)
    if note is not None:
        arguments.notes.append(note)
    if arguments.lora.lora_r is not None:
        model = adapt(model, arguments)
    else:
        fetch_companions(name)
        note = left_out_note(name, model, source_names(name))
        arguments.notes.extend([note] if note else [])
        frozen = freeze_unused_parts(model)
        if frozen:
            arguments.notes.append(f"frozen, because text does not reach them: {', '.join(frozen)}")
        freeze(model, arguments)
        check_embeddings_not_frozen(model, arguments.new_tokens, arguments)
    check_trained_dtype(model, arguments)
    arguments.notes.extend(dtype_notes(model, arguments))
    return model


def load_base_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a second copy of the untrained model, for objectives that compare with it.

    It has no adapters and is complete on each rank, even under ZeRO-3.

    Raises:
        UserError: it has fewer embeddings than the tokenizer has tokens.
    """
    with without_zero3_partitioning(arguments.training):
        model = _load_checked(arguments)
    _check_base_embeddings(model, tokenizer, arguments)
    add_embeddings(model, tokenizer, arguments)  # in unused rows, with the values that the trained model has
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / GIB
    arguments.notes.append(
        f"--objective {arguments.dft.objective}: a frozen copy of the base model takes {size:.2f} GiB more "
        "on each device"
    )
    return model


def load_meta_model(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Return the model on the meta device, without weights, with adapters if the flags request them.

    Args:
        arguments: the parsed flags.
        tokenizer: the tokenizer of the run; None if it is that of the model, without new tokens.

    Raises:
        UserError: there is no such model, its configuration is not that of a causal language model, or the
            flags do not fit new tokens.
    """
    name = arguments.model.model_name_or_path
    dtype = resolve_dtype(arguments)
    trust_remote_code = arguments.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with without_zero3_partitioning(arguments.training), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype if dtype == "auto" else dtype,
                attn_implementation=_attention_or_default(arguments),
                trust_remote_code=trust_remote_code,
            )
    except (*UNLOADABLE, *CONFIG_ERRORS) as error:
        raise UserError(
            f"--model_name_or_path {name}: cannot be planned: {describe_loading_error(error)}"
        ) from None
    resolve_loading(arguments)
    use_varlen_attention(model, arguments)
    if tokenizer is not None:
        if build_objective(arguments.dft).kl_weight > 0:
            _check_base_embeddings(model, tokenizer, arguments)
        with without_zero3_partitioning(arguments.training), torch.device("meta"):
            arguments.new_tokens[:] = add_embeddings(model, tokenizer, arguments)
    if arguments.lora.load_in_4bit:
        pack_linear(model)
    if arguments.lora.lora_r is not None:
        with torch.device("meta"):
            model = adapt(model, arguments)
    freeze(model, arguments)
    check_embeddings_not_frozen(model, arguments.new_tokens, arguments)
    arguments.notes.extend(dtype_notes(model, arguments))
    return model


def adapt(model: PreTrainedModel, arguments: Arguments) -> nn.Module:
    """Return the model with adapters. If there are new tokens, their embeddings are trained as well."""
    name, tokens = arguments.model.model_name_or_path, arguments.new_tokens
    model = add_adapters(model, arguments.lora, arguments.training, name, tokens)
    if tokens:
        arguments.notes.append(embeddings_note(model, tokens))
    return model


def freeze(model: PreTrainedModel, arguments: Arguments) -> None:
    """Freeze the weights that --freeze matches, and add a note with their size to `arguments.notes`."""
    if arguments.model.freeze:
        arguments.notes.append(freeze_matching(model, arguments.model.freeze))


@contextmanager
def without_zero3_partitioning(training: transformers.TrainingArguments) -> Iterator[None]:
    """Create complete models in this context; under ZeRO-3, transformers would partition them."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed:
            set_hf_deepspeed_config(training.hf_deepspeed_config)


def _load_checked(arguments: Arguments) -> PreTrainedModel:
    """Load the model and run all checks. Raises `UserError` as `load_model` does."""
    name = arguments.model.model_name_or_path
    check_weight_files(name)
    model, loading = _read_weights(arguments, name)
    check_loaded_keys(loading, name)
    note = unused_weights_note(loading)
    if note is not None:
        arguments.notes.append(note)
    check_causal(model, name)
    use_varlen_attention(model, arguments)
    check_finite(model, name, arguments.training.device)
    return model


def _read_weights(arguments: Arguments, name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and transformers' loading info."""
    failure: str | None = None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=resolve_dtype(arguments),
            attn_implementation=_attention_or_default(arguments),
            trust_remote_code=arguments.model.trust_remote_code,
            quantization_config=resolve_loading(arguments),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `check_loaded_keys` reports them with their names
            output_loading_info=True,
        )
    except (*UNLOADABLE, *CONFIG_ERRORS, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in FILE_ERRORS):
            raise  # a full device or a broken process group: not a fault of the files
        failure = _loading_failure(error, name)
        if SHAPE_ERROR not in failure:
            raise UserError(failure) from None
    # Under ZeRO-3 only rank 0 compares shapes, at the end, when the other ranks have finished loading.
    failure = first_failure(failure)
    if failure is not None:
        raise UserError(failure)
    keep_source_names(model, source_names(name))
    return model, loading


def _loading_failure(error: Exception, name: str) -> str:
    """Return the message for a model that cannot be loaded."""
    reason = describe_loading_error(error)
    if isinstance(error, SafetensorError):
        reason += "; the file is damaged, or its download is incomplete"
    if isinstance(error, (*CONFIG_ERRORS, RuntimeError)):
        reason += "; check the numbers in config.json"
    return f"--model_name_or_path {name}: cannot be loaded: {reason}"


def _attention_or_default(arguments: Arguments) -> str | None:
    attention = resolve_attention(arguments)
    return None if attention in ("auto", VARLEN) else attention


def _check_base_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    """Raise `UserError` if a model, as loaded, has no embedding for a token of the tokenizer.

    The largest id counts, not the number of tokens: a vocabulary may have unused ids.
    """
    rows = model.config.get_text_config().vocab_size
    count = sum(token_id >= rows for token_id in tokenizer.get_vocab().values())
    if count:
        raise UserError(
            f"--objective {arguments.dft.objective}: the base model has no embeddings for {count} tokens of "
            "the tokenizer, so it cannot predict them; train without new tokens "
            f"({NEW_TOKEN_FLAGS}), or use another objective"
        )
