"""Fine-tune causal language models with Dynamic Fine-Tuning (arXiv 2508.05629).

The names below are imported on first use: `from dft import dft_loss` loads torch, but neither transformers'
`Trainer` nor anything from `dft.training`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dft.loss.dft import TokenStats, dft_loss
    from dft.loss.linear import linear_dft_loss
    from dft.loss.objectives import Objective, make_objective
    from dft.training.trainer import DFTTrainer

__all__ = ["DFTTrainer", "Objective", "TokenStats", "dft_loss", "linear_dft_loss", "make_objective"]

_MODULES = {
    "DFTTrainer": "dft.training.trainer",
    "Objective": "dft.loss.objectives",
    "TokenStats": "dft.loss.dft",
    "dft_loss": "dft.loss.dft",
    "linear_dft_loss": "dft.loss.linear",
    "make_objective": "dft.loss.objectives",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first access (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dft' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
