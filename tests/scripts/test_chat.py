"""scripts/chat.py: one question, questions from standard input, commands, saved conversations and errors."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from dft.data.conversations.conversation import parse_conversation
from dft.errors import UserError
from scripts import chat as script
from tests.launching import ROOT
from tests.scripts.test_merge_lora import adapt

SHORT = ("--max_new_tokens", "5", "--temperature", "0")


@pytest.fixture(scope="module")
def loaded_once(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["chat.py", str(tiny), *SHORT])
        return script.load_chat(script.parse_options())


@pytest.fixture
def loaded(loaded_once, monkeypatch):
    """Let the script use a model that is loaded already."""
    chat, notes = loaded_once

    def empty_chat(options):
        chat.clear()
        return chat, notes

    monkeypatch.setattr(script, "load_chat", empty_chat)


def run(monkeypatch, *words: object, lines: str = "") -> None:
    """Run the script as with standard input from a file."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    script.main()


def test_one_question_prints_only_the_answer_to_standard_output(monkeypatch, tiny, capsys):
    run(monkeypatch, tiny, *SHORT, "--question", "1 + 1?")
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and len(printed.out) > 1 and "[" not in printed.out
    assert f"{tiny}: float32 on cpu, 512 positions; answers end at <|im_end|>" in printed.err
    assert "[cut off at --max_new_tokens, after 5 tokens]" in printed.err


def test_p_is_printed_as_numbers_that_are_left_out_without_the_flag(loaded, monkeypatch, tiny, capsys):
    answers = []
    for flags in ((), ("--p",)):
        run(monkeypatch, tiny, *SHORT, *flags, "--question", "1 + 1?")
        answers.append(capsys.readouterr().out)
    assert re.sub(r"\[[01]\.\d\d( [01]\.\d\d)*\]", "", answers[1]) == answers[0] != answers[1]
    assert len(re.findall(r"[01]\.\d\d", answers[1])) == 5


def test_lines_of_standard_input_are_one_conversation_that_training_reads(
    loaded, monkeypatch, tiny, tmp_path, capsys
):
    file = tmp_path / "saved.jsonl"
    file.write_text('{"messages": []}')  # without a line break at its end
    lines = f"1 + 1?\n\n2?\n/save {file}\n/system Be short.\n 3?\n/save {file}\n/reset\n/p\n4?\n"
    run(monkeypatch, tiny, *SHORT, "--system", "Be kind.", lines=lines)
    printed = capsys.readouterr()
    first, second = [parse_conversation(line) for line in file.read_bytes().splitlines()[1:]]
    assert [turn["role"] for turn in first.messages] == ["system", *["user", "assistant"] * 2]
    assert [turn["content"] for turn in first.messages[::2]][0] == "Be kind."
    assert [turn["content"] for turn in second.messages[:2]] == ["Be short.", "3?"]
    answers = [turn["content"] for turn in [*first.messages[2::2], second.messages[2]]]
    assert printed.out.startswith("".join(f"{answer}\n" for answer in answers))
    remark = "answers in it that the model did not end"
    assert [line for line in printed.err.splitlines() if line.startswith("appended")] == [
        f"appended a conversation of {turns} turns to {file}; {remark}: {count}"
        for turns, count in ((4, 2), (2, 1))
    ]
    assert "a new conversation, with the same system prompt" in printed.err


def test_adapters_answer_with_their_model(monkeypatch, tiny, tmp_path, capsys):
    pytest.importorskip("peft")
    answers = []
    for folder in (tiny, adapt(tiny, tmp_path / "lora")):
        run(monkeypatch, folder, "--max_new_tokens", "8", "--temperature", "0", "--question", "1 + 1?")
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "/sav: no such command; there are /p, /reset, /system, /save, /help"),
        ("/save", "/save: name a file"),
        ("/save x", "/save: the conversation has no answer yet"),
        ("1?\n/save /nowhere/x", "/save /nowhere/x: cannot be written"),
        ("1?\n/save ~nobody-of-this-name/x", "/save ~nobody-of-this-name/x: cannot be written"),
        ("/system \udcff\n1?", "the system prompt has bytes that are not valid UTF-8"),
        (
            "1 + 1? " * 200,
            "the conversation has [0-9,]+ tokens with this question, and the model has 512 positions",
        ),
    ],
)
def test_the_first_error_ends_a_conversation_that_nobody_types(loaded, monkeypatch, tiny, line, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tiny, *SHORT, lines=line + "\n")


