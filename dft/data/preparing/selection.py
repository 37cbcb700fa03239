"""Which of the encoded conversations are trained on and which evaluated on. All of it is seeded."""

from dataclasses import dataclass

import numpy as np

from dft.data.preparing.chunk import Totals
from dft.data.preparing.encode import Encoded
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.packing import pack
from dft.errors import UserError


@dataclass(frozen=True)
class Split:
    """The sequences of one split in order, and how they lie in rows.

    Attributes:
        encoded: the sequences; a conversation that is taken several times stands there as often.
        offsets: (rows + 1,) row r holds the sequences offsets[r] to offsets[r + 1]; None for one each.
    """

    encoded: Encoded
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class LeftOut:
    """Conversations that were read and are used nowhere, beside those that cannot be used at all.

    Attributes:
        repeated: the same as an earlier one, dropped by --dedup, in the files to train and to evaluate on.
        shared: of the evaluation files that are trained on.
        not_drawn: not among those that --data_weights and the limits on samples take.
    """

    repeated: int = 0
    shared: int = 0
    not_drawn: int = 0


def select(
    encoded: dict[str, Encoded],
    totals: dict[str, list[Totals]],
    entries: list[int],
    options: PrepareOptions,
) -> tuple[dict[str, Split], LeftOut]:
    """What is trained and evaluated on of the conversations in the "train" and "eval" files.

    Args:
        entries: the entry of the command line that each training file belongs to.

    Raises:
        UserError: nothing is left of one of them.
    """
    for group, flag in (("train", "--data_files"), ("eval", "--eval_data_files")):
        if totals[group] and not len(encoded[group]):
            raise UserError(_nothing_left(flag, sum(totals[group], Totals()), options))
    train, held_out = encoded["train"], encoded["eval"]
    repeated = shared = 0
    if options.dedup:
        before = conversation_count(train) + conversation_count(held_out)
        train, held_out = without_repeats(train), without_repeats(held_out)
        repeated = before - conversation_count(train) - conversation_count(held_out)
    if len(held_out):
        both = shared_with(held_out, train)
        shared = conversation_count(held_out.take(both))
        if both.all():
            raise UserError(
                f"--eval_data_files: all {shared} conversations are in the training files as well; "
                "evaluation needs conversations the model is not trained on"
            )
        held_out = held_out.take(~both)
    elif options.validation_split_percentage:
        train, held_out = hold_out(train, options.validation_split_percentage, options.seed)
    before = conversation_count(train) + conversation_count(held_out)
    if options.data_weights:
        train = weighted(train, list(options.data_weights), entries, options.seed)
        if not len(train):
            shown = " ".join(f"{weight:g}" for weight in options.data_weights)
            raise UserError(f"--data_weights {shown}: not one conversation is left to train on")
    chosen = {"train": limited(train, options.max_train_samples, options.seed)}
    if len(held_out):
        chosen["eval"] = limited(held_out, options.max_eval_samples, options.seed)
    splits = {
        name: packed(one, options.max_length, options.seed) if options.packing else Split(one)
        for name, one in chosen.items()
    }
    not_drawn = before - sum(conversation_count(one) for one in chosen.values())
    return splits, LeftOut(repeated, shared, not_drawn)


def _nothing_left(flag: str, totals: Totals, options: PrepareOptions) -> str:
    if totals.rejected.total() == totals.read:
        reasons = "; ".join(f"{count} x {kind}" for kind, count in totals.rejected.most_common(3))
        return f"{flag}: nothing is left of {totals.read} conversations, none can be used ({reasons})"
    return (
        f"{flag}: nothing is left of {totals.read} conversations, none has a supervised "
        f"token within --max_length {options.max_length}; raise it"
    )


def without_repeats(encoded: Encoded) -> Encoded:
    """The first of equal conversations: equal tokens, equally supervised."""
    _, first, number = np.unique(encoded.taught, return_index=True, return_inverse=True)
    kept = encoded.conversations[first]  # all sequences of a conversation have one digest
    return encoded.take(encoded.conversations == kept[number])


def shared_with(encoded: Encoded, other: Encoded) -> np.ndarray:
    """(sequences,) whether the conversation of each is among the other ones."""
    return np.isin(encoded.keys, other.keys)


def conversation_count(encoded: Encoded) -> int:
    return len(np.unique(encoded.conversations))


def hold_out(encoded: Encoded, percentage: float, seed: int) -> tuple[Encoded, Encoded]:
    """(train, eval): a share of the conversations, at least one, in the second.

    Equal conversations stay on one side together.

    Raises:
        UserError: nothing would be left to train on.
    """
    # Numbered by digest: the choice depends on the conversations and the seed, not on the order of the lines.
    different, number = np.unique(encoded.keys, return_inverse=True)
    count = max(1, round(len(different) * percentage / 100))
    if count >= len(different):
        raise UserError(
            f"--validation_split_percentage {percentage:g}: of {len(different)} different conversations "
            f"{count} would be held out and none left to train on"
        )
    chosen = np.random.default_rng(seed).permutation(len(different))[:count]
    held_out = np.isin(number, chosen)
    return encoded.take(~held_out), encoded.take(held_out)


def weighted(encoded: Encoded, weights: list[float], entries: list[int], seed: int) -> Encoded:
    """Each conversation as often as its file is wanted in one epoch.

    A weight of 2.5 takes all conversations twice and half of them, drawn at random, a third time. The
    repetitions of a file stand behind it.

    Args:
        weights: epochs of each entry of the command line within one epoch of the run.
        entries: the entry that each file belongs to.
    """
    number = np.array(entries)[encoded.sources]
    parts = []
    for entry, weight in enumerate(weights):
        mine = np.flatnonzero(number == entry)
        parts += [mine] * int(weight)
        conversations = np.unique(encoded.conversations[mine])
        count = round((weight - int(weight)) * len(conversations))
        drawn = np.random.default_rng([seed, entry]).permutation(conversations)[:count]
        parts.append(mine[np.isin(encoded.conversations[mine], drawn)])
    return encoded.take(np.concatenate(parts))


def limited(encoded: Encoded, count: int | None, seed: int) -> Encoded:
    """That many sequences, drawn at random and kept in order; all of them if there are no more."""
    if count is None or count >= len(encoded):
        return encoded
    return encoded.take(np.sort(np.random.default_rng(seed).permutation(len(encoded))[:count]))


def packed(encoded: Encoded, max_length: int, seed: int) -> Split:
    """The sequences in as few rows of at most `max_length` tokens as best-fit-decreasing finds."""
    order, offsets = pack(encoded.lengths, max_length, seed)
    return Split(encoded.take(order), offsets)
