"""LoRA adapters, trained instead of all weights (Hu et al., arXiv 2106.09685)."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, set_seed

from dft.arguments.lora import ALL_LINEAR, LoraArguments, lora_options
from dft.errors import UserError
from dft.files import write_atomically
from dft.saved_adapters import BASE_RECORD
from dft.training.parameters import element_count, is_partitioned, shapes_digest


def resolve_quantization(
    lora: LoraArguments, training: transformers.TrainingArguments
) -> BitsAndBytesConfig | None:
    """Return the quantization of the frozen weights; None to leave them unquantized."""
    if not lora.load_in_4bit:
        return None
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtypes[training.mixed_precision],
    )


def add_adapters(
    model: PreTrainedModel,
    lora: LoraArguments,
    training: transformers.TrainingArguments,
    name: str,
    new_tokens: Sequence[str] = (),
) -> nn.Module:
    """Return the model with adapters, equal on all ranks; only they are trained.

    If there are new tokens, adapters could not train their embeddings. The input and output embedding are
    then trained as a whole, too, and saved with the adapters. peft can also train single rows
    (trainable_token_indices). It does not do so on CPUs under ZeRO-3, and its head computes more than a
    linear layer, so the loss could not be fused.

    Args:
        model: model to adapt.
        lora: LoRA flags.
        training: arguments of the run.
        name: name of the model that the adapters record.
        new_tokens: tokens that the vocabulary of the saved model lacks.

    Raises:
        UserError: peft rejects an option, a name in the options matches no module, or the embeddings of new
            tokens cannot be trained.
    """
    # Optional, and slow to import.
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if lora.load_in_4bit:
        model = prepare_model_for_kbit_training(model, training.gradient_checkpointing)
    tied, targets = has_tied_head(model), lora.lora_target_modules or [ALL_LINEAR]
    settings = lora_settings(lora)
    if new_tokens:
        embeddings = embeddings_to_train(model, targets, new_tokens)
        settings |= {"modules_to_save": embeddings, "ensure_weight_tying": tied}
    options, names = lora_options(lora), [name for name, _ in model.named_modules()]
    set_seed(training.seed)  # ranks may have drawn different random numbers while loading
    flags = f"--lora_target_modules {' '.join(targets)}"
    try:
        config = LoraConfig(**settings, **options)
        adapted = get_peft_model(
            model, config, autocast_adapter_dtype=not needs_model_dtype(model, new_tokens)
        )
    except ValueError as error:
        flags += f" --lora_args {lora.lora_args}" if lora.lora_args is not None else ""
        raise UserError(f"{flags}: {' '.join(str(error).split())}") from None
    check_matches(options, targets, names, adapted.base_model.targeted_module_names)
    if new_tokens:
        check_embeddings_trained(adapted, new_tokens, tied)
        # By default, peft would save the embeddings a second time if their number of rows has changed.
        adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    folder = Path(name).expanduser()
    if folder.is_dir():  # absolute, so that the adapters can be loaded from any folder
        adapted.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    training.label_names = ["labels"]  # Trainer cannot derive it from a model with adapters
    return adapted


def lora_settings(lora: LoraArguments) -> dict[str, Any]:
    """Return the arguments of peft's LoraConfig that have flags of their own."""
    assert lora.lora_r is not None
    targets = lora.lora_target_modules or [ALL_LINEAR]
    return {
        "task_type": "CAUSAL_LM",
        "r": lora.lora_r,
        "lora_alpha": lora.lora_alpha or 2 * lora.lora_r,
        "lora_dropout": lora.lora_dropout or 0.0,
        "target_modules": ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    }


def needs_model_dtype(model: PreTrainedModel, new_tokens: Sequence[str]) -> bool:
    """Return whether adapters need the dtype of the model instead of float32.

    ZeRO-3 trains weights of one dtype only, and the embeddings of new tokens have that of the model. It keeps
    float32 master weights of all of them.
    """
    return bool(new_tokens) and is_partitioned(model)


