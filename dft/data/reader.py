"""Files and lines -> validated conversations. Every refusal names file, line and reason."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".json")


class BadLine(ValueError):
    """One conversation that cannot be used; the message is the reason alone."""


@dataclass(frozen=True)
class Record:
    """One conversation as it stands in a file, not parsed yet. `line` counts from 1."""

    file: str
    line: int
    text: bytes

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


def check_files(files: list[str], flag: str) -> None:
    """Raises `UserError` for a file that is missing, no file, unreadable, empty, or of an unknown suffix."""
    for name in files:
        path = Path(name)
        if not path.exists():
            raise UserError(f"{flag} {name}: no such file (looked in {path.absolute().parent})")
        if not path.is_file():
            raise UserError(f"{flag} {name}: is not a file; name the .jsonl or .json files themselves")
        if path.suffix not in SUFFIXES:
            raise UserError(f"{flag} {name}: expected a file that ends in {' or '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise UserError(f"{flag} {name}: the file is empty")
        try:
            path.open("rb").close()
        except PermissionError as error:
            raise UserError(f"{flag} {name}: cannot be read ({error.strerror})") from None


def read_records(file: str) -> Iterator[Record]:
    """The conversations of one file in order, still as text.

    `.jsonl` holds one JSON object per line, blank lines are passed over. `.json` holds an array of objects (or
    JSON Lines under the wrong name, told apart by the first character).

    Raises:
        UserError: a `.json` array whose own brackets and commas are broken (its objects are checked later).
    """
    with open(file, "rb") as stream:
        first = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        stream.seek(0)
        if Path(file).suffix == ".json" and first == b"[":
            yield from _array_records(file, stream.read())
            return
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Record(file, number, line)


def _array_records(file: str, raw: bytes) -> Iterator[Record]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not valid UTF-8 ({error.reason})") from None
    decoder, blank = json.JSONDecoder(), " \t\r\n"
    line, counted = 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in blank:
            position += 1
        return position

    position = skip(text.index("[") + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: broken JSON array: {error.msg}") from None
        yield Record(file, line, text[position:end].encode())
        position = skip(end)
        if text.startswith(",", position):
            position = skip(position + 1)
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            raise UserError(f"{file}:{line}: broken JSON array: expected ',' or ']' after an object")


def parse_messages(record: Record) -> list[dict[str, Any]]:
    """The validated messages of one record.

    Raises:
        BadLine: broken JSON, wrong type, no messages, unknown role, empty turn, or no assistant turn.
    """
    try:
        row = json.loads(record.text)
    except UnicodeDecodeError as error:
        raise BadLine(f"not valid UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise BadLine("broken JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise BadLine(f"expected a JSON object with 'messages', got {_kind(row)}")
    if "messages" not in row:
        raise BadLine(f"no 'messages' key; the keys are {sorted(row)}")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"'messages' must be a list of at least one turn, got {_kind(messages)}")
    for index, message in enumerate(messages):
        _check_message(index, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no assistant turn, so there is nothing to learn from")
    return messages


def _check_message(index: int, message: Any) -> None:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise BadLine(f"{where} must be an object with 'role' and 'content', got {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise BadLine(f"{where}: unknown role {role!r}; the roles are {', '.join(ROLES)}")
    content = message.get("content")
    calls_tools = role == "assistant" and bool(message.get("tool_calls"))
    if content is None and calls_tools:
        message["content"] = ""  # templates index it, and null would be rendered as the word "None"
        return
    if not isinstance(content, str):
        raise BadLine(f"{where}: 'content' must be a string, got {_kind(content)}")
    if not content.strip() and role != "tool" and not calls_tools:
        raise BadLine(f"{where}: empty {role} turn")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise BadLine(f"{where}: 'content' holds half a surrogate pair, which is no character") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
