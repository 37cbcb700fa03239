"""Messages with placeholders in place of their texts, to find out where a chat template renders them."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from dft.data.conversations.turns import REASONING_KEYS
from dft.data.templates.markers import Markers
from dft.data.templates.messages import Message, reasoning_field

CONTENT, REASONING, CALL = "content", "reasoning", "call"
"""Kinds of texts that a placeholder stands for."""
EDGES = re.compile(r"\A(\s*)(.*?)(\s*)\Z", re.DOTALL)
"""Splits a text into leading white space, text and trailing white space."""


@dataclass(frozen=True)
class Placeholder:
    """A placeholder in a message.

    Attributes:
        text: the placeholder.
        kind: `CONTENT`, `REASONING` or `CALL`.
        original: the text that it replaces.
        before: the tag that follows it in the content, for example `</think>`; "" if none does.
    """

    text: str
    kind: str
    original: str
    before: str = ""


@dataclass
class Probe:
    """A message whose texts are replaced by placeholders, each of which occurs once.

    Attributes:
        message: the message, not adapted to a template.
        placeholders: the placeholders, in the order of the message's keys.
    """

    message: Message
    placeholders: list[Placeholder] = field(default_factory=list)

    def positions(self, rendered: str) -> list[int]:
        """Return the position of each placeholder in a rendering, -1 where it is missing."""
        return [rendered.find(item.text) for item in self.placeholders]

    def first(self, rendered: str) -> int:
        """Return the position of the first placeholder in a rendering, -1 if there is none."""
        return min((at for at in self.positions(rendered) if at >= 0), default=-1)

    def end(self, rendered: str) -> int:
        """Return the end of the last placeholder in a rendering, -1 if there is none."""
        ends = [at + len(item.text) for item in self.placeholders if (at := rendered.rfind(item.text)) >= 0]
        return max(ends, default=-1)

    def same_end(self, rendered: str, longer: str) -> int:
        """Return the position in a longer rendering that corresponds to `end(rendered)`, -1 if there is none.

        A later message may repeat a placeholder, such as the name of the function that was called.
        """
        end = self.end(rendered)
        last = next(item.text for item in self.placeholders if rendered.endswith(item.text, 0, end))
        position = -1
        for _ in range(rendered.count(last)):
            position = longer.find(last, position + 1)
            if position < 0:
                return -1
        return position + len(last)


class ProbeMaker:
    """Makes messages with placeholders that keep the structure a chat template looks for.

    Args:
        structure: matches the tags in the content of a message that the template may treat specially, such
            as `<think>`. They are kept.
        markers: special tokens and tags. Argument names that contain any are replaced as well.
    """

    def __init__(self, structure: re.Pattern[str], markers: Markers) -> None:
        self.structure = structure
        self.markers = markers

    def shape(self, message: Message) -> str:
        """Return a text that is equal for messages with equal probes, which a template treats alike."""
        return json.dumps(self.probe(message).message, sort_keys=True)

    def probe(self, message: Message, number: int = 0) -> Probe:
        """Return a probe of a message.

        Args:
            message: the message, not adapted to a template.
            number: distinguishes the placeholders of this message from those of other messages.
        """
        probe = Probe(dict(message))
        replacer = _Replacer(probe, number, self.markers)
        if reasoning_field(message) is not None:
            for name in REASONING_KEYS:
                probe.message.pop(name, None)
            probe.message["reasoning_content"] = replacer.replace(reasoning_field(message) or "", REASONING)
        probe.message["content"] = self._replace_content(message["content"], replacer)
        if message.get("tool_calls"):
            probe.message["tool_calls"] = [replacer.replace_call(call) for call in message["tool_calls"]]
        if not probe.placeholders:  # the content is white space or tags only
            probe.message["content"] = replacer.add(CONTENT, "")
        return probe

    def _replace_content(self, content: str, replacer: "_Replacer") -> str:
        """Replace each text between two structural tags."""
        parts, position = [], 0
        for match in self.structure.finditer(content):
            parts += [replacer.replace(content[position : match.start()], CONTENT, match.group())]
            parts += [match.group()]
            position = match.end()
        return "".join([*parts, replacer.replace(content[position:], CONTENT)])


class _Replacer:
    """Numbers the placeholders of a message and adds them to its probe."""

    def __init__(self, probe: Probe, number: int, markers: Markers) -> None:
        self.probe = probe
        self.number = number
        self.markers = markers

    def replace(self, text: str, kind: str, before: str = "") -> str:
        """Return a placeholder with the white space around the text; blank texts are kept."""
        match = EDGES.match(text)
        assert match is not None, "the pattern matches any text"
        head, body, tail = match.groups()
        if not body:
            return text
        return f"{head}{self.add(kind, body, before)}{tail}"

    def add(self, kind: str, original: str, before: str = "") -> str:
        """Return a new placeholder for a text."""
        name = f"Zq7{self.number}x{len(self.probe.placeholders)}Placeholder7qZ"
        self.probe.placeholders.append(Placeholder(name, kind, original, before))
        return name

    def replace_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return a tool call with placeholders as its name and as the strings of its arguments."""
        function = call["function"]
        name = self.replace(function["name"], CALL)
        arguments = self._replace_strings(function["arguments"])
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _replace_strings(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.replace(value, CALL)
        if isinstance(value, dict):
            return {self._replace_name(key): self._replace_strings(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._replace_strings(inner) for inner in value]
        return value

    def _replace_name(self, name: str) -> str:
        return self.replace(name, CALL) if self.markers.occur_in(name) else name
