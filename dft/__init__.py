"""Fine-tune causal language models with Dynamic Fine-Tuning (arXiv 2508.05629)."""

from dft.loss.dft import TokenStats, dft_loss
from dft.loss.linear import linear_dft_loss
from dft.loss.objectives import Objective, make_objective
from dft.training.trainer import DFTTrainer

__all__ = ["DFTTrainer", "Objective", "TokenStats", "dft_loss", "linear_dft_loss", "make_objective"]