def has_tied_head(model: Any) -> bool:
    """Return whether the input and output embedding of a model, or of adapters, share their weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def embeddings_to_train(
    model: PreTrainedModel, targets: Sequence[str], new_tokens: Sequence[str]
) -> list[str]:
    """Return the names of the input and output embedding; of tied ones, only that of the input embedding.

    Args:
        model: model to adapt.
        targets: names of `--lora_target_modules`.
        new_tokens: tokens that the vocabulary of the saved model lacks.

    Raises:
        UserError: they are to get an adapter, which peft would ignore, or a tied output embedding has a bias,
            which peft would leave out.
    """
    reason = f"{' '.join(new_tokens)} had to be added to the vocabulary"
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules() if module in (source, head)}
    for target in targets:
        if _names_any(target, list(names.values())):
            raise UserError(
                f"--lora_target_modules {target}: {reason}, so the input and output embedding are trained as "
                "a whole and get no adapter; leave it out"
            )
    if not has_tied_head(model):
        return list(names.values())
    if head.bias is not None:
        raise UserError(
            f"--lora_r: {reason}, and peft cannot train an output embedding that has a bias and shares its "
            "weight with the input embedding; train all weights (without --lora_r)"
        )
    return [names[source]]


def check_embeddings_trained(adapted: Any, new_tokens: Sequence[str], tied: bool) -> None:
    """Raise `UserError` unless the embeddings of new tokens are trained, and tied as those of the model."""
    modules = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    is_trained = all(module is None or module.weight.requires_grad for module in modules)
    if not is_trained or has_tied_head(adapted) != tied:
        raise UserError(
            f"--lora_r: {' '.join(new_tokens)} had to be added to the vocabulary, and peft does not train "
            "the embeddings of this architecture; train all weights (without --lora_r)"
        )


def embeddings_note(adapted: Any, new_tokens: Sequence[str]) -> str:
    """Return a note that the embeddings of new tokens are trained, with the number of weights."""
    modules = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    weights = dict.fromkeys(module.weight for module in modules if module is not None)
    count = sum(map(element_count, weights)) / 1e6
    trained = "input and output embedding are" if len(weights) > 1 else "the embedding, input and output, is"
    return (
        f"--lora_r: {' '.join(new_tokens)} had to be added to the vocabulary, so {trained} trained as a "
        f"whole and saved with the adapters: {count:,.2f} M weights in addition to those of the adapters"
    )


def check_matches(
    options: Mapping[str, Any], targets: Sequence[str], modules: Sequence[str], adapted: Sequence[str]
) -> None:
    """Check that every name in the LoRA flags matches a module; peft ignores those that match none.

    Args:
        options: those of `--lora_args`.
        targets: names of `--lora_target_modules`.
        modules: names of all modules of the model.
        adapted: names of the modules that get an adapter.

    Raises:
        UserError: a name matches no module.
    """
    for name in targets:
        if name != ALL_LINEAR and not _names_any(name, modules):
            raise UserError(f"--lora_target_modules {name}: matches no module of the model")
    excluded = options.get("exclude_modules", [])
    if isinstance(excluded, str):
        unmatched = [] if any(re.fullmatch(excluded, module) for module in modules) else [excluded]
    else:
        unmatched = [name for name in excluded if not _names_any(name, modules)]
    if unmatched:
        raise UserError(f"--lora_args: exclude_modules {unmatched[0]} matches no module of the model")
    layers = options.get("layers_to_transform", [])
    expressions = {  # as peft compares them
        "rank_pattern": {name: rf"(.*\.)?({name})$" for name in options.get("rank_pattern", {})},
        "alpha_pattern": {name: rf"(.*\.)?({name})$" for name in options.get("alpha_pattern", {})},
        "layers_to_transform": {
            str(layer): rf".*?\.{layer}\." for layer in ([layers] if isinstance(layers, int) else layers)
        },
    }
    for option, patterns in expressions.items():
        for name, pattern in patterns.items():
            if not any(re.match(pattern, module) for module in adapted):
                raise UserError(
                    f"--lora_args: {option} {name} matches none of the {len(adapted)} modules that get an "
                    f"adapter, such as {adapted[0]}"
                )


def _names_any(name: str, modules: Sequence[str]) -> bool:
    """Return whether a name is that of a module, or the end of it."""
    return any(module == name or module.endswith(f".{name}") for module in modules)


def pack_linear(model: PreTrainedModel) -> None:
    """Change the linear layers of a model on the meta device to the shapes of packed 4-bit weights."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            packed = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
            module.weight = nn.Parameter(packed, requires_grad=False)


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters, without importing peft."""
    if "peft" not in sys.modules:  # peft is not imported, so the model cannot be a peft model
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def write_base_record(folder: Path, model: nn.Module, shapes: str) -> None:
    """Write the record of the base model next to saved adapters.

    Args:
        folder: folder of the adapters.
        model: model with adapters.
        shapes: its `shapes_digest`, taken before it was sharded.
    """
    if vars(model.config).get("quantization_config") is not None:
        shapes = ""  # packed weights have different shapes from the model that adapters are merged into
    record = {"sizes": model_sizes(model), "shapes": shapes}
    write_atomically(folder / BASE_RECORD, [json.dumps(record, indent=1), "\n"])


def model_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the sizes in a model's configuration that do not depend on quantization."""
    config = model.config.get_text_config()
    return {"vocab_size": config.vocab_size, "num_hidden_layers": config.num_hidden_layers}


def base_model_mismatch(folder: Path, model: nn.Module) -> str | None:
    """Describe how a model differs from the one that adapters were trained on; None if it does not.

    Adapters from other programs have no such record, so their model is unknown.

    Args:
        folder: folder of the adapters.
        model: model with the adapters loaded.

    Raises:
        UserError: the record cannot be read.
    """
    path = folder / BASE_RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        sizes, shapes = dict(record["sizes"]), record["shapes"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); it is damaged; use the adapters of "
            "another checkpoint"
        ) from None
    for name, size in model_sizes(model).items():
        if sizes.get(name) != size:
            return f"its {name} is {size} instead of {sizes.get(name)}"
    if shapes and shapes_digest(model) != shapes:
        return "its weights have other names or shapes"
    return None
