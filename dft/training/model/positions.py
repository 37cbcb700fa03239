"""Check that the sequences of a run fit the position range of a model."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dft.errors import UserError

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Types of rotary positions whose frequencies depend on the largest position of a micro-batch."""


def check_positions(model: PreTrainedModel, longest: int, max_length: int) -> None:
    """Raise `UserError` if the model has a table of learned positions and the data needs more of them.

    Args:
        model: the model.
        longest: number of tokens in the longest sequence.
        max_length: value of --max_length, for the message.
    """
    limit = position_limit(model.config.get_text_config())
    if limit is None or longest <= limit:
        return
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in embeddings if table is not model.get_input_embeddings()]
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT has two extra rows
        raise UserError(
            f"--max_length {max_length}: the longest sequence has {longest} tokens, and the model has "
            f"learned {limit} positions; use --max_length {limit} or less"
        )


def position_notes(model: PreTrainedModel, longest: int) -> list[str]:
    """Return notes on sequences longer than the model was designed for.

    Args:
        model: the model.
        longest: number of tokens in the longest sequence.
    """
    config = model.config.get_text_config()
    notes = []
    limit = position_limit(config)
    if limit is not None and longest > limit:
        notes.append(
            f"the longest sequence has {longest} tokens, more than the {limit} of the model's config"
        )
    for rope_type, rope_limit in length_dependent_rope(config).items():
        if longest > rope_limit:
            notes.append(
                f"the model's rotary positions ({rope_type}) change for a whole micro-batch if one of its "
                f"sequences has more than {rope_limit} tokens, and the longest has {longest}: losses depend "
                f"on which sequences are batched together; --max_length {rope_limit} avoids this"
            )
    return notes


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions a model was designed for; None if its configuration has none."""
    settings = config.to_dict()
    return settings.get("max_position_embeddings", settings.get("n_positions"))


def length_dependent_rope(config: PretrainedConfig) -> dict[str, int]:
    """Return the rotary position types whose frequencies depend on the sequence length.

    Returns:
        The number of tokens beyond which the frequencies change, by type.
    """
    settings = config.to_dict()
    limits: dict[str, int] = {}
    for parameters in _rope_parameters(settings):
        rope_type = parameters.get("rope_type")
        if rope_type not in LENGTH_DEPENDENT_ROPE:
            continue
        limit = settings["max_position_embeddings"]
        if rope_type == "longrope":
            limit = parameters.get("original_max_position_embeddings", limit)
        limits[rope_type] = min(limit, limits.get(rope_type, limit))
    return limits


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """Return the types of rotary positions in a configuration.

    Args:
        config: configuration as a dictionary.
    """
    return {parameters["rope_type"] for parameters in _rope_parameters(config) if "rope_type" in parameters}


def _rope_parameters(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rotary parameters of all layers, or of each layer type."""
    parameters = config.get("rope_parameters") or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
