"""Load saved adapters that transformers alone does not load."""

import json
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "base_model.json"
"""File saved with adapters that identifies the model they were trained on."""


def load_adapters(folder: Path, **options: Any) -> Any:
    """Return the base model with saved adapters; None for a model, or adapters that transformers loads.

    transformers 5.23 looks for the magnitudes of DoRA under other names than those that peft saves. Without
    an error, it leaves them as they are computed for a new adapter. And it does not load embeddings of more
    rows than the base model has, which are saved if tokens were added to the vocabulary.

    Args:
        folder: a saved model or saved adapters.
        options: arguments of `AutoModelForCausalLM.from_pretrained` for the base model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    from peft import LoraConfig, PeftConfig, PeftModel  # optional, and slow to import
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig) or not (config.use_dora or config.modules_to_save):
        return None
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **options)
    add_rows(base, folder)
    return PeftModel.from_pretrained(base, folder)


def add_rows(model: Any, folder: Path) -> None:
    """Give a base model as many embeddings as saved adapters have, if they hold embeddings.

    Args:
        model: the base model, as loaded. Its embeddings are never made fewer.
        folder: folder of the adapters. Those of other programs have no record of the number.
    """
    record = folder / BASE_RECORD
    if not json.loads((folder / ADAPTER_CONFIG).read_text()).get("modules_to_save") or not record.is_file():
        return
    try:
        rows = int(json.loads(record.read_text())["sizes"]["vocab_size"])
    except (ValueError, KeyError, TypeError):
        return  # `dft.training.model.adapters.base_model_mismatch` reports a damaged record
    if rows > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
