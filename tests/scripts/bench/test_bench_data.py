"""The measurement of one long conversation with the tokenizer of a folder."""

import json
import subprocess
import sys

import pytest

from tests.launching import ROOT


@pytest.mark.slow  # imports everything in several processes
def test_turns_of_a_conversation_are_measured_with_the_tokenizer_of_a_folder(
    tokenizer, tokenizer_folder, tmp_path
):
    system = {"role": "system", "content": "s"}
    turns = [
        {"role": role, "content": f"{role} {number}"} for number in range(2) for role in ("user", "assistant")
    ]
    rows = [{"messages": [system, *turns[:2]]}, {"messages": turns[2:]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable,
        str(ROOT / "scripts/bench/bench_data.py"),
        "--corpus",
        str(tmp_path / "a.jsonl"),
    ]
    command += ["--tokenizer", str(tokenizer_folder), "--turns", "2", "6", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    measured = [(row[0], row[3], row[4]) for row in table[2:]]
    tokens = [
        len(tokenizer.apply_chat_template(messages, return_dict=False))
        for messages in (turns[:2], [*turns, *turns[:2]])
    ]
    assert measured == [("| 2", "1", f"{tokens[0]} |"), ("| 6", "1", f"{tokens[1]} |")]
