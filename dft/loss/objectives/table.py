"""The table of all objectives, and how they are created and checked."""

from collections.abc import Mapping
from dataclasses import MISSING, fields

from dft.loss.objectives.base import Objective
from dft.loss.objectives.functions_of_distribution import Deft, Eaft
from dft.loss.objectives.functions_of_p import Chord, Dft, InfoSft, Luffy, Power, Sft, Talr, Threshold
from dft.loss.objectives.with_base import Asft, IwSft, Psft

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        Dft,
        Sft,
        Power,
        Threshold,
        Talr,
        Chord,
        InfoSft,
        Luffy,
        Eaft,
        Deft,
        Asft,
        IwSft,
        Psft,
    )
}
"""All objectives by name, in the order in which they are listed to users."""


def make_objective(name: str, parameters: Mapping[str, float] | None = None) -> Objective:
    """Create an objective by name.

    Args:
        parameters: values of its fields; fields that are missing keep their defaults.

    Raises:
        ValueError: unknown objective or parameter (the message lists the valid ones), or a value out of
            range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose from {', '.join(OBJECTIVES)}")
    parameters = parameters or {}
    names = [field.name for field in fields(OBJECTIVES[name])]
    for parameter in parameters:
        if parameter not in names:
            valid = f"its parameters are {', '.join(names)}" if names else "it has no parameters"
            owners = ", ".join(other for other in OBJECTIVES if parameter in parameters_of(other))
            hint = f"; {parameter!r} belongs to {owners}" if owners else ""
            raise ValueError(f"the objective {name} has no parameter {parameter!r}; {valid}{hint}")
    return OBJECTIVES[name](**parameters)


def parameters_of(name: str) -> dict[str, float]:
    """Return the parameters of an objective that have a default, and their defaults."""
    return {field.name: field.default for field in fields(OBJECTIVES[name]) if field.default is not MISSING}


def resolve_objective(alpha: float | None, objective: Objective | None, has_base: bool) -> Objective:
    """Return the objective of a run: DFT with the given alpha (default 1), or another objective.

    Raises:
        ValueError: both are given, the objective is not an instance of `Objective`, alpha is out of range, or
            `check_base` fails.
    """
    if objective is not None and not isinstance(objective, Objective):
        raise ValueError(
            f"objective {objective!r} must be an instance of Objective, such as make_objective('power')"
        )
    if objective is None:
        objective = Dft() if alpha is None else Dft(alpha)
    elif alpha is not None:
        raise ValueError(f"alpha {alpha} and the objective {objective} both set the token weight; pass one")
    check_base(objective, has_base)
    return objective


def check_base(objective: Objective, has_base: bool) -> None:
    """Raise ValueError if a required base model is missing, or if an unneeded one is passed."""
    if has_base != (objective.kl_weight > 0):
        verb = "does not use" if has_base else "needs the logits or hidden states of"
        raise ValueError(f"{objective} {verb} a base model")
