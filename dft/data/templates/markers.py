"""Special tokens and tags in rendered text, which a comparison of renderings must never cut in two."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

TAG = re.compile(r"<[|/]?[A-Za-z_][^<>\s{}'\"]*>|\[/?[A-Z][A-Z_]+\]")
"""Matches tags that chat templates write or search for, such as `<think>` and `[/INST]`."""
CLOSING_TAG = re.compile(r"[<\[]/.*|<[^|].*\|>")
"""Matches tags that close a block: `</think>`, `[/THINK]`, `<channel|>`."""


class Markers:
    """The special tokens of a tokenizer and the tags in the source of a chat template.

    Args:
        tokens: the added tokens of the tokenizer. Those of white space only are left out.
        source: Jinja source of the chat template.

    Attributes:
        pattern: matches each marker.
        source_texts: the markers that occur in the source of the template.
    """

    def __init__(self, tokens: Iterable[str], source: str = "") -> None:
        self.tokens = frozenset(token for token in tokens if token.strip())
        texts = {*self.tokens, *TAG.findall(source)}
        self.pattern = compile_any(texts)
        self.source_texts = frozenset(text for text in texts if text in source)
        self._longest = max(map(len, texts), default=0)
        self._first_letters = frozenset(text[0] for text in texts)

    def occur_in(self, text: str) -> bool:
        """Return whether a text contains a marker."""
        # Regular expressions with thousands of alternatives are slow.
        may_occur = any(letter in text for letter in self._first_letters)
        return may_occur and self.pattern.search(text) is not None

    def shared_prefix(self, *texts: str) -> int:
        """Return the length of the longest common prefix that cuts no marker of any of the texts."""
        size = common_prefix_length(texts)
        while True:
            start = min(self.marker_start(text, size) for text in texts)
            if start == size:
                return size
            size = start

    def marker_start(self, text: str, position: int) -> int:
        """Return the start of the marker that a position would cut in two, or else the position."""
        first = max(0, position - self._longest + 1)
        for match in self.pattern.finditer(text, first, position + self._longest):
            if match.start() < position < match.end():
                return match.start()
        return position

    def ends_open(self, text: str) -> bool:
        """Return whether the last marker of a text opens a block, as `<think>` does."""
        last = self._last(text)
        return last is not None and not CLOSING_TAG.fullmatch(last)

    def ends_closed(self, text: str) -> bool:
        """Return whether the last marker of a text closes a block, as `</think>` does."""
        last = self._last(text)
        return last is not None and CLOSING_TAG.fullmatch(last) is not None

    def _last(self, text: str) -> str | None:
        last = None
        for match in self.pattern.finditer(text):
            last = match.group()
        return last

    def token_matches(self, text: str, start: int = 0) -> Iterator[re.Match[str]]:
        """Yield the matches of added tokens in a text."""
        return (match for match in self.pattern.finditer(text, start) if match.group() in self.tokens)


def compile_any(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the texts, the longest one that is possible.

    The texts are arranged by their beginnings, since an alternation of the thousands of added tokens of some
    tokenizers would be tried one by one at each `<`.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}
    matches_nothing = "(?!)"
    return re.compile(_alternatives(tree) or matches_nothing)


def _alternatives(tree: dict[str, Any]) -> str:
    """Return the source of a pattern for the texts of a tree of letters, in which "" marks an end."""
    branches = []
    for letter, node in sorted(tree.items()):
        if letter:
            branches.append(re.escape(letter) + _alternatives(node))
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and "" not in tree else f"(?:{'|'.join(branches)})"
    return f"{pattern}?" if "" in tree else pattern


def common_prefix_length(texts: tuple[str, ...]) -> int:
    """Return the length of the longest common prefix of texts."""
    first, *others = texts
    low, high = 0, min(map(len, texts))
    while low < high:  # binary search over slices is much faster than a loop over characters
        middle = (low + high + 1) // 2
        if all(other.startswith(first[low:middle], low) for other in others):
            low = middle
        else:
            high = middle - 1
    return low
