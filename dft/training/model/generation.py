"""Generation settings saved with a model."""

import copy
from collections.abc import Iterable

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dft.errors import UserError

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def resolve_generation_config(config: GenerationConfig, name: str) -> tuple[GenerationConfig, str | None]:
    """Return generation settings that can be saved, and a note if some were dropped.

    Many published models set a temperature without `do_sample`. transformers loads such settings, ignores
    them, and refuses to save them: without this, the first checkpoint would fail.

    Args:
        config: settings of the model.
        name: value of --model_name_or_path, for the message.

    Raises:
        UserError: the settings cannot be saved without the ignored ones either.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        pass
    else:
        return config, None
    resolved = copy.deepcopy(config)
    ignored = {setting for setting in SAMPLING_SETTINGS if vars(resolved).get(setting) is not None}
    for setting in ignored:
        setattr(resolved, setting, None)
    try:
        resolved.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"--model_name_or_path {name}: its generation_config.json could not be saved again: "
            f"{' '.join(str(error).split())}; correct that file"
        ) from None
    return resolved, (
        f"generation_config.json: saved without {', '.join(sorted(ignored))}, which do_sample false ignores "
        "and transformers refuses to save"
    )


def add_stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn_tokens: Iterable[str]
) -> str | None:
    """Make generation stop at every token that ends a training turn; return a note if some were added.

    Base models with a chat template often stop at `<|endoftext|>` only, and would generate past the
    `<|im_end|>` that they are trained to end turns with.

    Args:
        model: model whose generation settings are changed.
        tokenizer: its tokenizer.
        end_of_turn_tokens: tokens that end turns of the training data.
    """
    config = model.generation_config
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {token_id for token_id in (*eos, tokenizer.eos_token_id) if token_id is not None}
    new = [token for token in end_of_turn_tokens if tokenizer.convert_tokens_to_ids(token) not in stops]
    if not new:
        return None
    config.eos_token_id = sorted({*stops, *tokenizer.convert_tokens_to_ids(new)})
    return f"generation_config.json: the saved model also stops at {' '.join(new)}, which ends training turns"
