"""The output of scripts/show_data.py for a few conversations."""

import json
import sys
from collections.abc import Callable

import pytest

from dft.errors import UserError
from scripts import show_data

Show = Callable[..., str]


@pytest.fixture
def show(tokenizer_folder, tmp_path, monkeypatch, capsys) -> Show:
    """Run the script in this process and in the folder of the test. Returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show_data, "report_user_errors", lambda: None)

    def run(*words: str) -> str:
        flags = {"model_name_or_path": tokenizer_folder, "data_files": tmp_path / "a.jsonl",
                 "data_cache_dir": tmp_path / "cache", "preprocessing_num_workers": 1}  # fmt: skip
        command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["show_data.py", *command, *words])
        show_data.main()
        return capsys.readouterr().out

    return run


def refusal(show: Show, *words: str) -> str:
    """Return the message of the error with which the script ends."""
    with pytest.raises(UserError) as raised:
        show(*words)
    return str(raised.value)


def test_conversations_and_the_data_report_are_printed(show, tmp_path):
    turns = [{"role": "user", "content": "q\tx"}, {"role": "assistant", "content": "one\ntwo"}]
    lines = [json.dumps({"messages": turns}), "{", json.dumps({"prompt": "r", "completion": "no"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert "a.jsonl:2: broken JSON" in refusal(show)
    output = tmp_path / "out"
    shown = show(
        "--on_bad_data", "skip", "--packing", "True", "--max_length", "64", "--output_dir", str(output)
    )
    printed = shown.splitlines()
    first = next(index for index, line in enumerate(printed) if line.startswith(f"{tmp_path}/a.jsonl:1, "))
    assert printed[first + 1 : first + 10] == [
        "prompt", "   | <|im_start|>user\\n", "   | q\\tx<|im_end|>\\n", "   | <|im_start|>assistant\\n",
        "completion 1", ">> | one\\n", ">> | two<|im_end|>",
        "after the last completion", "   | \\n",
    ]  # fmt: skip
    assert any(line.startswith(f"{tmp_path}/a.jsonl:3, ") for line in printed)
    report = json.loads((output / "data_report.json").read_text())
    tokens = report["train"]["tokens"]
    for expected in (
        f"train       2 conversations, 2 sequences, {tokens} tokens, ",
        f"            in 1 row of 64 tokens, {100 * tokens / 64:.1f} % full",
        f"rejected    1 line, copied to {output}/rejected.jsonl: 1 x broken JSON",
        "turns end   with <|im_end|> x 2",
        "turns       user 2, assistant 2",
        "lengths     of train sequences in tokens: ",
        f"longest     {report['train']['longest'][0]['tokens']} tokens  {tmp_path}/a.jsonl:1",
    ):
        assert any(line.startswith(expected) for line in printed), expected
    assert json.loads((output / "rejected.jsonl").read_text())["text"] == "{"


def test_output_folder_that_is_a_file_is_an_error_before_the_data_are_prepared(show, tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    for path in ("a.jsonl", "a.jsonl/below"):
        message = f"--output_dir {path}: is not a folder; remove it or name another"
        assert refusal(show, "--output_dir", path) == message
    assert not (tmp_path / "cache").exists()


def test_page_shows_sequences_beside_their_conversations_with_problems_first(show, tmp_path):
    lines = [
        json.dumps({"system": "s", "query": "q <b>\tx", "response": "one\n\ntwo", "id": 1}),
        json.dumps({"instruction": "r", "output": "word " * 40}),
        "{",
        json.dumps({"query": "r", "response": "plain"}),
        *[json.dumps({"query": "r", "response": f"{number} <|im_end|>"}) for number in range(3)],
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    page = tmp_path / "pages" / "data.html"
    shown = show("--on_bad_data", "skip", "--max_length", "48", "--html", str(page), "--count", "2")
    # The first two, and the two examples of the warning about special tokens.
    assert shown.startswith(f"wrote       {page}: 4 sequences\n")
    assert "check       answers contain special tokens as text: 3 (50.0 %)" in shown
    text = page.read_text()
    assert "4 sequences as a model is trained on them, 3 of them with something to check." in text
    assert "broken JSON: Expecting property name" in text
    first, *warned, second = text.split('<section class="conversation">')[1:]
    for line, section in zip((5, 6), warned, strict=True):
        assert f"a.jsonl:{line}</h3>" in section
        assert "answers contain special tokens as text" in section
    assert "a.jsonl:2</h3>" in first and "it ends within a supervised turn" in first
    assert "a.jsonl:1</h3>" in second and "something" not in second
    assert '<tr><th scope="row">user</th><td><div class="tokens">q &lt;b&gt;\tx</div></td></tr>' in second
    assert (
        '<b class="p6">one<i>↵</i></b><br><b class="p6"><i>↵</i></b><br><b class="p6">two</b>'
        '<b class="p6 end">&lt;|im_end|&gt;</b><span class="u"><i>↵</i></span>'
    ) in second
    assert "<script" not in text


def test_page_shows_the_conversation_of_each_element_of_an_array_on_one_line(show, tmp_path):
    words = ["apple", "", "pear", "plum"]
    rows = [{"query": f"about {word}", "response": word} for word in words]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    page = tmp_path / "data.html"
    show("--data_files", "a.json", "--on_bad_data", "skip", "--html", str(page))
    sections = page.read_text().split('<section class="conversation">')[1:]
    for word, section in zip(["apple", "pear", "plum"], sections, strict=True):
        assert f'<th scope="row">user</th><td><div class="tokens">about {word}</div>' in section


def test_no_data_file_is_replaced_or_removed(show, tmp_path):
    row = json.dumps({"query": "q", "response": "a"})
    for name in ("a.jsonl", "rejected.jsonl", "data_report.json"):
        (tmp_path / name).write_text(row)
    (tmp_path / "link").symlink_to(tmp_path)
    more = ("--data_files", "a.jsonl", "rejected.jsonl")
    for words, file in (
        (("--html", "a.jsonl"), "a.jsonl"),
        (("--html", "link/a.jsonl"), "link/a.jsonl"),
        ((*more, "--output_dir", "link"), "link/rejected.jsonl"),
        (("--eval_data_files", "data_report.json", "--output_dir", "."), "data_report.json"),
    ):
        assert refusal(show, *words) == (
            f"{words[-2]} {words[-1]}: {file} is a data file, which would be lost; name another"
        )
    for name in ("a.jsonl", "rejected.jsonl", "data_report.json"):
        assert (tmp_path / name).read_text() == row
