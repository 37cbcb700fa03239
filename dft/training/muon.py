"""Muon for the weight matrices of the hidden layers, with AdamW for all other weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from dft.arguments.training import OwnOptimizer
from dft.errors import UserError

MATCH_ADAMW = "match_rms_adamw"
"""Scale of torch's Muon at which its updates have the size of those of AdamW, so that one rate suits both."""


def _boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise ValueError("expected True or False")
    return values[text.lower()]


OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "momentum": float, "nesterov": _boolean, "ns_steps": int, "adjust_lr_fn": str,
}  # fmt: skip
"""Options of torch's Muon that --optim_args can set."""


class MuonWithAdamW(Optimizer):
    """torch's Muon and AdamW as one optimizer, with one state and one learning-rate schedule.

    Args:
        matrices: weights of two dimensions, for Muon.
        decayed: other weights, for AdamW with weight decay.
        others: other weights, for AdamW without weight decay.
        lr: learning rate of both.
        weight_decay: weight decay of both.
        betas: of AdamW.
        eps: of AdamW.
        **options: of Muon.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        decayed: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        **options: Any,
    ) -> None:
        self._parts: dict[str, Optimizer] = {}
        if matrices:
            group = {"params": matrices, "part": "muon"}
            self._parts["muon"] = Muon([group], lr=lr, weight_decay=weight_decay, **options)
        groups = [
            {"params": members, "part": "adamw", "weight_decay": decay}
            for members, decay in ((decayed, weight_decay), (others, 0.0))
            if members
        ]
        if groups:
            self._parts["adamw"] = AdamW(groups, lr=lr, betas=betas, eps=eps)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all weights. `closure` is not supported."""
        assert closure is None
        for name, part in self._parts.items():
            # Loading a checkpoint replaces the state and the groups of this optimizer.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.step()


class MuonFactory:
    """Creates the optimizer for a model. transformers' Trainer calls it when training begins."""

    def __call__(self, model: PreTrainedModel, **options: Any) -> MuonWithAdamW:
        """Return the optimizer for the weights of `model` that are trained."""
        return MuonWithAdamW(*split_weights(model), **options)


def split_weights(
    model: PreTrainedModel,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights that Muon trains, and those that AdamW trains with and without weight decay.

    Muon is for the matrices of the hidden layers: not for embeddings and the head, whose rows are tokens, nor
    for norms, biases, and weights of other than two dimensions, such as those of stacked experts.

    Args:
        model: a model of transformers, possibly with adapters.
    """
    tokens = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings()
        for parameter in module.parameters()
    }
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and id(parameter) not in tokens
            (matrices if is_matrix else decayed if parameter.ndim > 1 else others).append(parameter)
    return matrices, decayed, others


def muon_optimizer(args: transformers.TrainingArguments) -> tuple[type[MuonFactory], dict[str, Any]] | None:
    """Return what `transformers.Trainer` takes as `optimizer_cls_and_kwargs`; None without `--optim muon`.

    Raises:
        UserError: --optim_args is wrong.
    """
    if args.optim != OwnOptimizer.MUON:
        return None
    options = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "adjust_lr_fn": MATCH_ADAMW,
    }
    return MuonFactory, options | _parsed_options(args.optim_args)


def _parsed_options(text: str | None) -> dict[str, Any]:
    """Return the options in --optim_args, such as momentum=0.9,ns_steps=6."""
    options = {}
    for item in text.replace(" ", "").split(",") if text else ():
        name, _, value = item.partition("=")
        if name not in OPTIONS:
            raise UserError(
                f"--optim muon: --optim_args {text}: unknown option {name!r}; choose from "
                f"{', '.join(OPTIONS)}"
            )
        try:
            options[name] = OPTIONS[name](value)
        except ValueError as error:
            raise UserError(f"--optim muon: --optim_args {item}: {error}") from None
    return options
