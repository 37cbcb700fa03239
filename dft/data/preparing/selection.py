"""Seeded selection of the training and evaluation data: duplicates, splits, weights and sample limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.encoded_sequences import EncodedSequences
from dft.data.preparing.evaluation_sets import EVAL
from dft.data.preparing.near_duplicates import near_repeats
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.packing import pack
from dft.errors import UserError


@dataclass(frozen=True)
class Split:
    """The sequences of a split in order, and their arrangement in rows.

    Attributes:
        encoded: the sequences; a conversation that is repeated occurs several times.
        offsets: (rows + 1,) row r holds the sequences offsets[r] to offsets[r + 1]; None for one per row.
    """

    encoded: EncodedSequences
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class UnusedCounts:
    """Numbers of usable conversations that are not part of any split.

    Attributes:
        repeated: duplicates of earlier conversations, dropped by --dedup from training and evaluation files.
        shared: conversations of the evaluation files that also occur in the training files.
        not_drawn: conversations not selected because of --data_weights or the sample limits.
    """

    repeated: int = 0
    shared: int = 0
    not_drawn: int = 0


def select(
    encoded: dict[str, EncodedSequences],
    counts: dict[str, list[ConversationCounts]],
    entries: list[int],
    options: PrepareOptions,
    eval_splits: Sequence[str] = (),
) -> tuple[dict[str, Split], UnusedCounts]:
    """Return the "train" split and the evaluation sets, if there are any.

    Args:
        encoded: the sequences of the "train" and the "eval" files.
        counts: the counts of each of these files.
        entries: for each training file, the index of its value of --data_files.
        options: deduplication, validation split, weights, sample limits and packing.
        eval_splits: for each evaluation file, the set that it belongs to. Default: all to "eval".

    Raises:
        UserError: no usable conversations remain for training or evaluation.
    """
    if not len(encoded["train"]):
        raise UserError(_nothing_left("--data_files", counts["train"], options))
    eval_splits = eval_splits or [EVAL] * len(counts["eval"])
    parts = {"train": encoded["train"]} | _evaluation_sets(encoded["eval"], counts, eval_splits, options)
    before = _count_all(parts)
    if options.dedup:
        parts = {name: drop_duplicates(part) for name, part in parts.items()}
    if options.dedup == "near":
        parts = {name: drop_near_duplicates(part) for name, part in parts.items()}
    repeated = before - _count_all(parts)
    train = parts.pop("train")
    shared = 0
    for name, part in parts.items():
        is_shared = np.isin(part.token_digests, train.token_digests)
        count = part.take(is_shared).count_conversations()
        if is_shared.all():
            raise UserError(
                f"{_flag_of(name)}: all {count} conversations are in the training files as well; "
                "evaluation needs conversations the model is not trained on"
            )
        parts[name], shared = part.take(~is_shared), shared + count
    if not parts and options.validation_split_percentage:
        train, parts[EVAL] = hold_out(train, options.validation_split_percentage, options.seed)
    before = _count_all({"train": train, **parts})
    if options.data_weights:
        train = repeat_by_weight(train, list(options.data_weights), entries, options.seed)
        if not len(train):
            weights = " ".join(f"{weight:g}" for weight in options.data_weights)
            raise UserError(f"--data_weights {weights}: no conversation is left to train on; raise a weight")
    chosen = {"train": draw_sample(train, options.max_train_samples, options.seed)}
    for name, part in parts.items():
        chosen[name] = draw_sample(part, options.max_eval_samples, options.seed)
    not_drawn = before - _count_all(chosen)
    splits = {name: _arrange(sequences, options) for name, sequences in chosen.items()}
    return splits, UnusedCounts(repeated, shared, not_drawn)


def _evaluation_sets(
    encoded: EncodedSequences,
    counts: dict[str, list[ConversationCounts]],
    eval_splits: Sequence[str],
    options: PrepareOptions,
) -> dict[str, EncodedSequences]:
    """Return the sequences of the evaluation files by the set that the files belong to, see `select`."""
    parts = {}
    for name in dict.fromkeys(eval_splits):
        files = [number for number, split in enumerate(eval_splits) if split == name]
        parts[name] = encoded.take(np.isin(encoded.sources, files))
        if not len(parts[name]):
            of_files = [counts["eval"][number] for number in files]
            raise UserError(_nothing_left(_flag_of(name), of_files, options))
    return parts


def _flag_of(split: str) -> str:
    """Return the flag of an evaluation set, for messages."""
    return "--eval_data_files" + ("" if split == EVAL else f" {split.removeprefix(f'{EVAL}_')}=...")


def _nothing_left(flag: str, files: Sequence[ConversationCounts], options: PrepareOptions) -> str:
    """Return the error message for files without any usable sequence."""
    counts = sum(files, ConversationCounts())
    if counts.left_out and counts.left_out.total() + counts.rejected.total() == counts.read:
        left_out = "; ".join(f"{count} by {condition}" for condition, count in counts.left_out.most_common())
        return (
            f"{flag}: no conversation is left of {counts.read}: left out {left_out}; check the value and its "
            "column"
        )
    if counts.rejected.total() == counts.read:
        reasons = "; ".join(f"{count} x {kind}" for kind, count in counts.rejected.most_common(3))
        return f"{flag}: none of the {counts.read} conversations can be used ({reasons})"
    return (
        f"{flag}: none of the {counts.read} conversations has a supervised token within --max_length "
        f"{options.max_length}; raise it"
    )


def _count_all(parts: Mapping[str, EncodedSequences]) -> int:
    return sum(part.count_conversations() for part in parts.values())


def drop_duplicates(encoded: EncodedSequences) -> EncodedSequences:
    """Return the first of each set of conversations with equal token ids and labels."""
    _, first, number = np.unique(encoded.label_digests, return_index=True, return_inverse=True)
    first_conversations = encoded.conversations[first]  # all sequences of a conversation share one digest
    return encoded.take(encoded.conversations == first_conversations[number])


def drop_near_duplicates(encoded: EncodedSequences) -> EncodedSequences:
    """Return the sequences of conversations that share less text with each earlier one that is returned."""
    if not len(encoded):
        return encoded
    _, first, number = np.unique(encoded.conversations, return_index=True, return_inverse=True)
    is_repeat = near_repeats(encoded.traits["signature"][first])
    return encoded.take(~is_repeat[number])


def hold_out(
    encoded: EncodedSequences, percentage: float, seed: int
) -> tuple[EncodedSequences, EncodedSequences]:
    """Split off a percentage of the distinct conversations, at least one, for evaluation.

    All copies of a conversation go to the same side.

    Returns:
        The training sequences and the evaluation sequences.

    Raises:
        UserError: no conversation would be left to train on.
    """
    # Numbered by digest, so that the choice depends on the conversations and the seed, not on the line order.
    distinct, number = np.unique(encoded.token_digests, return_inverse=True)
    count = max(1, round(len(distinct) * percentage / 100))
    if count >= len(distinct):
        raise UserError(
            f"--validation_split_percentage {percentage:g}: of {len(distinct)} different conversations "
            f"{count} would be held out and none left to train on; lower it or add data"
        )
    chosen = np.random.default_rng(seed).permutation(len(distinct))[:count]
    is_held_out = np.isin(number, chosen)
    return encoded.take(~is_held_out), encoded.take(is_held_out)


def repeat_by_weight(
    encoded: EncodedSequences, weights: list[float], entries: list[int], seed: int
) -> EncodedSequences:
    """Repeat the conversations of each file by its weight.

    With a weight of 2.5, every conversation occurs twice and a random half of them a third time. The
    repetitions follow the file they repeat.

    Args:
        encoded: the training sequences.
        weights: for each value of --data_files, its number of passes per epoch of the run.
        entries: for each file, the index of its value of --data_files.
        seed: seed of the random draw.
    """
    entry_of_sequence = np.array(entries)[encoded.sources]
    parts = []
    for entry, weight in enumerate(weights):
        members = np.flatnonzero(entry_of_sequence == entry)
        parts += [members] * int(weight)
        conversations = np.unique(encoded.conversations[members])
        count = round((weight - int(weight)) * len(conversations))
        drawn = np.random.default_rng([seed, entry]).permutation(conversations)[:count]
        parts.append(members[np.isin(encoded.conversations[members], drawn)])
    return encoded.take(np.concatenate(parts))


def draw_sample(encoded: EncodedSequences, count: int | None, seed: int) -> EncodedSequences:
    """Return `count` random sequences in their original order, or all if `count` is None or larger."""
    if count is None or count >= len(encoded):
        return encoded
    return encoded.take(np.sort(np.random.default_rng(seed).permutation(len(encoded))[:count]))


def _arrange(encoded: EncodedSequences, options: PrepareOptions) -> Split:
    """Arrange sequences in rows: one per row, or packed into rows of at most `max_length` tokens."""
    if not options.packing:
        return Split(encoded)
    order, offsets = pack(encoded.lengths, options.max_length, options.seed)
    return Split(encoded.take(order), offsets)
