"""Load DoRA adapters with their magnitudes.

transformers 5.23 looks for the magnitudes under other names than those that peft saves. Without an error, it
leaves them as they are computed for a new adapter.
"""

from pathlib import Path
from typing import Any


def load_dora(folder: Path, **options: Any) -> Any:
    """Return the base model with saved DoRA adapters; None for a model or adapters of another kind.

    Args:
        folder: a saved model or saved adapters.
        options: arguments of `AutoModelForCausalLM.from_pretrained` for the base model.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    from peft import LoraConfig, PeftConfig, PeftModel  # optional, and slow to import
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig) or not config.use_dora:
        return None
    base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, **options)
    return PeftModel.from_pretrained(base, folder)
