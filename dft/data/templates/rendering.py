"""Rendered text of a training sequence with its supervised spans."""

from dataclasses import dataclass, field


@dataclass
class Rendering:
    """A training sequence as text.

    Attributes:
        text: the text to tokenize.
        spans: [start, end) character ranges of `text` that are supervised, in order and disjoint. What
            precedes a span is the prompt of its turn at inference.
        endings: end-of-turn token at the end of each span, or None if there is none.
        weights: weight of each span in the loss.
        reason: why the sequence does not continue the previous one of its conversation; "" for the first one.
        in_pieces: whether the only span is tokenized separately from its prompt, as at inference, because a
            token would straddle its start or end otherwise.
        remarks: properties of the sequence that the user should know about, by kind, each with an example.
    """

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    endings: list[str | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    reason: str = ""
    in_pieces: bool = False
    remarks: dict[str, str] = field(default_factory=dict)
