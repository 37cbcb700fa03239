"""The model of a run: its dtype, its attention, its weights, and room for every token of the tokenizer."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from dft.arguments.parser import Arguments
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError
from dft.ranks import first_failure
from dft.training.model.adapters import add_adapters, pack_linear, resolve_quantization

OF_CONFIG = (ArithmeticError, LookupError)
"""What building a model raises besides, for numbers in config.json that make no sense."""
SHAPES = "size mismatch"
OF_THE_FILES = ("negative dimension", SHAPES, "conversion of the weights")
"""Words in those of its RuntimeErrors that are about a model's files."""
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
FLASH = "flash_attention_2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with its weights, and with adapters if it is to have them; under ZeRO-3 each rank has its
    share.

    Raises:
        UserError: no such model, broken, missing or infinite weights, an encoder, or a tokenizer that does
            not belong to it.
    """
    name = arguments.model.model_name_or_path
    model = _loaded(arguments)
    resize_embeddings(model, tokenizer, arguments)
    settle_generation_config(model, arguments)
    if arguments.lora.lora_r is None:
        return model
    return add_adapters(model, arguments.lora, arguments.training, name)


def load_base_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model once more, to be held against: whole on each rank, also under ZeRO-3, and without adapters.

    Raises:
        UserError: it knows less tokens than the model that is trained.
    """
    rows = len(tokenizer)
    with whole(arguments.training):
        model = _loaded(arguments)
    known = model.config.get_text_config().vocab_size
    if known < rows:
        raise UserError(
            f"--objective {arguments.dft.objective}: the base model has no embeddings for {rows - known} "
            "tokens of the tokenizer, so it says nothing about them; give a --chat_template of tokens that "
            "it has, or another objective"
        )
    held = sum(one.numel() * one.element_size() for one in model.parameters()) / 2**30
    arguments.notes.append(
        f"--objective {arguments.dft.objective}: a frozen copy of the base model takes {held:.2f} GiB more "
        "on each device"
    )
    return model


def _loaded(arguments: Arguments) -> PreTrainedModel:
    """The model of the files, looked over. Raises `UserError` as `load_model` does."""
    name = arguments.model.model_name_or_path
    check_weight_files(name)
    attention = resolve_attention(arguments)
    failure = None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=resolve_dtype(arguments),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=arguments.model.trust_remote_code,
            quantization_config=resolve_quantization(arguments.lora, arguments.training),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to be told here, with their names
            output_loading_info=True,
        )
    except (*UNLOADABLE, *OF_CONFIG, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in OF_THE_FILES):
            raise  # a full device, a broken process group: no fault of the files
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, SafetensorError):
            reason += "; the file is damaged, or was not downloaded to its end"
        if isinstance(error, (*OF_CONFIG, RuntimeError)):
            reason += "; look at the numbers in config.json"
        failure = f"--model_name_or_path {name}: cannot be loaded: {reason}"
        if SHAPES not in reason:
            raise UserError(failure) from None
    # Under ZeRO-3 rank 0 alone compares shapes, at the end, when the others think that all is well.
    failure = first_failure(failure)
    if failure is not None:
        raise UserError(failure)
    check_loading(loading, name, arguments)
    check_causal(model, name)
    check_finite(model, name, arguments.training.device)
    return model


