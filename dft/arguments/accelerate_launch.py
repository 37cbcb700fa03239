"""Flags that the configuration of `accelerate launch` implies.

accelerate passes its configuration in environment variables, and transformers reads some of them by itself.
Turned into flags, they are checked, reported and recorded like all others.
"""

import copy
import os
from typing import Any

import torch
from accelerate.utils import str_to_bool

from dft.errors import UserError
from dft.ranks import is_launched

PRECISIONS = ("no", "fp16", "bf16")
DEVICE = "ACCELERATE_TORCH_DEVICE"
"""Variable with which accelerate replaces the device of a process. accelerate launch does not set it."""
SWITCHES = (
    "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY",
    "FORK_LAUNCHED",
)  # fmt: skip
"""Variables that accelerate and transformers read as true or false in every run."""
FSDP_SETTINGS = {
    "FSDP_AUTO_WRAP_POLICY": "auto_wrap_policy",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "transformer_layer_cls_to_wrap",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_STATE_DICT_TYPE": "state_dict_type",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "cpu_ram_efficient_loading",
}
"""Variables of accelerate and the keys of `--fsdp_config` with the same values."""
UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; use DeepSpeed or FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config is not supported; for long sequences use "
    "--sequence_parallel_size",
}


def launched_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that accelerate's configuration implies and the command line does not set.

    Args:
        flags: the flags of the command line and their defaults.

    Raises:
        UserError: the configuration asks for something that is not supported.
    """
    for variable, reason in UNSUPPORTED.items():
        if _is_on(variable):
            raise UserError(f"accelerate launch: {reason}")
    check_switches()
    check_device(flags["use_cpu"])
    implied: dict[str, Any] = {}
    if _is_on("ACCELERATE_USE_DEEPSPEED") and not flags["deepspeed"]:
        implied["deepspeed"] = _deepspeed_configuration()
        del os.environ["ACCELERATE_USE_DEEPSPEED"]  # transformers would make a second configuration from it
    if _is_on("ACCELERATE_USE_FSDP") and not flags["fsdp"]:
        implied |= {"fsdp": True, "fsdp_config": flags["fsdp_config"] or _fsdp_configuration()}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in PRECISIONS:
        raise UserError(
            f"accelerate launch: mixed_precision {precision} is not supported; use one of "
            f"{', '.join(PRECISIONS)}"
        )
    if precision != "no" and not (flags["bf16"] or flags["fp16"]):
        implied[precision] = True
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower()
    if backend != "no" and not (flags["torch_compile"] or flags["torch_compile_backend"]):
        implied["torch_compile_backend"] = backend
    return implied


def check_switches() -> None:
    """Raise `UserError` for a variable of accelerate that is neither true nor false."""
    for variable in SWITCHES:
        value = os.environ.get(variable, "false")
        try:
            str_to_bool(value)
        except ValueError:
            raise UserError(
                f"the environment sets {variable}={value!r}, which is neither true nor false; remove the "
                f"variable (unset {variable}), or set it to true or false"
            ) from None


def check_device(use_cpu: bool) -> None:
    """Raise `UserError` if the environment names another device than the one that this process trains on.

    accelerate would put the batches on that device, and transformers the model on its own.
    """
    value = os.environ.get(DEVICE)
    if value is None:
        return
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        names, used, remedy = ["cpu"], "the CPU", ""
    elif is_launched():  # the variable is the same for all ranks
        names, used, remedy = [], f"one {accelerator.type} device per rank", ""
    else:
        names, used = [accelerator.type, f"{accelerator.type}:0"], f"{accelerator.type}:0"
        remedy = "; to train on another device, set CUDA_VISIBLE_DEVICES or --use_cpu True"
    if value not in names:
        raise UserError(
            f"the environment sets {DEVICE}={value!r}, and this run uses {used}; remove the variable (unset "
            f"{DEVICE}){remedy}"
        )


def launched_note(implied: dict[str, Any]) -> str | None:
    """Return a note about the flags of `launched_flags`; None if there are none."""
    words = [f"--{name} {_shown(name, value)}" for name, value in implied.items() if name != "fsdp_config"]
    return f"set by the configuration of accelerate launch: {', '.join(words)}" if words else None


def _shown(name: str, value: Any) -> str:
    if name == "deepspeed" and isinstance(value, dict):
        return f"(ZeRO-{value['zero_optimization']['stage']})"
    return str(value)


def _deepspeed_configuration() -> str | dict[str, Any]:
    """Return the configuration file of DeepSpeed that accelerate names, or the settings of its own file."""
    # accelerate imports DeepSpeed, which is slow and needed only here.
    from accelerate.utils import DeepSpeedPlugin

    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return file
    config = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # accelerate would compare them with the result
    config.setdefault("gradient_clipping", "auto")
    return config | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


def _fsdp_configuration() -> dict[str, Any]:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate launch: fsdp_version {version} is not supported; set fsdp_version: 2 in its "
            "configuration"
        )
    config: dict[str, Any] = {
        key: os.environ[variable] for variable, key in FSDP_SETTINGS.items() if variable in os.environ
    }
    config["cpu_offload"] = _is_on("FSDP_OFFLOAD_PARAMS")
    config["min_num_params"] = int(os.environ.get("FSDP_MIN_NUM_PARAMS", "0"))
    if "transformer_layer_cls_to_wrap" in config:
        config["transformer_layer_cls_to_wrap"] = config["transformer_layer_cls_to_wrap"].split(",")
    return config


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
