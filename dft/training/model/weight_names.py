"""Names of the weights in saved models, which differ from the names in memory for many architectures.

transformers converts some checkpoints when it loads them: it renames weights, and fuses those of experts. It
reverts this when it saves, so a saved model has the names of the model it was loaded from.
"""

import copy
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


def source_names(name: str) -> frozenset[str] | None:
    """Return the names of the weights in the files that a model was loaded from.

    Args:
        name: folder, or name of a model on the hub whose files are in the cache.

    Returns:
        None if the model was not loaded from files, they no longer exist, or they are quantized and therefore
        hold other tensors than the model.
    """
    if not name:
        return None
    files = (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    config, index, single = (existing_file(name, file) for file in files)
    try:
        if config is None or "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
            return None
        if index is not None:
            return frozenset(json.loads(index.read_text())["weight_map"])
        return None if single is None else names_in(single)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def existing_file(name: str, file: str, local_only: bool = True) -> Path | None:
    """Return the path of a file of a model; None if there is no such model or file.

    Args:
        name: folder, or name of a model on the hub.
        file: name of the file.
        local_only: whether to look only into the cache for a model on the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        path = cached_file(
            name,
            file,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # the name is neither that of a folder nor of a repository
        return None
    return None if path is None else Path(path)


def names_in(file: Path) -> frozenset[str]:
    """Return the names of the tensors in a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return frozenset(opened.keys())


def folder_names(folder: Path) -> frozenset[str]:
    """Return the names of the weights in a folder that `save_pretrained` wrote."""
    names = [names_in(file) for file in folder.glob("model*.safetensors")]
    return frozenset().union(*names)


def expected_names(model: PreTrainedModel) -> frozenset[str] | None:
    """Return the names that the weights of a model may be saved under; None if any are allowed.

    Of two tied weights, files may hold either.
    """
    names = source_names(model.config.name_or_path)
    if names is None:
        return None
    tied = model.all_tied_weights_keys.items()
    return names.union(*(pair for pair in tied if not names.isdisjoint(pair)))


def without_tied(model: nn.Module, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return gathered weights without those that are tied to others, as `save_pretrained` expects them.

    In memory, tied weights are one tensor; after they are gathered they are equal copies.

    Args:
        model: the model.
        weights: its weights by name; None if the model has them in memory.
    """
    if weights is None or not isinstance(model, PreTrainedModel):
        return weights
    copies = {
        target
        for target, source in model.all_tied_weights_keys.items()
        if target in weights and source in weights and torch.equal(weights[target], weights[source])
    }
    return {name: weight for name, weight in weights.items() if name not in copies}


def load_weights(model: PreTrainedModel, folder: Path) -> list[str]:
    """Load the weights of a saved model, whatever their names. Return the names of those it lacks.

    Trainer loads them without converting their names, and would leave weights of many architectures as they
    are.

    Args:
        model: a complete model, not sharded.
        folder: a folder that `save_pretrained` wrote.
    """
    files = sorted(folder.glob("model*.safetensors"))
    tied = model.all_tied_weights_keys.keys()
    missing = sorted(model.state_dict().keys() - tied - folder_names(folder))
    if not missing:
        for file in files:
            model.load_state_dict(load_file(file), strict=False)
        return []
    # Wide enough for every weight, so that none is rounded.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    with torch.random.fork_rng(devices=[]):
        loaded, info = type(model).from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    if not info["missing_keys"]:
        model.load_state_dict(loaded.state_dict())
    return sorted(info["missing_keys"])
