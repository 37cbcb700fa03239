"""Make one model of adapters and the model they were trained on.

    python scripts/merge_lora.py runs/lora merged
    python scripts/merge_lora.py runs/lora merged --dtype bfloat16 --base MODEL

The merged model gets the tokenizer and the generation settings that lie beside the adapters, and is verified:
it is loaded again and has to give the logits of the two. Only then it takes its name.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.arguments.lora import PEFT, require
from dft.arguments.model import DTYPES
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors, flush_to_disk
from dft.ranks import quiet_libraries
from dft.training.checkpoints.disk import disk_fault
from dft.training.checkpoints.folder import MOST_SAID, unfinished
from dft.training.checkpoints.verify import (
    APART,
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

CPU = torch.device("cpu")
UNREADABLE = (*UNLOADABLE, RuntimeError, SafetensorError)
"""What is raised for files that do not hold what they should."""


def merge(adapters: Path, output: Path, base: str | None, dtype: str, trust_remote_code: bool) -> None:
    """Raises `UserError` for a folder without adapters, one that exists already, a base that is not the one
    they were trained on, or a merge that failed."""
    require("peft", "merge_lora.py", PEFT)
    with writing_place(output) as staging:
        tensors = stored_adapters(adapters)
        with reading(adapters, f"is {ADAPTER_CONFIG_NAME} damaged? Take another checkpoint"):
            remembered = base_of(adapters)
        name = base or remembered
        if name is None:
            raise UserError(f"{adapters}: {ADAPTER_CONFIG_NAME} names no model; name it by --base")
        with reading(adapters, "the tokenizer and the generation settings of the run belong beside them"):
            tokenizer = AutoTokenizer.from_pretrained(adapters, trust_remote_code=trust_remote_code)
            generation = None
            if (adapters / GENERATION_CONFIG_NAME).is_file():
                generation = GenerationConfig.from_pretrained(adapters)
        with reading(name, "name the model that the adapters were trained on by --base"):
            model, loading = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        if loading["missing_keys"]:  # which were drawn at random
            lost = min(loading["missing_keys"])
            raise UserError(f"{name}: has no {lost} in its files; name a whole model by --base")
        adapted = with_adapters(model, name, adapters, tensors)
        logits = probe(adapted, adapted.config.get_text_config().vocab_size, CPU)
        untie(adapted.get_base_model())
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # values that are not finite
            raise UserError(
                f"{adapters}: cannot be merged into {name} as {model.dtype}: {said(error)}; --dtype float32 "
                "holds larger values"
            ) from None
        if generation is not None:
            merged.generation_config = generation
        write(merged, tokenizer, staging, output, logits, trust_remote_code)
        staging.rename(output)
        flush_to_disk(output.parent)


# ---- what is given ----


@contextmanager
def reading(what: Path | str, remedy: str) -> Iterator[None]:
    """Makes one error of whatever the files of a model are found to hold."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{what}: {said(error)}; {remedy}") from None


def said(error: Exception) -> str:
    """What a library says, in one line that is not as long as a model has modules."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_SAID]


def base_of(adapters: Path) -> str | None:
    """The model that adapters remember."""
    from peft import LoraConfig, PeftConfig  # optional

    config = PeftConfig.from_pretrained(adapters)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{adapters}: holds {config.peft_type.value} adapters; those of --lora_r are merged")
    return config.base_model_name_or_path


def stored_adapters(folder: Path) -> dict[str, Tensor]:
    """What the file of the adapters holds, by name."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{folder}: holds no adapters ({ADAPTER_CONFIG_NAME})")
    try:
        files = weight_files(folder, "adapter_model")
        tensors = {name: one for file in files for name, one in tensors_of(file)}
        if not tensors:
            raise Damaged("it has no weights (adapter_model.safetensors)")
        for name, tensor in tensors.items():
            check_tensor(name, tensor, frozenset({tensor.dtype}))
    except Damaged as found:
        raise UserError(f"{folder}: {found}; take the adapters of another checkpoint") from None
    return tensors


def with_adapters(model: PreTrainedModel, name: str, folder: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """The model with all of its adapters.

    peft itself leaves out adapters that a model has no module for, and makes new ones where some are missing.
    """
    from peft import PeftModel, get_peft_model_state_dict  # optional

    def refusal(found: str) -> UserError:
        return UserError(
            f"{name}: is not the model that the adapters in {folder} were trained on: {found}; name that one "
            "by --base"
        )

    if model._hf_peft_config_loaded:  # peft would put these in the place of those
        raise refusal("it holds adapters itself")
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (*UNLOADABLE, RuntimeError) as error:  # a module that is not there, or has another shape
        raise refusal(said(error)) from None
    adapted.peft_config["default"].base_model_name_or_path = name  # of which peft asks the vocabulary
    taken = get_peft_model_state_dict(adapted)
    surplus, missing = sorted(tensors.keys() - taken.keys()), sorted(taken.keys() - tensors.keys())
    if surplus:
        raise refusal(f"it has no place for {len(surplus)} of {len(tensors)} tensors, as {surplus[0]}")
    if missing:
        raise refusal(f"{len(missing)} of the {len(taken)} tensors it takes are not there, as {missing[0]}")
    found = base_model_mismatch(folder, adapted)
    if found is not None:
        raise refusal(found)
    return adapted


def untie(model: PreTrainedModel) -> None:
    """Gives input and output embedding weights of their own if they share them and one has an adapter, which
    would be merged into both. peft notes it in the settings of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # optional

    both = (model.get_input_embeddings(), model.get_output_embeddings())
    source, head = (one.get_base_layer() if isinstance(one, BaseTunerLayer) else one for one in both)
    adapted = any(isinstance(one, BaseTunerLayer) for one in both)
    if adapted and head is not None and head.weight is source.weight:
        head.weight = nn.Parameter(source.weight.detach().clone())


# ---- what is written ----


@contextmanager
def writing_place(output: Path) -> Iterator[Path]:
    """An empty folder beside the one that is asked for, which is gone afterwards unless it was renamed."""
    staging = unfinished(output)
    with convert_write_errors(output, "output"):
        # Nothing can be renamed to the name of a file system.
        if output.exists() and (not output.is_dir() or output.is_mount() or any(output.iterdir())):
            raise UserError(f"{output}: is there already; name a new folder")
        if staging.exists():  # of a merge that was killed
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    output: Path,
    logits: Tensor,
    trust_remote_code: bool,
) -> None:
    """Writes a model, and looks whether it is there.

    Args:
        output: the name that the folder will have.
        logits: (tokens, vocab), of the probe under the model and its adapters.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():
            flush_to_disk(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_fault(error, folder.parent)
        if reason is None:
            raise
        raise UserError(f"output {output}: cannot be written: {reason}; name a folder elsewhere") from None
    try:
        check_files(folder, Expected(dtypes_of(model), tokenizer, None))
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
        check_logits(probe(again, logits.shape[-1], CPU), logits, APART[model.dtype.itemsize == 2])
        check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), tokenizer)
    except Damaged as found:
        raise UserError(
            f"{output}: not written, for the merged model is not what it should be: {found}"
        ) from None


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", type=Path, help="output directory or checkpoint of a run with --lora_r")
    parser.add_argument("output", type=Path, help="folder for the merged model")
    parser.add_argument("--base", help="the model, if it is not where the adapters say")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: as the model is")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    given = parser.parse_args()
    quiet_libraries()
    merge(given.adapters, given.output.resolve(), given.base, given.dtype, given.trust_remote_code)
    print(f"merged: {given.output} (AutoModelForCausalLM.from_pretrained loads it)")


if __name__ == "__main__":
    main()
