"""Merge LoRA adapters into the model they were trained on.

    python scripts/merge_lora.py runs/lora merged
    python scripts/merge_lora.py runs/lora merged --dtype bfloat16 --base MODEL

The merged model gets the tokenizer and the generation settings that are saved with the adapters. Before the
output folder takes its final name, the saved model is loaded again: its logits must match those of the base
model with its adapters.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.arguments.lora import PEFT_VERSION, check_installed
from dft.arguments.model import DTYPES
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors, flush_to_disk
from dft.ranks import quiet_libraries
from dft.saved_adapters import add_rows
from dft.training.checkpoints.disk import disk_fault
from dft.training.checkpoints.folder import MAX_REASON, unfinished
from dft.training.checkpoints.verify import (
    MAX_DIFFERENCE,
    Damaged,
    Expected,
    check_files,
    check_logits,
    check_tensor,
    check_tokenizer,
    dtypes_of,
    probe,
    tensors_of,
    weight_files,
)
from dft.training.model.adapters import base_model_mismatch
from dft.training.model.companion_files import copy_companions
from dft.training.model.quantized import dequantization
from dft.training.model.weight_names import source_names
from dft.training.patches import keep_source_names

CPU = torch.device("cpu")
UNREADABLE = (*UNLOADABLE, RuntimeError, SafetensorError)
"""Exceptions raised while a damaged model, tokenizer or configuration is loaded."""


def merge(adapters: Path, output: Path, base: str | None, dtype: str, trust_remote_code: bool) -> None:
    """Merge adapters into their base model and write the result with its tokenizer.

    Args:
        adapters: output directory or checkpoint of a run with `--lora_r`.
        output: the new folder.
        base: the base model. Default: the one that the adapters name.
        dtype: dtype of the base model during the merge, and of the result; "auto" for the dtype of its files.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        UserError: a folder without adapters, an output that exists, a base model other than the one the
            adapters were trained on, or a merged model that fails its verification.
    """
    check_installed("peft", "merge_lora.py", PEFT_VERSION)
    with staging_folder(output) as staging:
        tensors = load_adapter_tensors(adapters)
        with convert_load_errors(adapters, f"is {ADAPTER_CONFIG_NAME} damaged? Use another checkpoint"):
            recorded_base = base_model_name(adapters)
        name = base or recorded_base
        if name is None:
            raise UserError(f"{adapters}: {ADAPTER_CONFIG_NAME} names no base model; name it by --base")
        with convert_load_errors(
            adapters, "the tokenizer and the generation settings of the run must be in this folder"
        ):
            tokenizer = AutoTokenizer.from_pretrained(adapters, trust_remote_code=trust_remote_code)
            generation = None
            if (adapters / GENERATION_CONFIG_NAME).is_file():
                generation = GenerationConfig.from_pretrained(adapters)
        model = load_base_model(name, dtype, trust_remote_code)
        add_rows(model, adapters)
        adapted = attach_adapters(model, name, adapters, tensors)
        logits = probe(adapted, adapted.config.get_text_config().vocab_size, CPU)
        untie_embeddings(adapted.get_base_model())
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # catches non-finite values
            raise UserError(
                f"{adapters}: cannot be merged into {name} as {model.dtype}: {one_line(error)}; --dtype "
                "float32 holds larger values"
            ) from None
        if generation is not None:
            merged.generation_config = generation
        write_verified(merged, tokenizer, staging, output, logits, trust_remote_code)
        staging.rename(output)
        flush_to_disk(output.parent)


@contextmanager
def convert_load_errors(source: Path | str, remedy: str) -> Iterator[None]:
    """Convert exceptions raised while files of a model are loaded into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{source}: {one_line(error)}; {remedy}") from None


def one_line(error: Exception) -> str:
    """Return the type and message of an exception as one line of limited length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_REASON]


def base_model_name(adapters: Path) -> str | None:
    """Return the name of the base model that is stored with adapters.

    Raises:
        UserError: adapters of a type other than LoRA.
    """
    from peft import LoraConfig, PeftConfig  # optional

    config = PeftConfig.from_pretrained(adapters)
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"{adapters}: holds {config.peft_type.value} adapters; only LoRA adapters can be merged"
        )
    return config.base_model_name_or_path


def load_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Load the tensors of saved adapters, by name.

    Raises:
        UserError: no adapters, or damaged ones.
    """
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{folder}: holds no adapters ({ADAPTER_CONFIG_NAME})")
    try:
        files = weight_files(folder, "adapter_model")
        tensors = {name: tensor for file in files for name, tensor in tensors_of(file)}
        if not tensors:
            raise Damaged("it has no weights (adapter_model.safetensors)")
        for name, tensor in tensors.items():
            check_tensor(name, tensor, frozenset({tensor.dtype}))
    except Damaged as error:
        raise UserError(f"{folder}: {error}; use the adapters of another checkpoint") from None
    return tensors


