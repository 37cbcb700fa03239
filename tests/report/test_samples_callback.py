"""The callback that generates samples: what it leaves in a run, and failures that do not end the training."""

import random
import time

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from dft import DFTTrainer
from dft.data.preparing.prompts import PromptSelection, ReferencePrompt
from dft.errors import UserError
from dft.report.samples_callback import SamplesCallback
from dft.report.samples_file import SAMPLES, read_samples
from dft.report.samples_setup import longest_prompt, selection_note
from dft.training.measuring.samples import AnswerGenerator, GeneratedAnswer, GeneratedAnswers
from dft.training.parallel.stopping import StopRequest
from dft.training.run_options import RunOptions
from tests.report.test_report_callback import numbered  # noqa: F401 - a fixture
from tests.training.measuring.test_meter import END, Rows, with_end_token
from tests.training.test_trainer import tiny

PROMPTS = [
    ReferencePrompt("a.jsonl", 3, "t5", "t1 t5", [1, 5], "t6"),
    ReferencePrompt("a.jsonl", 7, "t2", "t2", [2], ""),
]


def make_trainer(folder, **flags) -> DFTTrainer:
    rows = with_end_token(8)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, logging_steps=1, eval_strategy="steps", eval_steps=2,
        max_steps=4, disable_tqdm=True, save_strategy="no", learning_rate=1e-2, seed=5, **flags,
    )  # fmt: skip
    model = tiny()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    options = RunOptions(stop=StopRequest())
    return DFTTrainer(
        model,
        arguments,
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows),
        end_of_turn_ids=[END],
        options=options,
    )


@pytest.fixture
def train(tmp_path, numbered):  # noqa: F811
    """Function that trains with samples; `generate` replaces the generator's own method."""

    def run(generate=None, folder=tmp_path) -> DFTTrainer:
        trainer = make_trainer(folder)
        generator = AnswerGenerator([prompt.ids for prompt in PROMPTS], [END], 6, 1, trainer.accelerator)
        if generate is not None:
            generator.generate = generate
        trainer.add_callback(SamplesCallback(trainer, PROMPTS, generator, numbered, 6))
        trainer.train()
        assert trainer.state.global_step == 4
        return trainer

    return run


def weights(trainer) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.model.parameters()]


def test_rows_describe_the_prompt_and_the_answer(train, tmp_path, capsys):
    trainer = train()
    rows, _ = read_samples(tmp_path / SAMPLES)
    assert [(row["step"], row["sample"], row["line"]) for row in rows] == [
        (2, 1, 3),
        (2, 2, 7),
        (4, 1, 3),
        (4, 2, 7),
    ]
    assert [rows[0][name] for name in ("file", "question", "prompt", "reference")] == [
        "a.jsonl",
        "t5",
        "t1 t5",
        "t6",
    ]
    generator = AnswerGenerator([prompt.ids for prompt in PROMPTS], [END], 6, 2, trainer.accelerator)
    answers = generator.generate(trainer.model, lambda: False).answers
    for row, answer in zip(rows[2:], answers, strict=True):
        assert row["answer"].split() == [f"t{index}" for index in answer.ids]
        assert (row["tokens"], row["ended"]) == (len(answer.ids), answer.ended)
    printed = capsys.readouterr().out
    assert "samples     2 prompts are continued at each evaluation, by at most 6 tokens" in printed
    assert "samples step 2/4  " in printed and "samples step 4/4  " in printed


def test_random_numbers_that_generation_draws_do_not_change_training(train, tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()

    def draw(model, is_stopping):
        torch.rand(3), random.random(), np.random.rand()
        return GeneratedAnswers([GeneratedAnswer(0, [5], True)], None, False)

    for generate in (None, draw):
        assert all(
            torch.equal(one, other)
            for one, other in zip(weights(train(generate)), weights(plain), strict=True)
        )


def test_its_time_does_not_count_as_training(train, monkeypatch):
    excluded = []
    exclude_time = DFTTrainer.__init__

    def sleep(model, is_stopping):
        time.sleep(0.2)
        return GeneratedAnswers([GeneratedAnswer(0, [5], True)], None, False)

    def record(self, *args, **kwargs):
        exclude_time(self, *args, **kwargs)
        exclude = self.exclude_time
        self.exclude_time = lambda seconds: (excluded.append(seconds), exclude(seconds))

    monkeypatch.setattr(DFTTrainer, "__init__", record)
    train(sleep)
    assert len(excluded) == 2 and all(0.2 <= seconds < 5 for seconds in excluded)


def test_a_lack_of_memory_is_a_warning(train, tmp_path, capsys):
    train(lambda model, is_stopping: GeneratedAnswers([], "asked for 2.5 GiB", False))
    printed = capsys.readouterr().out
    assert (
        "warning     no samples of step 2: out of memory (asked for 2.5 GiB); a smaller "
        "--per_device_eval_batch_size or --generate_samples_max_tokens needs less\n"
    ) in printed
    assert not (tmp_path / SAMPLES).exists()


def test_a_run_that_is_asked_to_stop_generates_nothing(train, tmp_path, capsys):
    def stop(model, is_stopping):
        return GeneratedAnswers([], None, not is_stopping())

    train(stop)
    printed = capsys.readouterr().out
    assert "note        no samples of step 4: the run was asked to stop" in printed
    assert not (tmp_path / SAMPLES).exists()


def test_a_file_that_cannot_be_written_is_a_warning(train, tmp_path, capsys):
    (tmp_path / SAMPLES).mkdir()
    train()
    assert "warning     the samples of step 2 were not written: " in capsys.readouterr().out


def test_prompts_leave_room_for_the_answer():
    model = tiny()
    model.config.max_position_embeddings = 100
    assert longest_prompt(model, 2048, 30) == 70 and longest_prompt(model, 50, 30) == 50
    message = (
        "--generate_samples_max_tokens 100: the model has only 100 positions for a prompt and its answer"
    )
    with pytest.raises(UserError, match=message):
        longest_prompt(model, 50, 100)
    del model.config.max_position_embeddings
    assert longest_prompt(model, 50, 100) == 50


@pytest.mark.parametrize(
    ("used", "unanswered", "too_long", "note"),
    [
        (4, 0, 0, None),
        (4, 7, 0, None),
        (4, 7, 2, "2 conversations are passed over because their prompts have more than 70 tokens"),
        (
            0, 9, 0,
            "none of the 9 conversations of the evaluation data can be used (9 do not end with an answer "
            "that is trained)",
        ),
        (1, 0, 0, "only 1 of the 9 conversations of the evaluation data can be used"),
        (
            2, 6, 1,
            "only 2 of the 9 conversations of the evaluation data can be used (1 have a prompt of more than "
            "70 tokens, 6 do not end with an answer that is trained)",
        ),
    ],
)  # fmt: skip
def test_missing_prompts_are_noted(used, unanswered, too_long, note):
    selection = PromptSelection(PROMPTS[:1] * used, 9, unanswered, too_long)
    expected = None if note is None else f"--generate_samples 4: {note}"
    assert selection_note(selection, 4, 70) == expected
