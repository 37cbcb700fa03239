"""`report.json`: what a run was, what its evaluations said, and that writing it never costs the run."""

import json
import subprocess

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from dft import DFTTrainer
from dft.arguments.parser import parse_arguments
from dft.report.pages.run import PAGE
from dft.report.record import (
    REPORT,
    ReportCallback,
    git_commit,
    given_arguments,
    resolved_arguments,
    token_texts,
)
from dft.report.saved import PICTURE
from tests.arguments.test_parser import words
from tests.report.reports import run_report
from tests.training.measuring.test_meter import END, FILES, Rows, with_end_token
from tests.training.test_trainer import VOCAB, tiny


@pytest.fixture(scope="module")
def numbered() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of their tokens."""
    vocabulary = {f"t{number}": number for number in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def trained(folder, tokenizer, **flags) -> DFTTrainer:
    rows = with_end_token(8)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, logging_steps=1, eval_strategy="steps", eval_steps=2,
        max_steps=4, disable_tqdm=True, eval_on_start=True, **{"save_strategy": "no", **flags},
    )  # fmt: skip
    trainer = DFTTrainer(
        tiny(), arguments, train_dataset=Rows(rows), eval_dataset=Rows(rows), end_of_turn_ids=[END]
    )
    record = {name: run_report()[name] for name in RECORD}
    trainer.add_callback(ReportCallback(trainer, record, tokenizer))
    return trainer


def closed(trainer, status: str = "finished") -> None:
    """Ends the report as train_dft.py does."""
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, ReportCallback)]
    callback.close(status)


RECORD = ("name", "method", "alpha", "weight", "model", "arguments", "given", "environment", "data")


def test_a_run_leaves_its_report_and_its_page(tmp_path, numbered):
    trainer = trained(tmp_path, numbered)
    trainer.train()
    assert json.loads((tmp_path / REPORT).read_text())["status"] == "running"
    closed(trainer)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["status"] == "finished" and report["steps"] == {"done": 4, "total": 4}
    assert report["log"] == trainer.state.log_history
    assert [view["step"] for view in report["tokens"]] == [0, 4]
    first = report["tokens"][0]["conversations"][0]
    assert first["file"] == FILES[0] and first["line"] == 1
    ids = with_end_token(8)[0]["input_ids"]
    assert [text.strip() for text, _, _ in first["tokens"]] == [f"t{index}" for index in ids]
    assert [end for _, _, end in first["tokens"]] == [index == END for index in ids]
    labels = with_end_token(8)[0]["labels"]
    assert [p is not None for _, p, _ in first["tokens"]] == [False, *(one != -100 for one in labels[1:])]
    assert "finished" in (tmp_path / PAGE).read_text() and (tmp_path / PICTURE).stat().st_size > 10_000


def test_a_resumed_run_keeps_what_the_untouched_model_said(tmp_path, numbered, monkeypatch):
    monkeypatch.setattr("dft.report.pages.run.write_report_page", lambda report, folder: None)
    trained(tmp_path, numbered, save_strategy="steps", save_steps=2).train()
    before = json.loads((tmp_path / REPORT).read_text())["tokens"][0]
    again = trained(tmp_path, numbered)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = json.loads((tmp_path / REPORT).read_text())["tokens"]
    assert after[0] == before and before["step"] == 0 and after[1]["step"] == 4


def test_a_broken_report_is_no_obstacle_to_going_on(tmp_path, numbered, monkeypatch, capsys):
    monkeypatch.setattr("dft.report.pages.run.write_report_page", lambda report, folder: None)
    trained(tmp_path, numbered, save_strategy="steps", save_steps=2).train()
    (tmp_path / REPORT).write_text('{"status": "ru')
    trained(tmp_path, numbered).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the report begins anew at step 2" in capsys.readouterr().out
    assert [view["step"] for view in json.loads((tmp_path / REPORT).read_text())["tokens"]][-1] == 4


def test_a_report_that_cannot_be_written_is_said_and_costs_nothing(tmp_path, numbered, capsys):
    (tmp_path / REPORT).mkdir()
    trainer = trained(tmp_path, numbered)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "warning     no report of step 0: " in capsys.readouterr().out


def test_the_arguments_are_complete_and_hold_no_secret(tmp_path):
    (tmp_path / "token.yaml").write_text("hub_token: hf_secret")
    config = str(tmp_path / "token.yaml")
    arguments = parse_arguments(words(tmp_path, "--dft_alpha", "0.7", "--config", config))
    resolved, given = resolved_arguments(arguments), given_arguments(arguments)
    assert given["dft_alpha"] == 0.7 and "learning_rate" not in given
    assert resolved["learning_rate"] == 5e-5 and resolved["max_length"] == 2048 and resolved["report"] is True
    assert "hf_secret" not in json.dumps([resolved, given])


def test_the_commit_is_that_of_the_repository(tmp_path):
    def git(*more: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@e"]
        command = ["git", "-C", str(tmp_path), *identity, *more]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == commit + "+"


def test_tokens_as_text_add_up_to_the_text(tokenizer):
    """A letter of several tokens stands with the last of them."""
    text = "<|im_start|>user\nÜber 世界 🙂 two plus two<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "" in texts


def test_tokens_keep_the_space_that_a_sentencepiece_tokenizer_drops_at_the_beginning():
    pieces = ["<unk>", "▁one", "▁two", "three", "▁"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts(made, [1, 2, 3, 2]) == ["one", " two", "three", " two"]


def test_a_letter_that_is_never_whole_is_shown_as_it_is(tokenizer):
    first = tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    texts = token_texts(tokenizer, [first] * 12)
    assert len(texts) == 12 and any("\ufffd" in text for text in texts)
