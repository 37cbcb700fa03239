"""Which of several evaluation sets the metrics of an evaluation are of."""

from collections.abc import Mapping
from typing import Any

from dft.metrics import evaluation_prefixes


def is_first_set(eval_dataset: Any, metrics: Mapping[str, Any] | None) -> bool:
    """Return whether metrics are of the first of several named evaluation sets, or of the only set."""
    return _is_set_at(0, eval_dataset, metrics)


def is_last_set(eval_dataset: Any, metrics: Mapping[str, Any] | None) -> bool:
    """Return whether metrics are of the last of several named evaluation sets, or of the only set."""
    return _is_set_at(-1, eval_dataset, metrics)


def _is_set_at(position: int, eval_dataset: Any, metrics: Mapping[str, Any] | None) -> bool:
    if not isinstance(eval_dataset, Mapping):
        return True
    return f"eval_{list(eval_dataset)[position]}_" in evaluation_prefixes([metrics or {}])
