"""log.jsonl grows while a run goes on, and has the records of the trainer's log."""

import json

from transformers import TrainerControl, TrainerState, TrainingArguments

from dft import DFTTrainer
from dft.report.log_file import LOG, LogFileCallback, read_log
from tests.training.measuring.test_meter import END, Rows, with_end_token
from tests.training.test_trainer import tiny

NAN = float("nan")


def call(callback: LogFileCallback, event: str, state: TrainerState) -> None:
    getattr(callback, event)(TrainingArguments("out", use_cpu=True), state, TrainerControl())


def test_a_run_writes_each_record_when_it_is_logged(tmp_path):
    complete: list[bool] = []

    class Reader(LogFileCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            complete.append(read_log(self.file) == state.log_history)

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, logging_steps=1, max_steps=3, eval_strategy="steps", eval_steps=2,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = Rows(with_end_token(8))
    trainer = DFTTrainer(tiny(), arguments, train_dataset=rows, eval_dataset=rows, end_of_turn_ids=[END])
    trainer.add_callback(Reader(tmp_path))
    trainer.train()
    assert complete == [True] * 3
    assert read_log(tmp_path / LOG) == trainer.state.log_history


def test_a_resumed_run_continues_with_the_records_of_its_checkpoint(tmp_path):
    (tmp_path / LOG).write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    state = TrainerState(log_history=[{"step": 1}, {"step": 2, "loss": NAN}])
    callback = LogFileCallback(tmp_path)
    call(callback, "on_train_begin", state)
    state.log_history += [{"changes": "é"}, {"step": 3}]  # the first one was appended without an event
    call(callback, "on_log", state)
    records = read_log(tmp_path / LOG)
    assert [record.get("step") for record in records] == [1, 2, None, 3] and records[2] == {"changes": "é"}
    assert str(records[1]["loss"]) == "nan"


def test_other_ranks_write_nothing(tmp_path):
    state = TrainerState(log_history=[{"step": 1}], is_world_process_zero=False)
    call(LogFileCallback(tmp_path), "on_train_begin", state)
    assert not (tmp_path / LOG).exists()


def test_damaged_and_incomplete_lines_are_left_out(tmp_path):
    records = [json.dumps({"step": step}).encode() for step in (1, 2, 3)]
    lines = [
        records[0],
        b'{"step": ',
        b"7",
        b"\xff",
        b'{"step": null}',
        records[1],
        b"[" * 100_000,
        records[2],
    ]
    (tmp_path / LOG).write_bytes(b"\n".join(lines))
    assert read_log(tmp_path / LOG) == [{"step": 1}, {"step": 2}]  # the last line has no line break yet
    assert read_log(tmp_path / "none") == []


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / LOG).mkdir()
    callback, state = LogFileCallback(tmp_path), TrainerState(log_history=[{"step": 1}])
    for event in ("on_train_begin", "on_log", "on_log"):
        call(callback, event, state)
    assert capsys.readouterr().out.count("is not written any more, training continues") == 1
