"""How tokens weigh, from the flags: the objective, the schedule of alpha, the floor under ends of turns."""

import torch

from dft.arguments import Arguments, DFTArguments
from dft.errors import UserError
from dft.loss.objectives import Dft, Objective, Sft, make_objective, parameters_of
from dft.training.schedule import CONSTANT, AlphaSchedule


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


def least_weight(objective: Objective) -> float:
    """What the most unlikely token weighs, where it weighs anything for sure."""
    return objective.line[1] if objective.line is not None else 0.0


def schedule_of(dft: DFTArguments) -> AlphaSchedule:
    """The schedule of alpha of a run."""
    return AlphaSchedule(dft.dft_alpha_schedule, dft.dft_alpha_schedule_share)


def check_weighing(arguments: Arguments) -> None:
    """Raises `UserError` for flags about weights that contradict one another. Settles `--use_simple_dft`."""
    dft = arguments.dft
    if not 0 <= dft.end_of_turn_weight <= 1:
        raise UserError(
            f"--end_of_turn_weight {dft.end_of_turn_weight:g}: must lie in [0, 1]; 1 supervises the ends of "
            "turns as SFT does, 0 leaves them to the objective"
        )
    if not 0 < dft.dft_alpha_schedule_share <= 1:
        raise UserError(
            f"--dft_alpha_schedule_share {dft.dft_alpha_schedule_share:g}: must be above 0 and at most 1, "
            "the share of the steps over which alpha rises"
        )
    if dft.dft_alpha_schedule == CONSTANT.kind and dft.dft_alpha_schedule_share != CONSTANT.share:
        raise UserError(
            f"--dft_alpha_schedule_share {dft.dft_alpha_schedule_share:g}: alpha is constant; give "
            "--dft_alpha_schedule linear or cosine, or leave it out"
        )
    if not dft.use_simple_dft:
        if dft.objective not in (Dft.name, Sft.name):
            raise UserError(
                f"--use_simple_dft False is plain SFT, --objective {dft.objective} is not; give one"
            )
        if dft.objective == Dft.name and dft.dft_alpha != 0:
            dft.dft_alpha = 0.0
            arguments.notes.append("--use_simple_dft False: alpha is 0, plain SFT")
    objective = objective_of(dft)
    if 0 < dft.end_of_turn_weight <= least_weight(objective):
        arguments.notes.append(
            f"--end_of_turn_weight {dft.end_of_turn_weight:g} has no effect: no token weighs less than "
            f"{least_weight(objective):g} as it is"
        )
    if not isinstance(objective, Dft):
        if dft.dft_alpha != Dft.alpha:
            raise UserError(
                f"--dft_alpha {dft.dft_alpha:g}: the objective {dft.objective} has no alpha; leave it out, "
                f"or use --objective {Dft.name}"
            )
        if dft.dft_alpha_schedule != "constant":
            raise UserError(
                f"--dft_alpha_schedule {dft.dft_alpha_schedule}: the objective {dft.objective} has no alpha; "
                f"leave it out, or use --objective {Dft.name}"
            )
    if dft.dft_alpha_schedule != "constant" and dft.dft_alpha == 0:
        raise UserError(
            f"--dft_alpha_schedule {dft.dft_alpha_schedule}: alpha rises from 0 to --dft_alpha, which is 0; "
            "give the alpha to arrive at"
        )
    if objective.kl_weight > 0 and arguments.training.sequence_parallel_size > 1:
        raise UserError(
            f"--sequence_parallel_size {arguments.training.sequence_parallel_size}: --objective "
            f"{dft.objective} scores whole sequences with the base model; leave one of them out"
        )
    metric = (arguments.training.metric_for_best_model or "").removeprefix("eval_")
    if metric == "objective" and objective.potential(torch.zeros(1)) is None:
        raise UserError(
            f"--metric_for_best_model objective: --objective {dft.objective} descends nothing that is a "
            "function of p; choose eval_acc or eval_nll"
        )
