"""Strict JSON parsing of rows and of strings inside them."""

import codecs
import json
from typing import Any, NoReturn

from dft.data.conversations.faults import BadLine
from dft.strict_json import RepeatedKey, refuse_repeated_keys

BROKEN = "broken JSON"
UTF16_HINT = "; it looks like UTF-16, which iconv -f UTF-16 -t UTF-8 converts"


def _refuse_constant(name: str) -> NoReturn:
    raise BadLine(f"{BROKEN}: {name} is not a JSON value", BROKEN)


DECODER = json.JSONDecoder(object_pairs_hook=refuse_repeated_keys, parse_constant=_refuse_constant)


def parse_json(raw: bytes) -> Any:
    """Parse the JSON text of a row.

    Raises:
        BadLine: the text is not UTF-8 or not strict JSON.
    """
    try:
        return _decode(raw.decode())
    except UnicodeDecodeError as error:
        hint = UTF16_HINT if _looks_like_utf16(raw) else ""
        reason = f"not valid UTF-8 ({error.reason} at byte {error.start}){hint}"
        raise BadLine(reason, "not valid UTF-8") from None
    except BadLine as error:
        if _looks_like_utf16(raw):
            raise BadLine(f"{error}{UTF16_HINT}", error.kind) from None
        if raw.startswith(codecs.BOM_UTF8):
            raise BadLine(
                f"{BROKEN}: the line begins with a byte order mark, as if files had been joined; remove it",
                BROKEN,
            ) from None
        raise


def _looks_like_utf16(raw: bytes) -> bool:
    """Return whether a text has as many NUL bytes as JSON, which is mostly ASCII, has in UTF-16."""
    return 4 * raw.count(0) >= len(raw) > 0


def parse_json_string(where: str, text: str) -> Any:
    """Parse JSON that a row holds as a string; `where` names the string in errors.

    Raises:
        BadLine: the text is not strict JSON.
    """
    try:
        return _decode(text)
    except BadLine as error:
        raise BadLine(f"{where}: {error}", f"{BROKEN} within a string") from None


def parse_list(where: str, value: Any) -> Any:
    """Return a value, parsed if it is a list written as JSON text, as in a table whose cells are strings.

    Raises:
        BadLine: a text that begins like a list is not strict JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json_string(where, value)
    return value


def _decode(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except BadLine:
        raise
    except RepeatedKey as error:
        raise BadLine(f"{BROKEN}: {error}", BROKEN) from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadLine(f"{BROKEN}: {error.msg} ({line}column {error.colno})", BROKEN) from None
    except RecursionError:
        raise BadLine(f"{BROKEN}: nested too deeply", BROKEN) from None
    except ValueError:  # an integer with more than sys.get_int_max_str_digits() digits
        raise BadLine(f"{BROKEN}: a number of thousands of digits", BROKEN) from None
