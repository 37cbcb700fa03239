"""Files and lines -> validated conversations. Every refusal names file, line and reason."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dft.data.faults import BadLine
from dft.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".json")
BLANK = re.compile(r"[ \t\r\n]*")
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
BROKEN = "broken JSON"


@dataclass(frozen=True)
class Record:
    """One conversation as it stands in a file, not parsed yet. `line` counts from 1.

    `fault` is set, and `text` empty, where the file itself cannot be read any further.
    """

    file: str
    line: int
    text: bytes
    fault: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


# ---- files -> records ----


def check_files(files: list[str], flag: str) -> None:
    """Raises `UserError` for a file that is missing, no file, unreadable, empty, or of an unknown suffix."""
    for name in files:
        path = Path(name)
        try:
            if path.is_dir():
                raise UserError(f"{flag} {name}: is a folder; name the .jsonl or .json files in it")
            size = path.stat().st_size
            if not path.is_file():
                raise UserError(f"{flag} {name}: is not a regular file; name a .jsonl or .json file")
            path.open("rb").close()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{flag} {name}: no such file (looked in {path.absolute().parent})") from None
        except OSError as error:
            raise UserError(f"{flag} {name}: cannot be read ({error.strerror})") from None
        if path.suffix not in SUFFIXES:
            raise UserError(f"{flag} {name}: expected a file that ends in {' or '.join(SUFFIXES)}")
        if size == 0:
            raise UserError(f"{flag} {name}: the file is empty; it should hold one conversation per line")


def read_records(file: str) -> Iterator[Record]:
    """The conversations of one file in order, still as text; a file without any gives a record that says so.

    A file is an array of objects if its first character is "[", else JSON Lines, blank lines passed over. A
    `.json` file may also hold one object over several lines.
    """
    none = True
    for record in _records(file):
        none = False
        yield record
    if none:
        yield Record(file, 1, b"", fault="there is no conversation in this file")


def _records(file: str) -> Iterator[Record]:
    with open(file, "rb") as stream:
        opening = _first_line(stream)
        stream.seek(0)
        if opening.startswith(b"["):
            yield from _array_records(file, stream.read())
        elif Path(file).suffix == ".json" and not _is_json(opening):
            yield Record(file, 1, stream.read().removeprefix(b"\xef\xbb\xbf"))
        else:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():  # without the line end, a line that was cut off is told as what it is
                    yield Record(file, number, line.rstrip(b"\r\n"))


def _first_line(lines: Iterable[bytes]) -> bytes:
    """The first line that is not blank."""
    return next((text for line in lines if (text := line.removeprefix(b"\xef\xbb\xbf").strip())), b"")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return not text  # nothing but blank lines, which the reader of lines passes over
    return True


def _array_records(file: str, raw: bytes) -> Iterator[Record]:
    """The elements of a JSON array, found by their extent alone; what is in them is parsed later."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield Record(file, line, b"", fault=f"not valid UTF-8 ({error.reason}); the array cannot be read")
        return

    def broken(at: int, why: str) -> Record:
        reason = f"{BROKEN} array: {why}; nothing from here on can be read"
        return Record(file, text.count("\n", 0, at) + 1, b"", fault=reason)

    # Numbers stay text: their value does not matter here, and one of 5,000 digits would raise.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    line, counted = 1, 0
    position = BLANK.match(text, text.index("[") + 1).end()
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield broken(error.pos, error.msg)
            return
        except RecursionError:
            yield broken(position, "nested too deeply")
            return
        yield Record(file, line, text[position:end].encode())
        position = BLANK.match(text, end).end()
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            yield broken(position, "expected ',' or ']' after an element")
            return
        if not closed:
            position = BLANK.match(text, position + 1).end()
    after = BLANK.match(text, position + 1).end()
    if after < len(text):
        yield broken(after, "text after the closing ']'")


# ---- records -> messages ----


def _refuse_constant(name: str) -> NoReturn:
    raise BadLine(f"{BROKEN}: {name} is not a JSON value", BROKEN)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadLine(f"{BROKEN}: the key {_short(repeated)} appears twice in one object", BROKEN)
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)


def parse_messages(record: Record) -> list[dict[str, Any]]:
    """The validated messages of one record.

    Raises:
        BadLine: broken JSON, wrong type, no messages, unknown role, empty turn, or no assistant turn.
    """
    if record.fault is not None:
        raise BadLine(record.fault, record.fault.split(" (")[0].split(":")[0])
    row = _parse_json(record.text)
    if not isinstance(row, dict):
        raise BadLine(f"expected a JSON object with 'messages', got {_kind(row)}", "not a JSON object")
    if "messages" not in row:
        keys = f"the keys are {_short(sorted(row))}" if row else "the object is empty"
        raise BadLine(f"no 'messages' key; {keys}", "no 'messages' key")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadLine(
            f"'messages' must be a list of at least one turn, got {_kind(messages)}",
            "'messages' is no list of turns",
        )
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no assistant turn, so there is nothing to learn from", "no assistant turn")
    # Only an escape can smuggle half a surrogate pair into text that was valid UTF-8.
    if SURROGATE_ESCAPE.search(record.text):
        _check_surrogates(messages)
    return messages


def _parse_json(raw: bytes) -> Any:
    try:
        return DECODER.decode(raw.decode())
    except BadLine:
        raise
    except UnicodeDecodeError as error:
        raise BadLine(f"not valid UTF-8 ({error.reason} at byte {error.start})", "not valid UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadLine(f"{BROKEN}: {error.msg} ({line}column {error.colno})", BROKEN) from None
    except RecursionError:
        raise BadLine(f"{BROKEN}: nested too deeply", BROKEN) from None
    except ValueError:  # an integer beyond sys.get_int_max_str_digits()
        raise BadLine(f"{BROKEN}: a number of thousands of digits", BROKEN) from None


def _check_message(where: str, message: Any) -> None:
    """Checks one turn; the content of a turn that only calls tools becomes "" where it is null or missing."""
    if not isinstance(message, dict):
        raise BadLine(
            f"{where} must be an object with 'role' and 'content', got {_kind(message)}",
            "a turn that is no object",
        )
    if "role" not in message:
        raise BadLine(f"{where}: no 'role'; the keys are {_short(sorted(message))}", "no 'role'")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise BadLine(
            f"{where}: unknown role {_short(role)}; the roles are {', '.join(ROLES)}", "unknown role"
        )
    calls = message.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadLine(
            f"{where}: 'tool_calls' must be a list of objects, got {_kind(calls)}", "'tool_calls' is no list"
        )
    calls_tools = role == "assistant" and bool(calls)
    content = message.get("content")
    if content is None and calls_tools:
        message["content"] = ""  # templates index it, and null would be rendered as the word "None"
        return
    if not isinstance(content, str):
        got = _kind(content) if "content" in message else "nothing"
        raise BadLine(f"{where}: 'content' must be a string, got {got}", "'content' is no string")
    if not content.strip() and role != "tool" and not calls_tools:
        raise BadLine(f"{where}: empty {role} turn", "empty turn")


def _check_surrogates(messages: list[dict[str, Any]]) -> None:
    for index, message in enumerate(messages):
        try:
            json.dumps(message, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadLine(
                f"messages[{index}]: holds half a surrogate pair (\\ud800 to \\udfff), which is no character",
                "half a surrogate pair",
            ) from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
