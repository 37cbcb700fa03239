"""What is to be done with the conversations, as values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodeOptions:
    """What besides tokenizer and template decides how one conversation becomes sequences.

    Attributes:
        truncation: which end of a sequence longer than `max_length` is cut, or "drop", or "error".
        last_turn_only: supervise the last assistant turn of a conversation alone.
        keep_rejected: keep the text of what cannot be used.
    """

    max_length: int
    truncation: str = "right"
    last_turn_only: bool = False
    keep_rejected: bool = False


@dataclass(frozen=True)
class PrepareOptions:
    """Everything besides tokenizer and file contents that shapes the prepared data.

    Attributes:
        data_weights: epochs of each entry of `data_files` within one of the run; none for 1 each.
        dedup: drop conversations that are the same as an earlier one.
        on_bad_data: "error", or "skip" what cannot be used and keep a copy of it.
        packing: several sequences per row of `max_length` tokens.
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
