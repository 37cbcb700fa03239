"""Files in a model's folder other than its weights: settings of processors, tokenizers, licenses."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

COPIED = re.compile(r".+\.(json|jinja|model|tiktoken|py|txt)|(LICENSE|LICENCE|NOTICE|USE_POLICY).*", re.I)
"""Pattern of the names of files that are copied into a saved model, unless it has a file of that name."""
OUTDATED = re.compile(
    r"trainer_state\.json|data_report\.json|manifest\.json|run_state\.json|base_model\.json|run_args\.yaml|"
    r"adapter_.*|.*_results\.json|report\..*|preflight\..*|README.*|"
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.json|"
    r"scheduler\.pt|latest|zero_to_fp32\.py|checkpoint-\d+|incomplete-.*|global_step\d+"
)
"""Pattern of the names of files that a run writes anew or that describe an earlier run, and of tokenizer
files that tokenizer_config.json and chat_template.jinja replace."""
WEIGHTS = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)(\.index\.json)?|.+\.index\.json|.+\.data"
)
MAX_BYTES = 64 * 2**20
"""Size above which a file is not copied."""
HUB_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.model",
)  # fmt: skip
"""Files that are fetched with a model of the hub, if it has them."""
BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|position_ids)$")
"""Weights in old files that are computed instead of loaded."""


def model_folder(name: str) -> Path | None:
    """Return the folder of a model, or of its cached files if it is on the hub; None if there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if name else None
    config = _cached(name, CONFIG_NAME, local_files_only=True)
    return None if config is None else config.parent


def fetch_companions(name: str) -> None:
    """Download the files of a model of the hub that are saved with it, but not loaded for training."""
    if name and not Path(name).expanduser().is_dir():
        for file in HUB_FILES:
            _cached(name, file, local_files_only=False)


def _cached(name: str, file: str, local_files_only: bool) -> Path | None:
    try:
        path = cached_file(
            name,
            file,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError):  # neither a folder nor a repository
        return None
    return None if path is None else Path(path)


def companions(folder: Path) -> Iterator[Path]:
    """Yield the files in a model's folder that are copied into a saved model."""
    for path in sorted(folder.iterdir()):
        name = path.name
        is_known = OUTDATED.fullmatch(name) or WEIGHTS.fullmatch(name)
        if COPIED.fullmatch(name) and not is_known and path.is_file() and path.stat().st_size <= MAX_BYTES:
            yield path


def copy_companions(name: str, target: Path) -> None:
    """Copy the files that come with a model next to its saved weights. Files of the target are kept.

    Args:
        name: folder or hub name of the model that was loaded.
        target: folder of the saved model.
    """
    folder = model_folder(name)
    for path in companions(folder) if folder is not None else ():
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)  # without its permissions


def left_out_note(name: str, model: PreTrainedModel, names: frozenset[str] | None) -> str | None:
    """Return a note on what a saved model will not contain although the loaded one does; None if nothing.

    Args:
        name: folder or hub name of the model.
        model: the loaded model.
        names: names of the weights in its files; None if they are not known.
    """
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    ignored = [
        weight
        for weight in sorted(names or ())
        if any(re.search(pattern, weight) for pattern in patterns) and not BUFFERS.search(weight)
    ]
    parts = []
    if ignored:
        prefixes = sorted({".".join(weight.split(".")[:2]) for weight in ignored})
        parts.append(f"{len(ignored)} weights that its text part does not use ({', '.join(prefixes)})")
    folder = model_folder(name)
    if folder is not None:
        copied = {path.name for path in companions(folder)}
        parts += sorted(
            f"{path.name}/" if path.is_dir() else path.name
            for path in folder.iterdir()
            if not (
                path.name.startswith(".") or OUTDATED.fullmatch(path.name) or WEIGHTS.fullmatch(path.name)
            )
            and path.name not in copied
        )
    return f"{name} holds what the saved model will not: {', '.join(parts)}" if parts else None
