"""The key of base scores in the cache: a digest of the model, how it computes, and the data."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from dft.arguments.parser import Arguments
from dft.data.batches.dataset import Sequences
from dft.data.preparing.digests import content_digests
from dft.errors import UserError
from dft.training.model.companion_files import model_folder
from dft.training.parameters import compute_dtype

FORMAT = 1
"""Version of the scores. To be raised whenever a change of the code changes their values or their order."""
MODEL_FILES = ("*.safetensors", "config.json", "*.py")
"""Files of a model's folder that determine its output."""


def model_digest(arguments: Arguments, model: PreTrainedModel, cache_dir: Path) -> str:
    """Return a digest of the content of the model's files and of the settings that change its output.

    The content is read once: the digest of each file is cached by its inode, size and times.

    Args:
        arguments: the parsed flags.
        model: the model as it was loaded, before training.
        cache_dir: folder of the cache.

    Raises:
        UserError: the files of the model cannot be located.
    """
    name, training = arguments.model.model_name_or_path, arguments.training
    folder = model_folder(name)
    if folder is None:
        raise UserError(
            f"--base_scores True: the files of --model_name_or_path {name} are not on this machine, so their "
            "scores cannot be recognized later; download it and pass its folder"
        )
    paths = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    config = model.config.get_text_config()
    described: dict[str, Any] = {
        "format": FORMAT,
        "versions": [torch.__version__, transformers.__version__],
        "files": list(zip([path.name for path in paths], content_digests(paths, cache_dir), strict=True)),
        "weights": str(model.dtype),
        "products": str(compute_dtype(training, model)),
        "mixed_precision": training.mixed_precision,
        "attention": config._attn_implementation,
        "quantized": arguments.lora.load_in_4bit,
        "liger": training.use_liger_kernel,
        "device": training.device.type,
        # Their rows begin as the mean of the others, also where the model has rows that no token used.
        "new_embeddings": [config.vocab_size, *arguments.new_tokens] if arguments.new_tokens else [],
    }
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def scores_key(model: str, dataset: Sequences) -> str:
    """Return the key of the scores of a dataset.

    Args:
        model: `model_digest`.
        dataset: the data. How its sequences are packed and ordered does not matter.
    """
    return hashlib.blake2b(f"{model} {dataset.content_digest()}".encode(), digest_size=16).hexdigest()
