"""Rendered text of a training sequence with its supervised spans."""

from dataclasses import dataclass, field


@dataclass
class Rendering:
    """A training sequence as text.

    Attributes:
        text: the text to tokenize.
        spans: [start, end) character ranges of `text` that are supervised, in order and disjoint.
        stop_id: a stop token to append and supervise, for templates whose last turn has none.
        endings: stop token at the end of each span, or None if there is none.
    """

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    stop_id: int | None = None
    endings: list[str | None] = field(default_factory=list)
