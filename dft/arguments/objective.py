"""Command-line flags for the objective: the token weights and how the loss is computed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch

from dft.bounds import Bounds
from dft.errors import UserError
from dft.loss.objectives import OBJECTIVES, Dft, Objective, Sft, TokenRows, make_objective, parameters_of
from dft.loss.schedule import CONSTANT, KINDS, AlphaSchedule, check_schedule

WEIGHT_FORMULAS = ", ".join(f"{name}: {objective().formula()}" for name, objective in OBJECTIVES.items())
PARAMETERS = ", ".join(
    f"{parameter} of {name}"
    for name in OBJECTIVES
    for parameter in parameters_of(name)
    if parameter != "alpha"
)

UNLIKELY, NEGLIGIBLE = 1e-5, 0.01
"""A probability such as that of a token new to the model, and a weight that hardly trains a token."""
FUSED_HEAD = ("auto", "on", "off")
"""Values of `--fused_head`."""


@dataclass
class DFTArguments:
    """Objective flags."""

    _argument_group_name: ClassVar[str] = "DFT"

    dft_alpha: float = field(
        default=Dft.alpha,
        metadata={
            "help": "Strength of the weighting: the weight of a token is alpha * p + (1 - alpha). 1 is DFT "
            "as in the paper, 0 is SFT."
        },
    )
    objective: str = field(
        default=Dft.name,
        metadata={
            "help": f"Weight of a token. {WEIGHT_FORMULAS}.".replace("%", "%%"),
            "choices": list(OBJECTIVES),
        },
    )
    objective_args: str | None = field(
        default=None,
        metadata={"help": f"Parameters of the objective as NAME=NUMBER, separated by commas: {PARAMETERS}."},
    )
    dft_alpha_schedule: str = field(
        default=CONSTANT.kind,
        metadata={
            "help": "Schedule of alpha: constant, or a linear or cosine increase from 0 (SFT) to "
            "--dft_alpha.",
            "choices": list(KINDS),
        },
    )
    dft_alpha_schedule_share: float = field(
        default=CONSTANT.share,
        metadata={"help": "Fraction of the optimizer steps over which alpha increases."},
    )
    end_of_turn_weight: float = field(
        default=0.0,
        metadata={
            "help": "Minimum weight of end-of-turn tokens, in [0, 1], so that a model that gives them "
            "a probability near 0 still learns to stop."
        },
    )
    fused_head: str = field(
        default="auto",
        metadata={
            "help": "Compute the loss and its gradient without storing the logits: on, off, or auto, which "
            "does so if the result equals that of the logits of the model.",
            "choices": list(FUSED_HEAD),
        },
    )
    base_scores: Literal[False, True, "only"] = field(
        default=False,
        metadata={
            "help": "Score the data with the model before training, once: the log-probability of each "
            "supervised token is stored beside the prepared data and is part of each batch, for objectives "
            "that compare with the model before training, and for the report. only: score and exit."
        },
    )
    drop_tokens_below_base_p: Annotated[float, Bounds(minimum=0, below=1)] = field(
        default=0.0,
        metadata={
            "help": "Do not supervise training tokens that the model before training gave a lower "
            "probability than this (with --base_scores True). End-of-turn tokens stay. 0 keeps all."
        },
    )
    use_simple_dft: bool = field(default=True, metadata={"help": "False trains with SFT: alpha is set to 0."})


@contextmanager
def convert_value_errors(flag: str) -> Iterator[None]:
    """Convert a `ValueError` from the loss to a `UserError` that names the flag."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def resolve_alpha(dft: DFTArguments) -> float:
    """Return the alpha of a run: 0 with `--use_simple_dft False`, else `--dft_alpha`."""
    return dft.dft_alpha if dft.use_simple_dft or dft.objective != Dft.name else 0.0


def build_objective(dft: DFTArguments) -> Objective:
    """Return the objective of a run.

    Raises:
        UserError: a parameter is unknown, not a number or out of range.
    """
    if "alpha" in parameters_of(dft.objective):
        with convert_value_errors(f"--dft_alpha {dft.dft_alpha:g}"):
            alpha = {"alpha": Dft(dft.dft_alpha).alpha}
    else:
        alpha = {}
    flag = f"--objective {dft.objective}"
    if dft.objective_args:
        flag += f" --objective_args {dft.objective_args}"
    with convert_value_errors(flag):
        return make_objective(dft.objective, {**alpha, **_parse_parameters(dft.objective_args or "")})


def _parse_parameters(text: str) -> dict[str, float]:
    """Parse `k=0.5,q=0.1`."""
    parameters: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, _, number = (word.strip() for word in part.partition("="))
        if name in parameters:
            raise ValueError(f"{name} is given twice")
        try:
            parameters[name] = float(number)
        except ValueError:
            raise ValueError(f"expected NAME=NUMBER, separated by commas, got {part!r}") from None
        if name == "alpha":
            raise ValueError(f"alpha is set with --dft_alpha {number}")
    return parameters


