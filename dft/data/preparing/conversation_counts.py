"""Counters for the outcome of each conversation of a data file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass
class ConversationCounts:
    """Counts of the conversations of one data file, before selection.

    Attributes:
        read: records in the file, usable or not.
        rejected: unusable records, by kind of fault.
        dropped: conversations without a supervised token within the length limit.
        too_long: conversations dropped because of their length.
        truncated: conversations that were truncated, or that lost some of their sequences to the limit.
        lost_supervised: supervised tokens lost to the limit, including those of dropped conversations.
        lost_endings: supervised turns whose last token was lost to the limit.
        endings: remaining supervised turns by the stop token they end with, None for no stop token.
        unknown: unknown tokens, which represent text outside the vocabulary.
        roles: turns by role.
        turns: conversations by number of turns.
        remarks: sequences by properties that the user should know about.
        remark_examples: the first sequence of each remark, as `file:line, messages[index]`.
        left_out: rows that a condition of --keep_rows leaves out, by the condition.
        unread: values of the columns that are not part of a conversation, by column.
        named: rows of usable conversations that have a column which a flag names, by column.
    """

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    too_long: int = 0
    truncated: int = 0
    lost_supervised: int = 0
    lost_endings: int = 0
    endings: Counter[str | None] = field(default_factory=Counter)
    unknown: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    remark_examples: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "ConversationCounts") -> "ConversationCounts":
        names = [attribute.name for attribute in fields(self) if attribute.name != "remark_examples"]
        sums = {name: vars(self)[name] + vars(other)[name] for name in names}
        return ConversationCounts(**sums, remark_examples={**other.remark_examples, **self.remark_examples})

    def add_remarks(self, remarks: Mapping[str, str], place: str) -> None:
        """Count the remarks of a sequence.

        Args:
            remarks: kind and example of each remark.
            place: file and line of the conversation.
        """
        for kind, example in remarks.items():
            self.remarks[kind] += 1
            self.remark_examples.setdefault(kind, f"{place}, {example}")
