"""Early stopping: which evaluations count, when the run ends, and that a resumed run counts on."""

from types import SimpleNamespace

import pytest
import transformers
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from dft import DFTTrainer
from dft.training.early_stopping import EarlyStopping, early_reason
from dft.training.run import finished_status
from dft.training.run_options import RunOptions
from tests.training.test_trainer import conversations, tiny

ROWS = conversations(16)


def run_of(folder, patience: int, *, threshold: float = 0.0, values=None, **flags) -> DFTTrainer:
    """Return a trainer whose evaluations report `values` as eval_acc, by optimizer step."""
    flags = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **flags}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, max_steps=8,
        metric_for_best_model="eval_acc", greater_is_better=True, **flags,
    )  # fmt: skip
    early_stopping = EarlyStopping(patience, threshold)
    options = RunOptions(early_stopping=early_stopping, verify_save="False")
    data = {"train_dataset": Dataset.from_list(ROWS), "eval_dataset": Dataset.from_list(ROWS[:2])}
    trainer = DFTTrainer(tiny(), arguments, alpha=0.6, options=options, **data)
    if values is not None:
        evaluate = trainer._run.recorder.evaluation_metrics

        def scripted(prefix, with_histogram):
            return {**evaluate(prefix, with_histogram), "eval_acc": values[trainer.state.global_step - 1]}

        trainer._run.recorder.evaluation_metrics = scripted
    return trainer


def evaluate_all(callback: EarlyStopping, values: list[float], greater: bool = True) -> int | None:
    """Return the number of the evaluation that stops the run, counted from 1."""
    args = SimpleNamespace(metric_for_best_model="acc", greater_is_better=greater)
    state, control = TrainerState(), TrainerControl()
    for step, value in enumerate(values, 1):
        state.global_step = step
        callback.on_evaluate(args, state, control, metrics={"eval_other_acc": 9.0})
        callback.on_evaluate(args, state, control, metrics={"eval_acc": value})
        if control.should_training_stop:
            return step
    return None


@pytest.mark.parametrize(
    ("patience", "threshold", "values", "greater", "stops"),
    [
        (2, 0.0, [0.1, 0.2, 0.2, 0.15], True, 4),
        (2, 0.0, [0.1, 0.2, 0.15, 0.3, 0.2], True, None),
        (2, 0.0, [0.3, 0.4, 0.5], False, 3),
        (2, 0.15, [0.1, 0.2, 0.3, 0.35], True, None),
        (2, 0.25, [0.1, 0.2, 0.3], True, 3),
        (1, 0.0, [0.1, float("nan")], True, 2),
        (2, 0.0, [float("nan"), float("inf")], True, 2),
    ],
)  # fmt: skip
def test_a_run_stops_after_evaluations_that_do_not_improve(patience, threshold, values, greater, stops):
    assert evaluate_all(EarlyStopping(patience, threshold), values, greater) == stops


def test_small_gains_add_up_to_an_improvement():
    """Compared with the last improvement, 0.3 is better than 0.1 by more than the threshold."""
    callback = EarlyStopping(2, 0.15)
    assert evaluate_all(callback, [0.1, 0.2, 0.3]) is None
    assert (callback.best, callback.best_step) == (0.3, 3)


def test_the_trainer_stops_and_names_the_best_checkpoint(tmp_path):
    trainer = run_of(tmp_path, 2, values=[0.1, 0.3, 0.2, 0.25, 0.9, 0.9, 0.9, 0.9])
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    reason = "eval_acc did not improve in 2 evaluations in a row; best: 0.3 at step 2"
    assert early_reason(trainer.state, trainer.options.early_stopping) == reason
    assert finished_status(trainer.state, trainer.options) == f"finished early: {reason}"


def test_evaluations_between_saves_count(tmp_path):
    """transformers would compare with the best checkpoint, and there is none before step 4."""
    trainer = run_of(tmp_path, 2, values=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], save_steps=4)
    trainer.train()
    assert trainer.state.global_step == 3


VALUES = [0.3, 0.1, 0.2, 0.1, 0.5, 0.5, 0.5, 0.5]


class StopAt(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize(("patience", "last"), [(3, 4), (2, 3)])
def test_a_resumed_run_counts_on_from_its_checkpoint(tmp_path, patience, last):
    first = run_of(tmp_path, patience, values=VALUES)
    first.add_callback(StopAt())
    first.train()
    assert first.state.global_step == 2
    resumed = run_of(tmp_path, patience, values=VALUES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == last
    assert resumed.options.early_stopping.best_step == 1


def test_a_stopped_run_resumes_only_with_more_patience(tmp_path):
    run_of(tmp_path, 1, values=VALUES).train()
    again = run_of(tmp_path, 1, values=VALUES)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    more = run_of(tmp_path, 2, values=VALUES)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 3


def test_other_evaluation_data_are_not_compared_with_the_best_value(tmp_path):
    run_of(tmp_path, 1, values=VALUES).train()
    resumed = run_of(tmp_path, 2, values=VALUES)
    resumed.eval_dataset = Dataset.from_list(ROWS[2:4])
    resumed.train(resume_from_checkpoint=True)
    early = resumed.options.early_stopping
    assert (early.best, early.best_step, resumed.state.global_step) == (0.5, 5, 7)


def test_a_checkpoint_without_early_stopping_can_be_resumed_with_it(tmp_path):
    plain = run_of(tmp_path, 9, values=VALUES)
    plain.remove_callback(EarlyStopping)
    plain.add_callback(StopAt())
    plain.train()
    resumed = run_of(tmp_path, 1, values=VALUES)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.options.early_stopping.best_step == 3
