"""The report callback: its content, resuming, and failures to write that do not end the training."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from dft import DFTTrainer
from dft.files import REPORT_PICTURE
from dft.report.pages.run import REPORT_PAGE
from dft.report.report_callback import ReportCallback, token_texts
from dft.report.saved_report import RUN_REPORT
from tests.report.reports import run_report
from tests.training.measuring.test_meter import END, FILES, Rows, with_end_token
from tests.training.test_trainer import VOCAB, tiny


@pytest.fixture(scope="module")
def numbered() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which token n reads `t<n>`."""
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


def close_report(trainer, status: str = "finished") -> None:
    """Close the report as train_dft.py does."""
    (callback,) = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ReportCallback)
    ]
    callback.close(status)


RECORD = ("name", "method", "alpha", "weight", "model", "arguments", "given", "environment", "data")


def test_a_run_writes_its_report_and_its_page(tmp_path, numbered):
    trainer = trained(tmp_path, numbered)
    trainer.train()
    assert json.loads((tmp_path / RUN_REPORT).read_text())["status"] == "running"
    close_report(trainer)
    report = json.loads((tmp_path / RUN_REPORT).read_text())
    assert report["status"] == "finished" and report["steps"] == {"done": 4, "total": 4}
    assert report["log"] == trainer.state.log_history
    assert [view["step"] for view in report["tokens"]] == [0, 4]
    first = report["tokens"][0]["conversations"][0]
    assert first["file"] == FILES[0] and first["line"] == 1
    ids = with_end_token(8)[0]["input_ids"]
    assert [text.strip() for text, _, _ in first["tokens"]] == [f"t{index}" for index in ids]
    assert [end for _, _, end in first["tokens"]] == [index == END for index in ids]
    labels = with_end_token(8)[0]["labels"]
    assert [p is not None for _, p, _ in first["tokens"]] == [False, *(label != -100 for label in labels[1:])]
    assert (
        "finished" in (tmp_path / REPORT_PAGE).read_text()
        and (tmp_path / REPORT_PICTURE).stat().st_size > 10_000
    )


def test_a_resumed_run_keeps_the_conversations_of_the_first_evaluation(tmp_path, numbered, monkeypatch):
    monkeypatch.setattr("dft.report.pages.run.write_report_page", lambda report, folder: None)
    trained(tmp_path, numbered, save_strategy="steps", save_steps=2).train()
    before = json.loads((tmp_path / RUN_REPORT).read_text())["tokens"][0]
    again = trained(tmp_path, numbered)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = json.loads((tmp_path / RUN_REPORT).read_text())["tokens"]
    assert after[0] == before and before["step"] == 0 and after[1]["step"] == 4


def test_a_broken_report_does_not_prevent_resuming(tmp_path, numbered, monkeypatch, capsys):
    monkeypatch.setattr("dft.report.pages.run.write_report_page", lambda report, folder: None)
    trained(tmp_path, numbered, save_strategy="steps", save_steps=2).train()
    (tmp_path / RUN_REPORT).write_text('{"status": "ru')
    trained(tmp_path, numbered).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the report starts over at step 2" in capsys.readouterr().out
    assert [view["step"] for view in json.loads((tmp_path / RUN_REPORT).read_text())["tokens"]][-1] == 4


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, numbered, capsys):
    (tmp_path / RUN_REPORT).mkdir()
    trainer = trained(tmp_path, numbered)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "warning     the report of step 0 was not written: " in capsys.readouterr().out


def test_token_texts_concatenate_to_the_text(tokenizer):
    """The last of several tokens that form one character has it."""
    text = "<|im_start|>user\nÜber 世界 🙂 two plus two<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and "" in texts


def test_token_texts_keep_the_space_that_sentencepiece_drops_from_a_first_token():
    pieces = ["<unk>", "▁one", "▁two", "three", "▁"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts(tokenizer, [1, 2, 3, 2]) == ["one", " two", "three", " two"]


def test_a_character_that_never_completes_is_shown_as_it_decodes(tokenizer):
    first = tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    texts = token_texts(tokenizer, [first] * 12)
    assert len(texts) == 12 and any("\ufffd" in text for text in texts)