@contextmanager
def whole(training: transformers.TrainingArguments) -> Iterator[None]:
    """Models that are made meanwhile are not dealt out to the ranks, as transformers does under ZeRO-3."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training.deepspeed:
            set_hf_deepspeed_config(training.hf_deepspeed_config)


def load_meta_model(arguments: Arguments) -> PreTrainedModel:
    """The model on the meta device, and with adapters if it is to have them: shapes alone.

    Raises:
        UserError: no such model, or a configuration that no causal language model can be made of.
    """
    name = arguments.model.model_name_or_path
    dtype = resolve_dtype(arguments)
    attention = resolve_attention(arguments)
    trusted = arguments.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
        with whole(arguments.training), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=config.dtype if dtype == "auto" else dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=trusted,
            )
    except (*UNLOADABLE, *OF_CONFIG) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--model_name_or_path {name}: cannot be planned: {reason}") from None
    if arguments.lora.lora_r is None:
        return model
    if arguments.lora.load_in_4bit:
        pack_linear(model)
    with torch.device("meta"):
        return add_adapters(model, arguments.lora, arguments.training, name)


def check_weight_files(name: str) -> None:
    """Raises `UserError` where a model's folder has no weights, or has them as a pickle alone.

    A pickle runs whatever code is in it when it is read. Of models on the hub, too, nothing but safetensors
    is loaded.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return
    adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    wanted = "adapter_model.safetensors" if adapter else "*.safetensors"
    if any(folder.glob(wanted)):
        return
    pickles = sorted(one.name for one in folder.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not pickles:
        raise UserError(f"--model_name_or_path {name}: the folder holds no weights ({wanted})")
    raise UserError(
        f"--model_name_or_path {name}: its weights are there only as a pickle ({pickles[0]}), which may run "
        "any code when it is read; convert them to safetensors, with a transformers that reads nothing but "
        'tensors out of it: python -c "from transformers import AutoModelForCausalLM as Model; '
        f"Model.from_pretrained({name!r}).save_pretrained('NEW')\", and copy the tokenizer's files"
    )


def check_loading(loading: dict[str, Any], name: str, arguments: Arguments) -> None:
    """Raises `UserError` for weights that are not in the files or have another shape there.

    Adds a note of weights that the model has no place for.
    """
    if loading["mismatched_keys"]:
        weight, there, wanted = min(loading["mismatched_keys"])
        raise UserError(
            f"--model_name_or_path {name}: {weight} has the shape {list(there)} in its files and "
            f"{list(wanted)} by config.json; one of the two belongs to another model"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"--model_name_or_path {name}: {len(missing)} weights are not in its files "
            f"and would be random, among them {', '.join(missing[:3])}; the files belong to another "
            "architecture or are incomplete"
        )
    if loading["unexpected_keys"]:
        unused = sorted(loading["unexpected_keys"])
        arguments.notes.append(
            f"{len(unused)} weights in the model's files have no place in the model and are left out, among "
            f"them {', '.join(unused[:3])}"
        )


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raises `UserError` for an encoder: it would see the token that it is to predict."""
    config = model.config.to_dict()
    encodes = config["model_type"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encodes and not (config.get("is_decoder") or config.get("causal")):
        raise UserError(
            f"--model_name_or_path {name}: {config['model_type']} is an encoder, whose attention sees the "
            "tokens that are to be predicted; choose a causal language model (or set 'is_decoder' in its "
            "config.json to true, if it was trained as one)"
        )


def check_finite(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Raises `UserError`, on all ranks, for weights that are NaN or infinite on one of them."""
    parameters = dict(model.named_parameters())
    broken = torch.tensor(
        [not _is_finite(one) for one in parameters.values()], device=device, dtype=torch.int
    )
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    names = [one for one, bad in zip(parameters, broken.tolist(), strict=True) if bad]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"--model_name_or_path {name}: values that are not finite (NaN, infinity) in {names[0]}{others} "
            f"of {len(parameters)} weights; the files are damaged, or come from a training that diverged"
        )


def _is_finite(parameter: nn.Parameter) -> bool:
    """Whether the part of a weight that this rank holds is."""
    values = parameter.detach()
    if is_deepspeed_zero3_enabled():
        share = parameter.ds_tensor
        begun = share.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
        values = share.detach()[: max(0, parameter.ds_numel - begun)]  # what follows is never written
    if values.is_meta or not values.numel() or not values.is_floating_point():
        return True
    return all(math.isfinite(one) for one in torch.aminmax(values))  # NaN is both; makes no copy


