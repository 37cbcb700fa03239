"""Check that a saved model equals the trained one and can be loaded.

Some faulty saves look complete: weights without elements under ZeRO-3, half of a sharded model, an adapter
without its base model. Without a check, they would be noticed weeks later, when the model is used. The check
finds them before the save replaces an earlier one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from dft.console import say
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError
from dft.ranks import first_failure
from dft.saved_adapters import load_adapters
from dft.training.model.adapters import has_adapters
from dft.training.model.quantized import loaded_quantization
from dft.training.model.weight_names import expected_names
from dft.training.parameters import GIB

PROBE_TOKENS = 16
MAX_DIFFERENCE = {True: 0.1, False: 0.01}
"""Maximum difference of logits relative to their norm, in half precision (True) and in float32 (False).
They are computed with a different attention implementation, possibly on a different device. Logits of
different weights differ by about 1."""
LOADING_MEMORY_FACTOR = 1.2
"""Memory that loading a model takes, relative to the size of its weights."""


class Damaged(Exception):
    """Raised when a saved model is damaged. The message describes the fault."""


@dataclass(frozen=True)
class Expected:
    """Reference values for checking a saved model.

    Attributes:
        dtypes: dtypes of the floating-point tensors that were trained.
        tokenizer: None if the trainer has none.
        logits: (tokens, vocab), float32, of the probe under the model in memory; None to check the files
            only.
        quantization: quantization of the frozen weights (QLoRA), without which the logits would differ.
        names: names of the weights in the files that the model was loaded from; None to allow any.
    """

    dtypes: frozenset[torch.dtype]
    tokenizer: PreTrainedTokenizerBase | None
    logits: Tensor | None
    quantization: QuantizationConfigMixin | None = None
    names: frozenset[str] | None = None


def dtypes_of(model: nn.Module) -> frozenset[torch.dtype]:
    """Return the floating-point dtypes of all saved tensors of a model.

    The state_dict is not used: under FSDP, all ranks would have to request it.
    """
    tensors: list[Tensor] = list(model.parameters())
    for module in model.modules():
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        tensors += [buffer for name in saved if (buffer := module._buffers[name]) is not None]
    return frozenset(tensor.dtype for tensor in tensors if tensor.is_floating_point())


# ---- the files ----


def check_files(folder: Path, expected: Expected) -> None:
    """Check the files of a saved model, without loading it.

    Raises:
        Damaged: a file is missing, or a tensor is empty, not finite, or has a wrong dtype or name.
    """
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    config = folder / (ADAPTER_CONFIG_NAME if is_adapter else CONFIG_NAME)
    if not config.is_file():
        raise Damaged(f"it has no {config.name}")
    if expected.tokenizer is not None and not (folder / TOKENIZER_CONFIG_FILE).is_file():
        raise Damaged(f"it has no {TOKENIZER_CONFIG_FILE}")
    names = set()
    for file in weight_files(folder, "adapter_model" if is_adapter else "model"):
        for name, tensor in tensors_of(file):
            names.add(name)
            check_tensor(name, tensor, expected.dtypes)
    if not names:
        raise Damaged("it has no weights (*.safetensors)")
    if not is_adapter and expected.names is not None:
        check_names(names, expected.names)


def check_names(names: set[str], expected: frozenset[str]) -> None:
    """Raise `Damaged` for weights with other names than in the loaded model, which other programs expect.

    The loaded model may have more weights: vision towers that were not loaded, or tied weights saved twice.
    """
    new = sorted(names - expected)
    if new:
        raise Damaged(
            f"{len(new)} of {len(names)} weights have names that the loaded model does not have, such as "
            f"{new[0]}; other programs would not find them"
        )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the weight files listed in the index, or the only one.

    Args:
        folder: folder of the saved model.
        stem: stem of their names.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [file for file in (folder / f"{stem}.safetensors",) if file.is_file()]
    files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise Damaged(f"it has no {file.name}, which {index.name} names")
    return files


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor in a file."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is not a mapping
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise Damaged(f"{file.name} cannot be read: {error}") from None


def check_tensor(name: str, tensor: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """Raise `Damaged` for a tensor that is empty, of a dtype that was not trained, or not finite."""
    if not tensor.numel():
        raise Damaged(f"{name} has no elements (shape {list(tensor.shape)})")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in dtypes:
        trained = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise Damaged(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and was trained as {trained}")
    if not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):  # both are NaN if any is
        raise Damaged(f"{name} holds values that are not finite (NaN, infinity)")


# ---- the model ----


def probe(model: nn.Module, vocab: int, device: torch.device) -> Tensor:
    """Return the logits of a few tokens, (tokens, vocab), in float32 on the CPU. All ranks must call this.

    Does not consume random numbers.
    """
    ids = (torch.arange(PROBE_TOKENS) * 7919 % vocab)[None].to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits[0].float().cpu()
    finally:
        model.train(was_training)


def check_loaded(
    folder: Path, expected: Expected, args: transformers.TrainingArguments, trust_remote_code: bool
) -> None:
    """Raise `Damaged` if `AutoModelForCausalLM` cannot load the model, or its logits differ.

    Print a note instead if there is not enough memory to load it in addition to the trained one.
    """
    assert expected.logits is not None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    needed = size * LOADING_MEMORY_FACTOR
    device = device_with_room(needed, args)
    if device is None:
        say(
            f"note        {folder} was not loaded to be verified, only read: {needed / GIB:.1f} GiB of "
            f"memory are needed, and {psutil.virtual_memory().available / GIB:.1f} GiB are free"
        )
        return
    # Under ZeRO-3, this process would load a partitioned model.
    unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]):
            options: dict[str, Any] = {
                "dtype": "auto",
                "trust_remote_code": trust_remote_code,
                "quantization_config": expected.quantization,
                "device_map": None if expected.quantization is None else {"": device},
            }
            model: Any = load_adapters(folder, **options)
            loading: dict[str, Any] = {}
            if model is None:
                model, loading = AutoModelForCausalLM.from_pretrained(
                    folder, **options, output_loading_info=True
                )
            model.config.get_text_config().use_cache = False  # as in training
            model = model if expected.quantization is not None else model.to(device)
            logits = probe(model, expected.logits.shape[-1], device)
        tokenizer = None
        if expected.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*UNLOADABLE, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Damaged(f"it cannot be loaded: {reason}") from None
    finally:
        if args.deepspeed:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
    missing = loading.get("missing_keys") or loading.get("mismatched_keys")
    if missing:
        raise Damaged(f"{min(missing)} is not in its files in the shape that the model expects")
    if tokenizer is not None:
        check_tokenizer(tokenizer, expected.tokenizer)
    is_half = args.bf16 or args.fp16 or any(dtype.itemsize == 2 for dtype in expected.dtypes)
    check_logits(logits, expected.logits, MAX_DIFFERENCE[is_half])


def device_with_room(needed: float, args: transformers.TrainingArguments) -> torch.device | None:
    """Return a device with `needed` bytes of free memory; None if there is none."""
    if psutil.virtual_memory().available < needed:
        return None
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(args.device)[0] > needed:
            return args.device
    # Liger replaces the layers of every model in this process with layers that run only on GPUs.
    return None if args.use_liger_kernel and args.device.type != "cpu" else torch.device("cpu")


def check_tokenizer(loaded: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase) -> None:
    """Raise `Damaged` for a tokenizer with a different vocabulary or chat template."""
    if loaded.get_vocab() != expected.get_vocab():
        raise Damaged("its tokenizer has another vocabulary than the one that was trained with")
    if loaded.chat_template != expected.chat_template:
        raise Damaged("its chat template is not the one that was trained with")


def check_logits(logits: Tensor, expected: Tensor, limit: float) -> None:
    """Raise `Damaged` if logits, (tokens, vocab), differ by more than `limit` of their norm."""
    if logits.shape != expected.shape:
        raise Damaged(f"its logits have the shape {list(logits.shape)} instead of {list(expected.shape)}")
    # The median over the tokens, since rounding may send a token to another expert.
    centered = expected - expected.mean(-1, keepdim=True)
    shifted = logits - logits.mean(-1, keepdim=True)
    difference = ((shifted - centered).norm(dim=-1) / centered.norm(dim=-1).clamp_min(1e-6)).median().item()
    if not difference <= limit:
        raise Damaged(
            f"it gives different logits after reloading than in memory: they differ by {difference:.2g} "
            f"of their norm, and rounding explains {limit:g}"
        )


# ---- the check of a run ----


class SaveVerifier:
    """Checks every model that a run saves against the one in memory.

    Args:
        policy: "True" reloads final models and reads the files of checkpoints, "all" reloads both, "False"
            disables the check.
        args: the training arguments.
        tokenizer: saved along with the model, if any.
        trust_remote_code: whether to run code that comes with the model when it is reloaded.
        accelerator: the run's accelerator.
    """

    def __init__(
        self,
        policy: str,
        args: transformers.TrainingArguments,
        tokenizer: PreTrainedTokenizerBase | None,
        trust_remote_code: bool,
        accelerator: Accelerator,
    ) -> None:
        self._policy = policy
        self._args = args
        self._tokenizer = tokenizer
        self._trust_remote_code = trust_remote_code
        self._accelerator = accelerator

    def check(
        self, staging: Path, folder: Path, model: PreTrainedModel, forward: Any, is_checkpoint: bool
    ) -> None:
        """Check the model that was just written to `staging`. All ranks must call it.

        Args:
            staging: folder it was written to; removed only if the check succeeds.
            folder: its final folder.
            model: the trained model.
            forward: the same, wrapped for training.
            is_checkpoint: whether it is part of a checkpoint, rather than a final model.

        Raises:
            UserError: the saved model differs from the trained one.
        """
        self._accelerator.wait_for_everyone()
        if self._policy == "False":
            return
        logits = None
        if self._policy == "all" or not is_checkpoint:
            vocab = model.config.get_text_config().vocab_size
            with torch.compiler.set_stance("force_eager"):  # compiles nothing for this small batch
                logits = probe(forward, vocab, self._args.device)
        # The other ranks hold no weights to save, even under --save_on_each_node True.
        fault = self._fault(staging, model, logits) if self._accelerator.is_main_process else None
        fault = first_failure(fault)
        if fault is not None:
            raise UserError(
                f"--verify_save {self._policy}: the model that was just saved is not the one that was "
                f"trained: {fault}; it is in {staging}, and the files that {folder} held before are "
                "unchanged. Please report this; --verify_save False saves without checking"
            )

    def _fault(self, staging: Path, model: PreTrainedModel, logits: Tensor | None) -> str | None:
        """Return the fault of a saved model, or None. Reloads the model if `logits` are given."""
        names = None if has_adapters(model) else expected_names(model)
        expected = Expected(dtypes_of(model), self._tokenizer, logits, loaded_quantization(model), names)
        try:
            check_files(staging, expected)
            if logits is not None:
                check_loaded(staging, expected, self._args, self._trust_remote_code)
        except Damaged as fault:
            return str(fault)
        return None