def test_errors_ctrl_c_and_ctrl_d_in_a_terminal(loaded, monkeypatch, tiny, capsys):
    """Errors and Ctrl-C leave the conversation open; Ctrl-D ends it."""
    typed = iter(["/nope", KeyboardInterrupt, "1 + 1?", "/help", EOFError])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["chat.py", str(tiny), *SHORT])
    monkeypatch.setattr(sys, "stdin", type("Typed", (io.StringIO,), {"isatty": lambda self: True})())
    script.main()
    printed = capsys.readouterr().out
    assert "error: /nope: no such command" in printed and "Ctrl-D ends the conversation" in printed
    assert printed.count("[cut off at --max_new_tokens, after 5 tokens]") == 1 and script.HELP in printed


SLOW_ANSWER = """
import sys, time
from scripts import chat

def show(piece, style):
    print("PIECE", flush=True)
    time.sleep(600)

chat._print_piece = show
sys.argv = ["chat.py", *sys.argv[1:]]
chat.main()
"""


def controlled_by_terminal() -> None:
    """Let the keys of the terminal on standard input send signals to this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may ignore it for the tests


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_answer_and_the_conversation_goes_on(tiny):
    """The first piece of the answer waits for the Ctrl-C, however slow the machine is."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_ANSWER, str(tiny), *SHORT], stdin=end, stdout=end, stderr=end, cwd=ROOT,
        start_new_session=True, preexec_fn=controlled_by_terminal,
    )  # fmt: skip
    os.close(end)
    try:
        for expected, typed in (
            ("\n> ", b"1 + 1?\n"), ("PIECE", b"\x03"), ("[stopped by Ctrl-C, after ", b""),
            ("> ", b"/nope\n"), ("error: /nope: no such command", b""), ("> ", b"\x04"),
        ):  # fmt: skip
            read_until(terminal, expected)
            os.write(terminal, typed)
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)


def read_until(terminal: int, expected: str) -> None:
    text = ""
    while expected not in text:
        assert select.select([terminal], [], [], 300)[0], f"no {expected!r} after {text!r}"
        text += os.read(terminal, 1).decode(errors="replace")


def without(tiny: Path, folder: Path, *names: str) -> Path:
    copy = Path(shutil.copytree(tiny, folder / "model"))
    for name in names:
        (copy / name).unlink()
    return copy


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["tokenizer.json", "tokenizer_config.json"],
            "{folder}: its tokenizer has no tokens; is tokenizer.json missing",
        ),
        (["chat_template.jinja"], "{folder}: its tokenizer has no chat template, .* or --chat_template FILE"),
        (["model.safetensors"], "{folder}: cannot be loaded: OSError: .*model.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_part_is_one_clear_error(monkeypatch, tiny, tmp_path, names, message):
    folder = without(tiny, tmp_path, *names)
    with pytest.raises(UserError, match="^" + message.format(folder=re.escape(str(folder)))):
        run(monkeypatch, folder, "--question", "1?")


def test_a_template_file_replaces_a_missing_one(monkeypatch, tiny, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    shutil.copy(tiny / "chat_template.jinja", template)
    folder = without(tiny, tmp_path, "chat_template.jinja")
    run(monkeypatch, folder, *SHORT, "--chat_template", template, "--question", "1?")
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "0.001"), "--temperature 0.001: must lie in"),
        (("--top_p", "0"), "--top_p 0: must be above 0"),
        (("--max_new_tokens", "0"), "--max_new_tokens 0: must be at least 1"),
        (("--seed", "-1"), "--seed -1: must lie in"),
        (("--device", "gpu"), "--device gpu: .*; try --device cpu"),
    ],
)
def test_settings_out_of_range_are_errors(monkeypatch, tiny, flags, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tiny, *flags, "--question", "1?")


def test_a_saved_conversation_that_training_would_refuse_is_not_written(loaded, monkeypatch, tiny, tmp_path):
    file = tmp_path / "saved.jsonl"
    monkeypatch.setattr(script.Chat, "_text", lambda self, ids: "")
    with pytest.raises(UserError, match="/save: train_dft.py would not read this conversation: "):
        run(monkeypatch, tiny, *SHORT, lines=f"1?\n/save {file}\n")
    assert not file.exists()


def test_saved_lines_are_valid_json_with_any_text(tmp_path):
    file = tmp_path / "a.jsonl"
    for text in ("é🙂", "a\nb"):
        script.append_line(file, json.dumps({"text": text}, ensure_ascii=False))
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["é🙂", "a\nb"]
