"""Freeze the parameters of a model whose names match patterns."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import xxhash
from torch import nn
from transformers import PreTrainedModel

from dft.errors import UserError
from dft.training.model.adapters import has_adapters
from dft.training.parameters import element_count

MAX_SIMILAR = 4
"""Maximum number of similar names in an error message."""


def freeze_matching(model: PreTrainedModel, patterns: Sequence[str]) -> str:
    """Freeze the parameters with a name that matches a pattern. Return a note with the sizes of both parts.

    Patterns are those of a shell, for whole names: `*` is any text, `?` a character, `[0-7]` a character of a
    range. A parameter that several modules share has several names.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    # Names of shared parameters are kept, because users know either of them.
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for pattern in patterns for name in _matching(named, pattern)}
    identities = {id(named[name]) for name in frozen}
    flag = f"--freeze {' '.join(patterns)}"
    for name in frozen:
        named[name].requires_grad_(False)
    parameters = list(model.parameters())
    trained = sum(element_count(parameter) for parameter in parameters if parameter.requires_grad)
    if not trained:
        raise UserError(f"{flag}: matches every weight of the model, so there is nothing to train")
    shared = sorted(name for name in named if id(named[name]) in identities and name not in frozen)
    reason = f" (including {', '.join(shared)}, which shares its weight with a match)" if shared else ""
    total = sum(element_count(parameter) for parameter in parameters)
    return f"{flag}: {_millions(total - trained)} parameters are frozen{reason}, {_millions(trained)} trained"


def _matching(names: Sequence[str] | dict[str, nn.Parameter], pattern: str) -> list[str]:
    """Return the names that match a pattern. Raises `UserError` if none does."""
    matches = [name for name in names if fnmatchcase(name, pattern)]
    if matches:
        return matches
    prefix = pattern.rstrip(".")
    if any(fnmatchcase(name, f"{prefix}.*") for name in names):
        hint = f"names are compared as a whole; did you mean '{prefix}.*'?"
    else:
        similar = difflib.get_close_matches(pattern, names, n=MAX_SIMILAR, cutoff=0.0)
        hint = f"similar names: {', '.join(similar)}"
    raise UserError(f"--freeze {pattern}: matches no weight of the model; {hint}")


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def describe_frozen(model: nn.Module) -> str | None:
    """Describe which parameters are frozen, such that different sets differ; None for a model with adapters.

    The state of an optimizer fits only the parameters that it was created for.
    """
    if has_adapters(model):
        return None
    parameters = dict(model.named_parameters())
    frozen = sorted(name for name, parameter in parameters.items() if not parameter.requires_grad)
    if not frozen:
        return "none"
    digest = xxhash.xxh3_64_hexdigest("\n".join(frozen).encode())[:8]
    return f"{len(frozen)} of {len(parameters)} ({frozen[0]}, ...; {digest})"