def build_schedule(dft: DFTArguments) -> AlphaSchedule:
    """Return the alpha schedule of a run. Raise `UserError` if its share is out of range."""
    with convert_value_errors(f"--dft_alpha_schedule_share {dft.dft_alpha_schedule_share:g}"):
        return AlphaSchedule(dft.dft_alpha_schedule, dft.dft_alpha_schedule_share)


def hardly_trains_unlikely(dft: DFTArguments) -> bool:
    """Return whether a target with a probability near 0 has a weight near 0 at every step of the run."""
    objective = build_objective(dft)
    nll = torch.full((1,), -math.log(UNLIKELY), dtype=torch.float64)
    if objective.potential(nll) is None or build_schedule(dft).kind != CONSTANT.kind:
        return False  # the weight depends on more than p, or begins at 1
    return objective.weight(TokenRows(nll, torch.exp(-nll), nll)).item() <= NEGLIGIBLE


def objective_notes(dft: DFTArguments, adds_tokens: bool, has_report: bool) -> list[str]:
    """Return a note for each valid but potentially surprising choice of the objective.

    Args:
        dft: the flags of the objective.
        adds_tokens: whether the run adds tokens to the vocabulary and trains.
        has_report: whether the run trains and writes a report.
    """
    notes, objective = [], build_objective(dft)
    if adds_tokens and hardly_trains_unlikely(dft):
        notes.append(
            f"--add_tokens: new tokens begin with a probability near 0, where {objective.title} gives "
            "targets a weight near 0, so the model hardly learns to write them; with --objective dft "
            "--dft_alpha 0.9 each target has a weight of at least 0.1"
        )
    if adds_tokens and dft.drop_tokens_below_base_p:
        notes.append(
            f"--drop_tokens_below_base_p {dft.drop_tokens_below_base_p:g}: new tokens of --add_tokens have a "
            "probability near 0 before training, so the model does not learn to write them, unless they end "
            "a turn"
        )
    if 0 < dft.end_of_turn_weight <= objective.least_weight:
        notes.append(
            f"--end_of_turn_weight {dft.end_of_turn_weight:g} has no effect: every token already has a "
            f"weight of at least {objective.least_weight:g}"
        )
    uses_scores = has_report or objective.needs_base_logp or dft.drop_tokens_below_base_p > 0
    if dft.base_scores is True and not uses_scores:
        notes.append(
            f"--base_scores True: nothing in this run uses the scores, since --objective {objective.name} "
            "does not, and there is no report (--report False); remove it to save the time"
        )
    return notes


def check_base_scores(dft: DFTArguments) -> None:
    """Raise `UserError` for flags that need `--base_scores` if it is not set."""
    objective = build_objective(dft)
    needs = f"--objective {objective.name}" if objective.needs_base_logp else None
    if dft.drop_tokens_below_base_p:
        needs = f"--drop_tokens_below_base_p {dft.drop_tokens_below_base_p:g}"
    if needs is not None and not dft.base_scores:
        raise UserError(
            f"{needs} needs the probabilities of the model before training; add --base_scores True"
        )


def check_objective(dft: DFTArguments) -> None:
    """Raise `UserError` for objective flags that contradict one another."""
    if not dft.use_simple_dft and dft.objective not in (Dft.name, Sft.name):
        raise UserError(
            f"--use_simple_dft False is SFT, which contradicts --objective {dft.objective}; remove one of "
            "them"
        )
    objective, schedule = build_objective(dft), build_schedule(dft)
    without_alpha = f"the objective {dft.objective} has no alpha; remove it, or use --objective {Dft.name}"
    if not isinstance(objective, Dft) and dft.dft_alpha != Dft.alpha:
        raise UserError(f"--dft_alpha {dft.dft_alpha:g}: {without_alpha}")
    if schedule.kind == CONSTANT.kind and schedule.share != CONSTANT.share:
        raise UserError(
            f"--dft_alpha_schedule_share {schedule.share:g}: alpha is constant; add --dft_alpha_schedule "
            "linear or cosine, or remove this flag"
        )
    if schedule.kind != CONSTANT.kind and not isinstance(objective, Dft):
        raise UserError(f"--dft_alpha_schedule {schedule.kind}: {without_alpha}")
    if schedule.kind != CONSTANT.kind and isinstance(objective, Dft) and objective.alpha == 0:
        raise UserError(
            f"--dft_alpha_schedule {schedule.kind}: alpha increases from 0 to --dft_alpha, which is 0; set "
            "--dft_alpha to the final value"
        )
    with convert_value_errors(f"--end_of_turn_weight {dft.end_of_turn_weight:g}"):
        check_schedule(objective, schedule, dft.end_of_turn_weight)
