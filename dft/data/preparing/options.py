"""Options of the data preparation."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dft.bounds import Bounds


@dataclass
class DataOptions:
    """Options that shape the prepared data. Each field is also a command-line flag.

    Together with the tokenizer, the chat template and the contents of the files they determine every token of
    the prepared data, so all of them are part of the cache key.
    """

    max_length: Annotated[
        int, Bounds(minimum=2, maximum=2**31 - 1, reason="because a target token needs a token before it")
    ] = field(
        default=2048,
        metadata={"help": "Maximum length of a sequence in tokens. --truncation handles longer ones."},
    )
    truncation: str = field(
        default="right",
        metadata={
            "help": "How to handle sequences longer than --max_length: remove tokens on the right or on "
            "the left, drop the sequence, or stop with an error.",
            "choices": ["right", "left", "drop", "error"],
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack several whole conversations into each row of --max_length tokens. They do not "
            "attend to one another."
        },
    )
    train_on_last_turn_only: bool = field(
        default=False,
        metadata={
            "help": "Supervise only the last assistant turn of each conversation instead of all of them."
        },
    )
    data_weights: Annotated[list[float], Bounds(above=0, maximum=10_000)] = field(
        default_factory=list,
        metadata={
            "help": "How many times each entry of --data_files is used per epoch, in the same order: 0.5 "
            "uses half of its conversations, 2 uses all of them twice. Default: 1 for each."
        },
    )
    dedup: Literal[False, True, "near"] = field(
        default=False,
        metadata={
            "help": "Drop conversations whose tokens equal those of an earlier one (True), or that also "
            "share most of their text with an earlier one (near)."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names for columns, as NAME=COLUMN: instruction=question output=answer reads the column "
            "question as instruction. FILE:NAME=COLUMN is for one file."
        },
    )
    ignore_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns to leave out, also those that would be an error. FILE:COLUMN is for one file."
        },
    )
    keep_rows: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Use only the rows that fulfil these conditions, as COLUMN=VALUE: label=true. A column "
            "given twice may have either value. FILE:COLUMN=VALUE is for one file."
        },
    )
    use_chosen: bool = field(
        default=False,
        metadata={"help": "Train on the chosen answer of preference pairs, which are an error otherwise."},
    )
    on_bad_data: str = field(
        default="error",
        metadata={
            "help": "How to handle rows that cannot be used: error refuses to start; skip leaves them out "
            "and copies them to rejected.jsonl in the output folder.",
            "choices": ["error", "skip"],
        },
    )
    validation_split_percentage: Annotated[float, Bounds(minimum=0, below=100)] = field(
        default=0.0,
        metadata={
            "help": "Percentage of the conversations to hold out for evaluation, drawn with the data seed."
        },
    )
    max_train_samples: Annotated[int | None, Bounds(above=0)] = field(
        default=None,
        metadata={"help": "Train on this many sequences, drawn with the data seed. Default: all."},
    )
    max_eval_samples: Annotated[int | None, Bounds(above=0)] = field(
        default=None,
        metadata={"help": "Evaluate on this many sequences, drawn with the data seed. Default: all."},
    )

    @property
    def keep_rejected(self) -> bool:
        """True if the text of unusable rows is kept."""
        return self.on_bad_data == "skip"


@dataclass
class PrepareOptions(DataOptions):
    """The options of `prepare`.

    Attributes:
        seed: seed for the validation split, samples, fractions of files and the rows to pack together.
    """

    seed: int = 42
