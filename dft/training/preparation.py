"""Check and complete what `DFTTrainer` is created with: training arguments and collator."""

import os
from collections.abc import Mapping
from typing import Any

import transformers
from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY
from torch import nn

from dft.arguments.loss_settings import check_cache, check_loss_settings, layer_kernels
from dft.arguments.objective import FUSED_HEAD
from dft.arguments.watch import NONFINITE_POLICIES
from dft.errors import check_choice
from dft.loss.objectives import Objective
from dft.ranks import sequence_parallel_size
from dft.training.batching import choose_collator, is_packed, longest_row, padding_id
from dft.training.parallel.sequence_parallel import check_shared_data, resolve_parallel_collator

LAYERS_VARIABLE = "FSDP_TRANSFORMER_CLS_TO_WRAP"
"""Environment variable of accelerate that names the layer classes."""


def prepare_arguments(
    model: nn.Module | None,
    args: transformers.TrainingArguments,
    options: Mapping[str, Any],
    fused_head: str,
    on_nonfinite: str,
) -> None:
    """Check the arguments of a trainer and set those that have only one valid value.

    Args:
        model: the model to train.
        args: the training arguments.
        options: the other arguments of `transformers.Trainer`.
        fused_head: see `DFTTrainer`.
        on_nonfinite: see `DFTTrainer`.

    Raises:
        ValueError: there is no model, or arguments would change the meaning of the loss.
    """
    if model is None:
        raise ValueError(
            "model is None: DFTTrainer needs the model itself, because its loss depends on it; pass "
            "model=model_init() instead of model_init"
        )
    check_loss_settings(args)
    if (
        args.fsdp_plugin_args is not None
        and args.fsdp_plugin_args["auto_wrap_policy"] == FSDP_AUTO_WRAP_POLICY[0]
    ):
        names = args.fsdp_plugin_args.get("transformer_cls_names_to_wrap") or os.environ.get(LAYERS_VARIABLE)
        layers = resolve_sharded_layers(model, names.split(",") if names else None)
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(layers)
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func would replace the DFT loss; use transformers.Trainer instead")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size: the search of transformers.Trainer continues with weights that are "
            "trained already and makes optimizer steps smaller; use RunOptions(requested_batch=...) instead"
        )
    check_choice("fused_head", fused_head, FUSED_HEAD)
    check_choice("on_nonfinite", on_nonfinite, NONFINITE_POLICIES)
    if args.accelerator_config.dispatch_batches is None:
        # By default, accelerate splits the batches of a stream itself, and slices all their tensors alike.
        args.accelerator_config.dispatch_batches = False
    if args.use_liger_kernel:
        args.liger_kernel_config = layer_kernels(args.liger_kernel_config)


def resolve_sharded_layers(model: nn.Module, names: list[str] | None) -> list[str]:
    """Return the names of the layer classes that FSDP shards one by one.

    transformers lists those of all parts that an architecture may have, and accelerate requires that the
    model has each of them. The text part of a multimodal architecture does not.

    Args:
        model: the model to train.
        names: names that the user set; None to use those that transformers lists.

    Raises:
        ValueError: the model has no layer of such a class.
    """
    classes = {type(module).__name__ for module in model.modules()}
    unknown = sorted(set(names or ()) - classes)
    if unknown:
        raise ValueError(
            f"--fsdp_config: transformer_layer_cls_to_wrap names {unknown[0]}, and the model has no such "
            "layer; leave it out, or name the class of its decoder layers"
        )
    listed: Any = model._no_split_modules
    layers = names or sorted(classes & set(listed or ()))
    if not layers:
        raise ValueError(
            f"--fsdp True: transformers does not know the decoder layers of {type(model).__name__}; name "
            "their class as transformer_layer_cls_to_wrap in --fsdp_config, or use --deepspeed zero3"
        )
    return layers


def resolve_collator(
    model: nn.Module,
    args: transformers.TrainingArguments,
    collator: Any,
    objective: Objective,
    datasets: Mapping[str, Any],
) -> Any:
    """Return the given collator, or choose one that suits the model and the data.

    Args:
        model: the model to train.
        args: the training arguments.
        collator: the user's collator; None to choose one.
        objective: the training objective.
        datasets: `train_dataset` and `eval_dataset`, if given.

    Raises:
        ValueError: no collator is suitable, or the given one is not.
    """
    train_dataset = datasets.get("train_dataset")
    if (size := sequence_parallel_size(args)) > 1:
        check_shared_data(train_dataset, objective)
        packed = is_packed(train_dataset, datasets.get("eval_dataset"))
        collator = resolve_parallel_collator(model, padding_id(model), collator, packed, size)
    elif collator is None:
        collections = (train_dataset, datasets.get("eval_dataset"))
        longest = longest_row(*collections) if (packed := is_packed(*collections)) else None
        collator = choose_collator(model, padding_id(model), packed, longest)
    check_cache(args, collator)
    return collator
