"""Training objectives: the rules that weight each token, one class each.

The loss is `sum_t (w_t * nll_t + kl_weight * kl_t) / N` over the N supervised tokens of an optimizer step.
The weight w_t is detached and depends only on the token's own row of logits and its score before training, so
for every objective the gradient on these logits is w_t * (softmax - onehot) / N. If w_t is a function of p_t,
and therefore of nll_t, training minimizes a potential: the integral of w from 0 to nll_t.

To add an objective, write a class with a `name`, its parameters as fields, `weight`, `formula` and, if there
is one, `potential` in the module that fits; add it to `OBJECTIVES` in `table.py`, and a row to the table of
tests/loss/test_objectives.py. On the command line it is `--objective NAME --objective_args FIELD=VALUE`.
"""

from dft.loss.objectives.base import (
    Objective,
    TokenRows,
    apply_floor,
    check_base_logp,
    check_range,
    floored_potential,
)
from dft.loss.objectives.every import EveryWeight, first_step_equivalent
from dft.loss.objectives.functions_of_p import Dft, Sft
from dft.loss.objectives.table import (
    OBJECTIVES,
    check_base,
    make_objective,
    parameters_of,
    resolve_objective,
)

__all__ = [
    "OBJECTIVES",
    "Dft",
    "EveryWeight",
    "Objective",
    "Sft",
    "TokenRows",
    "apply_floor",
    "check_base",
    "check_base_logp",
    "check_range",
    "first_step_equivalent",
    "floored_potential",
    "make_objective",
    "parameters_of",
    "resolve_objective",
]
