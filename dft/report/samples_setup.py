"""Choice of the prompts for `--generate_samples`."""

from transformers import PreTrainedModel

from dft.arguments.parser import Arguments
from dft.data.preparing.data_report import file_group
from dft.data.preparing.prepare import PreparedData
from dft.data.preparing.prompts import PromptSelection, first_prompts
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.stop_tokens import resolve_stop_ids
from dft.errors import UserError
from dft.report.samples_callback import SampledTrainer, SamplesCallback
from dft.training.measuring.samples import AnswerGenerator
from dft.training.model.positions import position_limit


def make_samples_callback(
    arguments: Arguments, trainer: SampledTrainer, encoder: ChatEncoder, data: PreparedData
) -> SamplesCallback:
    """Return the callback for `--generate_samples`, and note in the arguments which prompts are missing.

    Raises:
        UserError: the model cannot generate, no prompt can be used, or nothing ends an answer.
    """
    count, max_tokens = arguments.watch.generate_samples, arguments.watch.generate_samples_max_tokens
    if not trainer.model.can_generate():
        raise UserError(
            f"--generate_samples {count}: {type(trainer.model).__name__} cannot generate; remove the flag"
        )
    longest = longest_prompt(trainer.model, arguments.data.max_length, max_tokens)
    selection = select_prompts(data, encoder, count, longest)
    note = selection_note(selection, count, longest)
    if not selection.prompts:
        raise UserError(f"{note}; use other evaluation data, or remove --generate_samples")
    arguments.notes.extend([note] if note else [])
    eos = trainer.model.generation_config.eos_token_id
    generation_stops = [] if eos is None else eos if isinstance(eos, list) else [eos]
    stops, _ = resolve_stop_ids(encoder.tokenizer, generation_stops, list(data.report["end_of_turn_tokens"]))
    stop = trainer.options.stop
    generator = AnswerGenerator(
        [prompt.ids for prompt in selection.prompts],
        stops,
        max_tokens,
        arguments.training.per_device_eval_batch_size,
        trainer.accelerator,
        trainer.options.heartbeat.beat,
        lambda: stop is not None and stop.number != 0,
    )
    return SamplesCallback(trainer, selection.prompts, generator, encoder.tokenizer, max_tokens)


def select_prompts(data: PreparedData, encoder: ChatEncoder, count: int, longest: int) -> PromptSelection:
    """Return the first prompts of the evaluation data, the same number of each evaluation set.

    Args:
        data: the prepared data.
        encoder: renders and tokenizes the conversations.
        count: number of prompts in all; the first sets have one more if it cannot be divided.
        longest: maximum number of tokens of a prompt.
    """
    splits = [split for split in data.datasets if split != "train"]
    total = PromptSelection([])
    for position, split in enumerate(splits):
        share = count // len(splits) + (position < count % len(splits))
        if not share:
            break
        sources = data.sources[file_group(split, data.names)]
        selection = first_prompts(data.datasets[split], sources, encoder, share, longest)
        total.prompts.extend(selection.prompts)
        total.conversations += selection.conversations
        total.unanswered += selection.unanswered
        total.too_long += selection.too_long
    return total


def longest_prompt(model: PreTrainedModel, max_length: int, max_tokens: int) -> int:
    """Return the maximum number of tokens of a prompt that leaves room for an answer.

    Args:
        model: the model.
        max_length: value of --max_length.
        max_tokens: maximum number of tokens of an answer.

    Raises:
        UserError: there is no room for any prompt.
    """
    positions = position_limit(model.config.get_text_config())
    if positions is None:
        return max_length
    if max_tokens >= positions:
        raise UserError(
            f"--generate_samples_max_tokens {max_tokens}: the model has only {positions} positions for a "
            "prompt and its answer; use fewer"
        )
    return min(max_length, positions - max_tokens)


def selection_note(selection: PromptSelection, count: int, longest: int) -> str | None:
    """Return a note if conversations were passed over as too long, or if there are too few; else None.

    Args:
        selection: the prompts.
        count: value of --generate_samples.
        longest: maximum number of tokens of a prompt.
    """
    used, too_long = len(selection.prompts), selection.too_long
    if used == count and not too_long:
        return None
    if used == count:
        return (
            f"--generate_samples {count}: {too_long:,} conversations are passed over because their prompts "
            f"have more than {longest:,} tokens"
        )
    reasons = []
    if too_long:
        reasons.append(f"{too_long:,} have a prompt of more than {longest:,} tokens")
    if selection.unanswered:
        reasons.append(f"{selection.unanswered:,} do not end with an answer that is trained")
    of_them = f" ({', '.join(reasons)})" if reasons else ""
    return (
        f"--generate_samples {count}: {f'only {used:,}' if used else 'none'} of the "
        f"{selection.conversations:,} conversations of the evaluation data can be used{of_them}"
    )
