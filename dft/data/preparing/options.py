"""Options of data preparation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodeOptions:
    """Options for encoding a single conversation.

    Attributes:
        max_length: maximum number of tokens of a sequence.
        truncation: what happens to longer sequences: "right" or "left" removes tokens at that end, "drop"
            skips the sequence, "error" raises.
        last_turn_only: whether to supervise only the last assistant turn of a conversation.
        keep_rejected: whether to keep the text of records that cannot be used.
    """

    max_length: int
    truncation: str = "right"
    last_turn_only: bool = False
    keep_rejected: bool = False


@dataclass(frozen=True)
class PrepareOptions:
    """Options for preparing a dataset. With the files and the tokenizer they determine the prepared data.

    Attributes:
        max_length: maximum number of tokens of a sequence, and of a packed row.
        validation_split_percentage: percentage of the training conversations to hold out for evaluation.
        max_train_samples, max_eval_samples: maximum number of sequences of each split; None for no limit.
        seed: seed of splits, samples, weights and packing.
        truncation: see `EncodeOptions`.
        train_on_last_turn_only: whether to supervise only the last assistant turn of a conversation.
        data_weights: for each value of --data_files, its number of passes per epoch; () for 1 each.
        dedup: whether to drop duplicates of earlier conversations.
        on_bad_data: "error" to raise on records that cannot be used, "skip" to skip them and save a copy.
        packing: whether to put several sequences into each row of `max_length` tokens.
    """

    max_length: int
    validation_split_percentage: float = 0.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    seed: int = 42
    truncation: str = "right"
    train_on_last_turn_only: bool = False
    data_weights: tuple[float, ...] = ()
    dedup: bool = False
    on_bad_data: str = "error"
    packing: bool = False