def settle_generation_config(model: PreTrainedModel, arguments: Arguments) -> None:
    """Makes sure now that the generation settings can be saved, not at the first checkpoint.

    Many published models set a temperature without `do_sample`, which transformers loads and refuses to save.

    Raises:
        UserError: settings that cannot be saved either way.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
        return
    except ValueError:
        # Without do_sample they are ignored, so leaving them out changes nothing of what the model does.
        ignored = {name for name in OF_SAMPLING if vars(config).get(name) is not None}
        for name in ignored:
            setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"--model_name_or_path {arguments.model.model_name_or_path}: its generation_config.json could "
            f"not be saved again: {' '.join(str(error).split())}"
        ) from None
    arguments.notes.append(
        f"generation_config.json: saved without {', '.join(sorted(ignored))}, which do_sample false ignores "
        "and transformers refuses to save"
    )


def add_stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, endings: Iterable[str], arguments: Arguments
) -> None:
    """Makes generation stop at every token that ends a training turn.

    A base model with a chat template often stops at `<|endoftext|>` alone, and would go on past the
    `<|im_end|>` it was taught.
    """
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [one for one in {*stops, tokenizer.eos_token_id} if one is not None]
    new = [token for token in endings if tokenizer.convert_tokens_to_ids(token) not in stops]
    if new:
        config.eos_token_id = sorted({*stops, *tokenizer.convert_tokens_to_ids(new)})
        arguments.notes.append(
            f"generation_config.json: the saved model also stops at {' '.join(new)}, which ends training "
            "turns"
        )


def check_positions(model: PreTrainedModel, longest: int, arguments: Arguments) -> None:
    """Holds the longest sequence against the positions the model knows.

    Raises:
        UserError: positions are learned, one by one, and there are too few.
    """
    config = model.config.get_text_config().to_dict()
    known = config.get("max_position_embeddings", config.get("n_positions"))
    if known is None or longest <= known:
        return
    # OPT has two rows more than positions.
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    if any(
        one is not model.get_input_embeddings() and known <= one.num_embeddings <= known + 2 for one in tables
    ):
        raise UserError(
            f"--max_length {arguments.data.max_length}: the longest sequence has {longest} tokens, and the "
            f"model has learned {known} positions; at most --max_length {known}"
        )
    arguments.notes.append(
        f"the longest sequence has {longest} tokens, more than the {known} that the model was made for"
    )


def settle_ddp(model: PreTrainedModel, arguments: Arguments) -> None:
    """Where nothing is said, DDP looks for no parameters without a gradient in dense models of text.

    transformers has it look in all models, which takes time in each step, and where there are none is warned
    of on every rank. Experts that no token chose have none, nor has what sees or hears.
    """
    training = arguments.training
    of_text = model.config.get_text_config() is model.config
    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    if training.ddp_find_unused_parameters is None and of_text and not has_experts:
        training.ddp_find_unused_parameters = False


def resolve_dtype(arguments: Arguments) -> torch.dtype | str:
    """The dtype the weights are loaded in; "auto" is that of the checkpoint."""
    chosen = arguments.model.torch_dtype
    if chosen == "auto":
        return chosen
    if chosen is None:
        computed_in = arguments.training.mixed_precision if arguments.training.deepspeed else "no"
        chosen = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[computed_in]
    return DTYPES[chosen]


def resolve_attention(arguments: Arguments) -> str:
    """The attention to load the model with; "auto" leaves it to transformers: sdpa where the model has it.

    Raises:
        UserError: flash_attention_2 was asked for where it cannot work.
    """
    wanted = arguments.model.attn_implementation
    # "auto" is a checkpoint's own dtype, nearly always half precision
    halves = resolve_dtype(arguments) != torch.float32 or arguments.training.mixed_precision != "no"
    if wanted == "auto":
        return FLASH if not arguments.training.use_cpu and is_flash_attn_2_available() and halves else "auto"
    known = {"eager", *ALL_ATTENTION_FUNCTIONS.keys()}
    if wanted not in known and "/" not in wanted:  # a slash names a kernel on the hub
        raise UserError(
            f"--attn_implementation {wanted}: no such attention; choose auto, {', '.join(sorted(known))}"
        )
    if wanted == "flex_attention" and arguments.training.use_cpu:
        raise UserError(
            "--attn_implementation flex_attention: has no backward pass on the CPU; use "
            "--attn_implementation auto"
        )
    if wanted != FLASH:
        return wanted
    if arguments.training.use_cpu:
        raise UserError(
            f"--attn_implementation {FLASH}: needs a CUDA GPU, and this run is on CPU; use "
            "--attn_implementation auto"
        )
    if not is_flash_attn_2_available():
        raise UserError(
            f"--attn_implementation {FLASH}: flash-attn is not installed or does not fit this GPU; install "
            "it with `bash scripts/setup.sh` (`--build-flash-attn` builds it from source), or use "
            "--attn_implementation auto"
        )
    if not halves:
        raise UserError(
            f"--attn_implementation {FLASH}: computes in bfloat16 or float16 only; add --bf16 True, or use "
            "--attn_implementation sdpa"
        )
    return wanted


def resize_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments
) -> None:
    """Gives tokens that were added to the tokenizer a row in the embeddings.

    Raises:
        UserError: the tokenizer has ordinary tokens without a row: it belongs to another model.
    """
    rows = model.config.get_text_config().vocab_size
    beyond = [index for index in tokenizer.get_vocab().values() if index >= rows]
    if not beyond:
        return
    if not set(beyond) <= set(tokenizer.added_tokens_decoder):
        raise UserError(
            f"--model_name_or_path {arguments.model.model_name_or_path}: the tokenizer has {len(tokenizer)} "
            f"tokens and the model {rows} embeddings; they do not belong together"
        )
    if arguments.lora.lora_r is not None:
        raise UserError(
            f"--lora_r {arguments.lora.lora_r}: the tokenizer has {len(beyond)} tokens that the model has no "
            "embeddings for, and adapters would leave new ones random; give a --chat_template of tokens that "
            "it has, or train all weights (without --lora_r)"
        )
    model.resize_token_embeddings(max(beyond) + 1)
    arguments.notes.append(
        f"embeddings: {rows} -> {max(beyond) + 1} rows, for the tokens added to the tokenizer"
    )