def load_base_model(name: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load the base model.

    Raises:
        UserError: it cannot be loaded, or its files lack weights.
    """
    with convert_load_errors(name, "name the model that the adapters were trained on by --base"):
        dequantized = dequantization(name)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **({} if dequantized is None else {"quantization_config": dequantized}),
        )
    if loading["missing_keys"]:  # transformers has initialized these at random
        raise UserError(
            f"{name}: has no {min(loading['missing_keys'])} in its files; name a complete model by --base"
        )
    keep_source_names(model, source_names(name))
    return model


def attach_adapters(model: PreTrainedModel, name: str, folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """Return the model with all of its adapters.

    peft ignores saved adapters for which the model has no module, and initializes missing ones. Both are
    rejected here.

    Args:
        model: the base model.
        name: its name.
        folder: the folder of the adapters.
        tensors: their tensors.

    Raises:
        UserError: the adapters were trained on a different model.
    """
    from peft import PeftModel, get_peft_model_state_dict  # optional

    def mismatch(reason: str) -> UserError:
        return UserError(
            f"{name}: is not the model that the adapters in {folder} were trained on: {reason}; name that "
            "model by --base"
        )

    if model._hf_peft_config_loaded:  # peft would overwrite its adapters
        raise mismatch("it has adapters itself")
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (*UNLOADABLE, RuntimeError) as error:  # a module that is missing or has another shape
        raise mismatch(one_line(error)) from None
    adapted.peft_config["default"].base_model_name_or_path = name  # peft reads the vocabulary size from there
    # If modules are trained as a whole, their weights are saved once, whatever the number of rows.
    embeddings: Any = False if adapted.peft_config["default"].modules_to_save else "auto"
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=embeddings)
    surplus, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    if surplus:
        raise mismatch(f"it has no module for {len(surplus)} of {len(tensors)} tensors, such as {surplus[0]}")
    if missing:
        raise mismatch(
            f"{len(missing)} of the {len(expected)} tensors for its modules are missing, such as {missing[0]}"
        )
    reason = base_model_mismatch(folder, adapted)
    if reason is not None:
        raise mismatch(reason)
    return adapted


def untie_embeddings(model: PreTrainedModel) -> None:
    """Give input and output embeddings separate weights if they are tied and one of them has an adapter.

    Otherwise the adapter would be merged into both. peft records the change in the model's configuration.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # optional

    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    source, head = (
        module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in modules
    )
    has_adapter = any(isinstance(module, BaseTunerLayer) for module in modules)
    if has_adapter and head is not None and head.weight is source.weight:
        head.weight = nn.Parameter(source.weight.detach().clone())


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """Create an empty folder next to the output and remove it afterwards unless it was renamed.

    Raises:
        UserError: the output exists and is not an empty folder, or cannot be written to.
    """
    staging = unfinished(output)
    with convert_write_errors(output, "output"):
        # A folder cannot be renamed to the mount point of a file system.
        if output.exists() and (not output.is_dir() or output.is_mount() or any(output.iterdir())):
            raise UserError(f"{output}: exists already; name a new folder")
        if staging.exists():  # left by a merge that was killed
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_verified(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    output: Path,
    logits: Tensor,
    trust_remote_code: bool,
) -> None:
    """Write a model with its tokenizer, load it again, and compare its logits.

    Args:
        model: the merged model.
        tokenizer: its tokenizer.
        folder: target folder.
        output: the final name of the folder, for messages.
        logits: (tokens, vocab) logits of the base model with its adapters, from `probe`.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        UserError: the folder cannot be written to, or the saved model differs.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_companions(model.config.name_or_path, folder)
        for path in folder.iterdir():
            flush_to_disk(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_fault(error, folder.parent)
        if reason is None:
            raise
        raise UserError(f"output {output}: cannot be written: {reason}; name a folder elsewhere") from None
    try:
        check_files(folder, Expected(dtypes_of(model), tokenizer, None))
        reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_logits(
            probe(reloaded, logits.shape[-1], CPU), logits, MAX_DIFFERENCE[model.dtype.itemsize == 2]
        )
        check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), tokenizer)
    except Damaged as error:
        raise UserError(f"{output}: not written; the merged model failed its check: {error}") from None


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", type=Path, help="output directory or checkpoint of a run with --lora_r")
    parser.add_argument("output", type=Path, help="folder for the merged model: a new or an empty one")
    parser.add_argument("--base", help="the base model (default: the one that the adapters name)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="dtype of the result (auto: as the base model)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    options = parser.parse_args()
    quiet_libraries()
    merge(options.adapters, options.output.resolve(), options.base, options.dtype, options.trust_remote_code)
    print(f"merged: {options.output} (AutoModelForCausalLM.from_pretrained loads it)")


if __name__ == "__main__":
    main()
