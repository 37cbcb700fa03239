"""How tokens weigh, from the flags: the objective, the schedule of alpha, the floor under ends of turns."""

from dataclasses import dataclass, field
from typing import ClassVar

from dft.errors import UserError
from dft.loss.objectives import OBJECTIVES, Objective, make_objective, parameters_of
from dft.loss.schedule import KINDS, AlphaSchedule


@dataclass
class DFTArguments:
    """The method."""

    _argument_group_name: ClassVar[str] = "DFT"

    dft_alpha: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a token: alpha * p + (1 - alpha). 1 is the paper's DFT, 0 is plain SFT."
        },
    )
    objective: str = field(
        default="dft",
        metadata={
            "help": "What a token weighs: dft, sft, power (p^k), threshold (1 where p >= q), eaft (entropy), "
            "asft (dft, held near the base model), chord (p (1 - p)).",
            "choices": list(OBJECTIVES),
        },
    )
    objective_args: str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the objective, as k=0.5: k of power, q of threshold, kl_weight of asft."
        },
    )
    dft_alpha_schedule: str = field(
        default="constant",
        metadata={
            "help": "How alpha comes to its value: constant, or rising from 0 (SFT) as linear or cosine.",
            "choices": list(KINDS),
        },
    )
    dft_alpha_schedule_share: float = field(
        default=0.5, metadata={"help": "Share of the steps over which alpha rises."}
    )
    end_of_turn_weight: float = field(
        default=0.0,
        metadata={"help": "The least that tokens which end a turn weigh, so that stopping is learned."},
    )
    fused_head: str = field(
        default="auto",
        metadata={
            "help": "Compute loss and gradient without ever holding the logits: on, off, or auto, which does "
            "wherever the result is that of the model's own logits.",
            "choices": ["auto", "on", "off"],
        },
    )
    use_simple_dft: bool = field(
        default=True, metadata={"help": "False trains by plain SFT: alpha becomes 0."}
    )


def objective_of(dft: DFTArguments) -> Objective:
    """The objective of a run.

    Raises:
        UserError: a parameter that it has not, or that is no number or out of range.
    """
    parameters = read_parameters(dft)
    if "alpha" in parameters_of(dft.objective):
        parameters.setdefault("alpha", dft.dft_alpha)
    try:
        return make_objective(dft.objective, parameters)
    except ValueError as error:
        flags = "--objective_args and --dft_alpha" if "alpha" in parameters else "--objective_args"
        raise UserError(f"--objective {dft.objective}: {error}; see {flags}") from None


def read_parameters(dft: DFTArguments) -> dict[str, float]:
    """`k=0.5,q=0.1` as numbers by name."""
    given = dft.objective_args or ""
    parameters: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in given.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name in parameters:
            raise UserError(f"--objective_args {given}: {name} is given twice")
        try:
            parameters[name] = float(value)
        except ValueError:
            raise UserError(
                f"--objective_args {given}: expected NAME=NUMBER, separated by commas, got {part!r}"
            ) from None
        if name == "alpha":
            raise UserError(f"--objective_args {given}: alpha is --dft_alpha {value}")
    return parameters


def schedule_of(dft: DFTArguments) -> AlphaSchedule:
    """The schedule of alpha of a run."""
    return AlphaSchedule(dft.dft_alpha_schedule, dft.dft_alpha_schedule_share)
