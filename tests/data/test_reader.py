"""Good lines become conversations, every other line one `file:line: reason`."""

import json
from pathlib import Path

import pytest

from dft.data.faults import BadLine, Fault, Faults
from dft.data.reader import check_files, parse_messages, read_records
from dft.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LINE = json.dumps({"messages": TURNS})


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def outcomes(file: str) -> list[str]:
    """`line: ok` or `line: reason` of every record."""
    told = []
    for record in read_records(file):
        assert record.where == f"{file}:{record.line}"
        try:
            parse_messages(record)
        except BadLine as error:
            told.append(f"{record.line}: {error}")
        else:
            told.append(f"{record.line}: ok")
    return told


def turn(**fields: object) -> str:
    """A line whose second turn is overridden by `fields`."""
    return json.dumps({"messages": [TURNS[0], {**TURNS[1], **fields}]})


ROLES = "the roles are system, developer, user, assistant, tool"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "broken JSON: Expecting value (column 15)"),
        ('{"messages": "abc', "broken JSON: Unterminated string starting at (column 14)"),
        (LINE + "x", f"broken JSON: Extra data (column {len(LINE) + 1})"),
        (LINE + "\0", f"broken JSON: Extra data (column {len(LINE) + 1})"),
        ('{"a": "x\ty"}', "broken JSON: Invalid control character at (column 9)"),
        ('{"score": NaN}', "broken JSON: NaN is not a JSON value"),
        ('{"score": -Infinity}', "broken JSON: -Infinity is not a JSON value"),
        ('{"a": 1, "a": 2}', "broken JSON: the key 'a' appears twice in one object"),
        ('{"n": ' + "9" * 5000 + "}", "broken JSON: a number of thousands of digits"),
        ("[" * 100_000, "broken JSON array: nested too deeply; nothing from here on can be read"),
        ('{"a":' * 100_000, "broken JSON: nested too deeply"),
        ('"text"', "expected a JSON object with 'messages', got a string"),
        ("3", "expected a JSON object with 'messages', got a number"),
        ("null", "expected a JSON object with 'messages', got null"),
        ("{}", "no 'messages' key; the object is empty"),
        ('{"text": "", "id": 1}', "no 'messages' key; the keys are ['id', 'text']"),
        ('{"messages": []}', "'messages' must be a list of at least one turn, got an empty list"),
        ('{"messages": {}}', "'messages' must be a list of at least one turn, got an object"),
        ('{"messages": "hi"}', "'messages' must be a list of at least one turn, got a string"),
        ('{"messages": ["hi"]}', "messages[0] must be an object with 'role' and 'content', got a string"),
        ('{"messages": [{"content": "x"}]}', "messages[0]: no 'role'; the keys are ['content']"),
        (turn(role="bot"), f"messages[1]: unknown role 'bot'; {ROLES}"),
        (turn(role="Assistant"), f"messages[1]: unknown role 'Assistant'; {ROLES}"),
        (turn(role=None), f"messages[1]: unknown role None; {ROLES}"),
        (turn(role=["user"]), f"messages[1]: unknown role ['user']; {ROLES}"),
        (turn(role="r" * 500), f"messages[1]: unknown role 'rrr{'r' * 73}...; {ROLES}"),
        (turn(content=None), "messages[1]: 'content' must be a string, got null"),
        (turn(content=5.5), "messages[1]: 'content' must be a string, got a number"),
        (turn(content=True), "messages[1]: 'content' must be a string, got a boolean"),
        (turn(content=["x"]), "messages[1]: 'content' must be a string, got a list"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: 'content' must be a string, got nothing"),
        (turn(content=" \n\t"), "messages[1]: empty assistant turn"),
        (turn(role="system", content=""), "messages[1]: empty system turn"),
        (turn(tool_calls="f()"), "messages[1]: 'tool_calls' must be a list of objects, got a string"),
        (turn(tool_calls=["f()"]), "messages[1]: 'tool_calls' must be a list of objects, got a list"),
        (turn(role="user"), "no assistant turn, so there is nothing to learn from"),
        (
            turn(content="\ud83d"),
            "messages[1]: holds half a surrogate pair (\\ud800 to \\udfff), which is no character",
        ),
        (
            turn(note={"k": "\udc00"}),
            "messages[1]: holds half a surrogate pair (\\ud800 to \\udfff), which is no character",
        ),
    ],
)
def test_each_kind_of_bad_line_is_told_with_its_reason(tmp_path, line, reason):
    name = "bad.json" if line.startswith("[") else "bad.jsonl"
    prefix = "" if line.startswith("[") else LINE + "\n\n"
    number = 1 if line.startswith("[") else 3
    told = outcomes(write(tmp_path, name, prefix + line + "\n"))
    assert told[-1] == f"{number}: {reason}"
    assert told[:-1] == ["1: ok"] * (number // 3)


def test_bytes_that_are_not_utf8_are_told(tmp_path):
    file = write(tmp_path, "a.jsonl", LINE.encode() + b'\n{"m": "\xff"}\n' + LINE.encode())
    assert outcomes(file) == ["1: ok", "2: not valid UTF-8 (invalid start byte at byte 7)", "3: ok"]
    assert outcomes(write(tmp_path, "b.jsonl", LINE.encode("utf-16"))) == [
        "1: not valid UTF-8 (invalid start byte at byte 0)"
    ]
    raw = json.dumps({"messages": TURNS}).encode().replace(b'"q"', b'"\xed\xa0\x80"')
    assert outcomes(write(tmp_path, "c.jsonl", raw)) == [
        f"1: not valid UTF-8 (invalid continuation byte at byte {raw.index(0xED)})"
    ]


def test_line_ends_bom_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    content = b"\xef\xbb\xbf" + LINE.encode() + b"\r\n\r\n  \n" + LINE.encode() + b"\n\n" + LINE.encode()
    assert outcomes(write(tmp_path, "a.jsonl", content)) == ["1: ok", "4: ok", "6: ok"]


def test_a_pair_of_surrogate_escapes_is_a_character(tmp_path):
    file = write(tmp_path, "a.jsonl", turn(content="😀"))
    assert b"\\ud83d" in Path(file).read_bytes()
    (record,) = read_records(file)
    assert parse_messages(record)[1]["content"] == "😀"


def test_a_turn_that_only_calls_tools_needs_no_content(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {}}}]
    for fields in ({"content": None}, {"content": ""}):
        (record,) = read_records(write(tmp_path, "a.jsonl", turn(tool_calls=calls, **fields)))
        assert parse_messages(record)[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    empty_result = json.dumps({"messages": [*TURNS, {"role": "tool", "content": ""}]})
    assert outcomes(write(tmp_path, "b.jsonl", empty_result)) == ["1: ok"]


def test_arrays_give_the_line_on_which_each_element_begins(tmp_path):
    pretty = json.dumps({"messages": TURNS, "n": 10**18}, indent=1)
    array = f"\ufeff[\n{pretty},\n\n{LINE}, {LINE},\n{{}}\n]\n"
    height = pretty.count("\n") + 1
    expected = ["2: ok", f"{height + 3}: ok", f"{height + 3}: ok"]
    expected.append(f"{height + 4}: no 'messages' key; the object is empty")
    assert outcomes(write(tmp_path, "a.json", array)) == expected
    assert outcomes(write(tmp_path, "a.jsonl", array)) == expected


@pytest.mark.parametrize(
    ("array", "line", "reason"),
    [
        (f"[{LINE},\n{LINE}", 2, "expected ',' or ']' after an element"),
        (f"[{LINE}\n\n{LINE}]", 3, "expected ',' or ']' after an element"),
        (f"[{LINE},\n]", 2, "Expecting value"),
        (f"[{LINE},\n{{'a': 1}}]", 2, "Expecting property name enclosed in double quotes"),
        (f"[{LINE}]\n\n[]", 3, "text after the closing ']'"),
    ],
)
def test_a_broken_array_is_told_at_the_line_where_it_breaks(tmp_path, array, line, reason):
    told = outcomes(write(tmp_path, "a.json", array))
    assert told[0] == "1: ok"
    assert told[-1] == f"{line}: broken JSON array: {reason}; nothing from here on can be read"


def test_an_array_that_is_not_utf8_is_told_at_its_line(tmp_path):
    file = write(tmp_path, "a.json", b"[\n" + LINE.encode() + b',\n"\xff"]')
    assert outcomes(file) == ["3: not valid UTF-8 (invalid start byte); the array cannot be read"]


def test_elements_of_an_array_may_hold_what_only_its_own_line_is_blamed_for(tmp_path):
    huge = '{"n": ' + "9" * 5000 + "}"
    file = write(tmp_path, "a.json", f'[{LINE},\n{huge},\n{{"n": NaN}},\n{LINE}]')
    assert outcomes(file) == [
        "1: ok",
        "2: broken JSON: a number of thousands of digits",
        "3: broken JSON: NaN is not a JSON value",
        "4: ok",
    ]


def test_a_json_file_may_hold_lines_or_one_object(tmp_path):
    assert outcomes(write(tmp_path, "lines.json", f"{LINE}\n{{}}\n{LINE}")) == [
        "1: ok", "2: no 'messages' key; the object is empty", "3: ok",
    ]  # fmt: skip
    pretty = json.dumps({"messages": TURNS}, indent=2)
    assert outcomes(write(tmp_path, "one.json", pretty)) == ["1: ok"]
    assert outcomes(write(tmp_path, "cut.json", pretty[:-3])) == [
        f"1: broken JSON: Expecting ',' delimiter (line {pretty[:-3].count(chr(10)) + 1}, column 3)"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n \r\n\t\n"), ("a.json", "[]"), ("a.json", " [ \n] "), ("a.json", "\n\n")],
)
def test_a_file_without_conversations_is_told(tmp_path, name, content):
    assert outcomes(write(tmp_path, name, content)) == ["1: there is no conversation in this file"]


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path):
    good = write(tmp_path, "good.jsonl", LINE)
    check_files([good], "--data_files")
    (tmp_path / "folder.jsonl").mkdir()
    long_name = str(tmp_path / ("x" * 300 + ".jsonl"))
    cases = {
        str(tmp_path / "none.jsonl"): f"no such file (looked in {tmp_path})",
        f"{good}/x.jsonl": f"no such file (looked in {good})",
        str(tmp_path / "*.jsonl"): f"no such file (looked in {tmp_path})",
        str(tmp_path / "folder.jsonl"): "is a folder; name the .jsonl or .json files in it",
        write(tmp_path, "empty.jsonl", ""): "the file is empty; it should hold one conversation per line",
        write(tmp_path, "data.csv", LINE): "expected a file that ends in .jsonl or .json",
        long_name: "cannot be read (File name too long)",
        "/dev/null": "is not a regular file; name a .jsonl or .json file",
    }
    for name, reason in cases.items():
        with pytest.raises(UserError) as caught:
            check_files([good, name], "--eval_data_files")
        assert str(caught.value) == f"--eval_data_files {name}: {reason}"


def test_twenty_faults_are_listed_and_all_are_counted_by_kind():
    faults = Faults()
    faults.raise_if_any()
    empty = "messages[1]: empty user turn"
    faults.add(Fault(f"a:{line}", "empty turn", empty) for line in range(1, 19))
    faults.add(Fault(f"b:{line}", "broken JSON", "broken JSON: x") for line in range(1, 6))
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    lines = str(caught.value).splitlines()
    assert lines[0] == "23 conversations cannot be used:"
    assert lines[1] == "  a:1: messages[1]: empty user turn"
    assert lines[20] == "  b:2: broken JSON: x"
    assert lines[21:] == ["  ... and 3 more. All of them:", "  18 x empty turn", "  5 x broken JSON"]


def test_few_faults_are_listed_without_a_count():
    faults = Faults()
    faults.add([Fault("a:7", "empty turn", "messages[0]: empty user turn")])
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    assert str(caught.value) == "1 conversation cannot be used:\n  a:7: messages[0]: empty user turn"
