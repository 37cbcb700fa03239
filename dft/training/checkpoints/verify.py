"""Whether a model that was just written is the one that was trained, and whether it can be loaded.

Saves that look complete and hold nothing (weights of no elements under ZeRO-3, a half of a sharded model, an
adapter without its base) are found out by whoever wants to use the model, weeks later. Here they are found
before the save takes the place of an earlier one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from dft.console import say
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError
from dft.ranks import first_failure
from dft.training.parameters import GIB

PROBE_TOKENS = 16
APART = {True: 0.1, False: 0.01}
"""By how much logits may differ, of their norm, in half precision and in float32: they are computed by
another attention and maybe on another device. Those of other weights differ by about 1."""
ROOM = 1.2
"""Times the size of its weights that a model takes while it is loaded."""


class Damaged(Exception):
    """What is wrong with a saved model."""


@dataclass(frozen=True)
class Expected:
    """What a saved model is held against.

    Attributes:
        dtypes: of the floating-point tensors that were trained.
        tokenizer: None where the trainer has none.
        logits: (tokens, vocab), float32, of the probe under the model in memory; None to leave the model
            unloaded.
        quantization: how weights that are not trained are held (QLoRA): in whole precision they would give
            other logits.
    """

    dtypes: frozenset[torch.dtype]
    tokenizer: PreTrainedTokenizerBase | None
    logits: Tensor | None
    quantization: QuantizationConfigMixin | None = None


def dtypes_of(model: nn.Module) -> frozenset[torch.dtype]:
    """Of all that is saved. Not from its state_dict, which under FSDP all ranks have to ask for."""
    held = list(model.parameters())
    for module in model.modules():
        saved = module._buffers.keys() - module._non_persistent_buffers_set
        held += [module._buffers[name] for name in saved if module._buffers[name] is not None]
    return frozenset(one.dtype for one in held if one.is_floating_point())


# ---- the files ----


def check_files(folder: Path, expected: Expected) -> None:
    """Raises `Damaged` for a missing file, or a tensor of no size, of another dtype, or not finite."""
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    config = folder / (ADAPTER_CONFIG_NAME if is_adapter else CONFIG_NAME)
    if not config.is_file():
        raise Damaged(f"it has no {config.name}")
    if expected.tokenizer is not None and not (folder / TOKENIZER_CONFIG_FILE).is_file():
        raise Damaged(f"it has no {TOKENIZER_CONFIG_FILE}")
    count = 0
    for file in weight_files(folder, "adapter_model" if is_adapter else "model"):
        for name, tensor in tensors_of(file):
            count += 1
            check_tensor(name, tensor, expected.dtypes)
    if not count:
        raise Damaged("it has no weights (*.safetensors)")


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Those that the index names, or the only one."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [file for file in (folder / f"{stem}.safetensors",) if file.is_file()]
    files = sorted({folder / one for one in json.loads(index.read_text())["weight_map"].values()})
    for file in files:
        if not file.is_file():
            raise Damaged(f"it has no {file.name}, which {index.name} names")
    return files


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise Damaged(f"{file.name} cannot be read: {error}") from None


def check_tensor(name: str, tensor: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    if not tensor.numel():
        raise Damaged(f"{name} has no elements (shape {list(tensor.shape)})")
    if not tensor.is_floating_point():
        return
    if tensor.dtype not in dtypes:
        trained = ", ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
        raise Damaged(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and was trained as {trained}")
    if not all(math.isfinite(one) for one in torch.aminmax(tensor)):  # NaN is both; makes no copy
        raise Damaged(f"{name} holds values that are not finite (NaN, infinity)")


# ---- the model ----


def probe(model: nn.Module, vocab: int, device: torch.device) -> Tensor:
    """Logits (tokens, vocab), float32 on the CPU, of a few tokens; all ranks have to ask for them.

    Consumes no random numbers.
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
    """Raises `Damaged` where `AutoModelForCausalLM` loads no such model, or one with other logits.

    Says so where there is no room to load it beside the one that was trained.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    device = device_with_room(size * ROOM, args)
    if device is None:
        say(
            f"note        {folder} was not loaded to be verified, only read: {size * ROOM / GIB:.1f} GiB of "
            f"memory are needed, and {psutil.virtual_memory().available / GIB:.1f} GiB are free"
        )
        return
    # In this process, where a model would be loaded as this run's is: cut into shares.
    unset_hf_deepspeed_config()
    try:
        with torch.random.fork_rng(devices=[]):
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                trust_remote_code=trust_remote_code,
                quantization_config=expected.quantization,
                device_map=None if expected.quantization is None else {"": device},
                output_loading_info=True,
            )
            model.config.get_text_config().use_cache = False  # as in training: nothing is generated
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
    missing = loading["missing_keys"] or loading["mismatched_keys"]
    if missing:
        raise Damaged(f"{min(missing)} is not in its files as the model wants it")
    if tokenizer is not None:
        check_tokenizer(tokenizer, expected.tokenizer)
    halves = args.bf16 or args.fp16 or any(one.itemsize == 2 for one in expected.dtypes)
    check_logits(logits, expected.logits, APART[halves])


def device_with_room(needed: float, args: transformers.TrainingArguments) -> torch.device | None:
    """Where a model of so many bytes fits beside what is there."""
    if psutil.virtual_memory().available < needed:
        return None
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(args.device)[0] > needed:
            return args.device
    # The layers of Liger, which it gives to every model of this process, run on a GPU alone.
    return None if args.use_liger_kernel and args.device.type != "cpu" else torch.device("cpu")


def check_tokenizer(found: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase) -> None:
    if found.get_vocab() != expected.get_vocab():
        raise Damaged("its tokenizer has another vocabulary than the one that was trained with")
    if found.chat_template != expected.chat_template:
        raise Damaged("its chat template is not the one that was trained with")


def check_logits(found: Tensor, expected: Tensor, most: float) -> None:
    if found.shape != expected.shape:
        raise Damaged(f"its logits have the shape {list(found.shape)} in place of {list(expected.shape)}")
    # By token, and the median: rounding may send one to another expert.
    centered = expected - expected.mean(-1, keepdim=True)
    shifted = found - found.mean(-1, keepdim=True)
    apart = ((shifted - centered).norm(dim=-1) / centered.norm(dim=-1).clamp_min(1e-6)).median().item()
    if not apart <= most:
        raise Damaged(
            f"loaded again it gives other logits than the model in memory: {apart:.2g} of their norm apart, "
            f"where rounding explains {most:g}"
        )


# ---- the check of a run ----


class SaveVerifier:
    """Check every model that a run saves against the one in memory.

    Args:
        policy: "True" reloads final models and reads the files of checkpoints, "all" reloads both, "False"
            checks nothing.
        args: the training arguments.
        tokenizer: saved along with the model; None without.
        trust_remote_code: whether the saved model may run code of its own when it is reloaded.
        accelerator: of the run.
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
        self, staging: Path, folder: Path, model: nn.Module, forward: nn.Module, is_checkpoint: bool
    ) -> None:
        """Check the model that was just written to `staging`. All ranks must call it.

        Args:
            staging: where it was written; it is removed only if the check succeeds.
            folder: where it will be.
            model: the trained model.
            forward: the same, wrapped for training.
            is_checkpoint: whether it is part of a checkpoint, rather than a final model.

        Raises:
            UserError: what was saved is not what was trained.
        """
        self._accelerator.wait_for_everyone()
        if self._policy == "False":
            return
        logits = None
        if self._policy == "all" or not is_checkpoint:
            vocab = model.config.get_text_config().vocab_size
            forward = forward._orig_mod if is_compiled_module(forward) else forward
            logits = probe(forward, vocab, self._args.device)
        # The other ranks hold no weights to save, also under --save_on_each_node True.
        fault = self._fault(staging, model, logits) if self._accelerator.is_main_process else None
        fault = first_failure(fault)
        if fault is not None:
            raise UserError(
                f"--verify_save {self._policy}: the model that was just saved is not the one that was "
                f"trained: {fault}; it is in {staging}, and what {folder} held before is as it was. Please "
                "report this; --verify_save False saves without checking"
            )

    def _fault(self, staging: Path, model: nn.Module, logits: Tensor | None) -> str | None:
        """Return what is wrong with a saved model; reload it if `logits` are given to compare with."""
        quantization = vars(model.config).get("quantization_config")
        expected = Expected(dtypes_of(model), self._tokenizer, logits, quantization)
        try:
            check_files(staging, expected)
            if logits is not None:
                check_loaded(staging, expected, self._args, self._trust_remote_code)
        except Damaged as fault:
            return str(fault)
        return None
