"""Every flag of transformers has a row in the table, and does what the row says."""

from dataclasses import fields

import pytest
import transformers
from datasets import Dataset

from dft import DFTTrainer
from dft.arguments.inherited import TREATMENTS, Treatment, default_values, unused_notes
from dft.errors import UserError
from tests.arguments.command import checked
from tests.training.test_trainer import conversations, tiny, trainer


def test_the_table_has_a_row_for_each_flag_of_the_installed_transformers():
    """After an upgrade of transformers: add a row for each new flag, and a test for what it does."""
    assert list(TREATMENTS) == [field.name for field in fields(transformers.TrainingArguments)]


REFUSED = {
    "average_tokens_across_devices": "False",
    "label_smoothing_factor": "0.1",
    "enable_jit_checkpoint": "True",
    "restore_callback_states_from_checkpoint": "True",
    "dataloader_in_order": "False",
}


def test_every_refused_flag_is_tested():
    assert set(REFUSED) == {name for name, row in TREATMENTS.items() if row.treatment is Treatment.REFUSED}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_flag_is_one_error(tmp_path, name):
    with pytest.raises(UserError, match=rf"^--{name} {REFUSED[name]}"):
        checked(tmp_path, f"--{name}", REFUSED[name])


UNUSED = {
    "bf16_full_eval": "True",
    "fp16_full_eval": "True",
    "prediction_loss_only": "True",
    "eval_do_concat_batches": "False",
    "eval_use_gather_object": "True",
    "eval_accumulation_steps": "2",
    "include_for_metrics": "loss",
    "batch_eval_metrics": "True",
    "length_column_name": "tokens",
    "do_train": "True",
    "do_eval": "True",
    "do_predict": "True",
}


def test_every_flag_without_effect_is_tested():
    assert set(UNUSED) == {name for name, row in TREATMENTS.items() if row.treatment is Treatment.UNUSED}


@pytest.mark.parametrize("name", UNUSED)
def test_a_flag_without_effect_is_noted(tmp_path, name):
    notes = checked(tmp_path, f"--{name}", UNUSED[name]).notes
    assert sum(note.startswith(f"--{name} {UNUSED[name]} has no effect: ") for note in notes) == 1


def test_defaults_are_not_noted():
    assert unused_notes(default_values()) == []


ROWS = conversations(16)
STEPS = {"max_steps": 2, "per_device_train_batch_size": 4}


def numbers(run: DFTTrainer) -> list[float]:
    """Return loss and gradient norm of each step."""
    log = [entry for entry in run.state.log_history if "grad_norm" in entry]
    return [entry[name] for entry in log for name in ("loss", "grad_norm")]


def steps_of(folder, evaluation=None, **flags) -> list[float]:
    run = trainer(folder, ROWS, evaluation=evaluation, **{**STEPS, **flags})
    run.train()
    return numbers(run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return steps_of(tmp_path_factory.mktemp("plain"))


PASSED = {
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "debug": {"debug": "underflow_overflow"},
    "activation_checkpointing": {"activation_checkpointing": True},
    "remove_unused_columns": {"remove_unused_columns": False},
    "dataloader_num_workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1},
    "logging_first_step": {"logging_first_step": True, "log_on_each_node": False},
    "eval_delay": {"eval_delay": 2, "eval_strategy": "steps", "eval_steps": 1, "evaluation": ROWS[:2]},
    "metrics": {
        "batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "prediction_loss_only": True,
        "eval_accumulation_steps": 1, "eval_do_concat_batches": False, "eval_use_gather_object": True,
        "eval_strategy": "steps", "eval_steps": 1, "evaluation": ROWS[:2],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED)
def test_a_flag_that_is_passed_on_does_not_change_the_loss(tmp_path, plain, name):
    assert steps_of(tmp_path, **PASSED[name]) == pytest.approx(plain, rel=1e-6)


def test_tokens_are_counted_when_asked_for(tmp_path):
    run = trainer(tmp_path, ROWS, include_num_input_tokens_seen="non_padding", **STEPS)
    run.train()
    tokens = [r["num_input_tokens_seen"] for r in run.state.log_history if "grad_norm" in r]
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert tokens[0] < tokens[1] < sum(lengths)


@pytest.mark.parametrize("alpha", [5.0, 0.0])
def test_neftune_noise_gives_the_fused_head_the_loss_of_the_plain_head(tmp_path, plain, alpha):
    """The noise is drawn from the same seed; without it (alpha 0) the loss is that of the plain run."""
    runs = []
    for head in ("on", "off"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant",
            disable_tqdm=True, seed=5, logging_steps=1, save_strategy="no", neftune_noise_alpha=alpha or None,
            **STEPS,
        )  # fmt: skip
        run = DFTTrainer(tiny(), arguments, alpha=0.6, fused_head=head, train_dataset=Dataset.from_list(ROWS))
        run.train()
        runs.append(numbers(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert (runs[0] == pytest.approx(plain, rel=1e-5)) == (alpha == 0)
