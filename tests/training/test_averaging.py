"""--ema_decay: the exponential moving average of the weights, in one process."""

import signal
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from dft import DFTTrainer
from dft.arguments.conflicts import check_average
from dft.errors import UserError
from dft.training import averaging
from dft.training.averaging import AVERAGE_FILE, TrainedWeights, WeightAverage
from dft.training.checkpoints.disk_space import saved_bytes
from dft.training.checkpoints.hub import RESUME_ONLY_FILES
from dft.training.early_stopping import EarlyStopping
from dft.training.memory.batch_tokens import full_rows
from dft.training.memory.estimate import estimate_memory
from dft.training.memory.plan import plan, requested_setting
from dft.training.model.freezing import freeze_matching
from dft.training.model.loading import load_meta_model
from dft.training.parallel.stopping import StopControl, Stopped, StopRequest
from dft.training.run_options import RunOptions
from tests.training.model.loading_helpers import arguments
from tests.training.test_trainer import conversations, tiny

DECAY = 0.8
ROWS = conversations(24)


class Weights(TrainerCallback):
    """Records the weights before the first step and after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


def trainer(folder, decay=DECAY, model=None, evaluation=None, **flags) -> tuple[DFTTrainer, Weights]:
    options = {"on_nonfinite": flags.pop("on_nonfinite", "stop")}
    settings = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, seed=5, logging_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=4, **{"max_steps": 6, "save_steps": 3, **flags},
    )  # fmt: skip
    weights = Weights()
    run = DFTTrainer(
        model or tiny(), settings, alpha=0.6, train_dataset=Dataset.from_list(ROWS), eval_dataset=evaluation,
        callbacks=[weights], options=RunOptions(ema_decay=decay), **options,
    )  # fmt: skip
    return run, weights


def averaged(steps: list[dict[str, torch.Tensor]], decay: float = DECAY) -> dict[str, torch.Tensor]:
    """Compute the recursion in float64."""
    average = {name: weight.double() for name, weight in steps[0].items()}
    for weights in steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    return average


def assert_close(weights, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(weights[name].double(), value, rtol=1e-5, atol=1e-7)


def test_the_average_equals_the_recursion_over_the_weights_of_every_step(tmp_path):
    run, weights = trainer(tmp_path)
    run.train()
    assert len(weights.steps) == 7
    assert_close(run._run.average.values, averaged(weights.steps))
    trained = dict(run.model.named_parameters())
    assert all(torch.equal(trained[name], value) for name, value in weights.steps[-1].items())
    saved = load_file(tmp_path / "checkpoint-3/weight_average.safetensors")
    assert_close(saved, averaged(weights.steps[:4]))
    raw = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(value, weights.steps[3][name]) for name, value in raw.named_parameters())


def test_training_is_not_changed_by_the_average(tmp_path):
    run, _ = trainer(tmp_path / "with")
    plain, _ = trainer(tmp_path / "without", decay=None)
    run.train()
    plain.train()
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, plain.model.get_parameter(name))
    assert not list(tmp_path.glob("without/checkpoint-*/weight_average*"))


def test_evaluations_and_the_final_model_use_the_average(tmp_path):
    rows = Dataset.from_list(ROWS[:8])
    run, weights = trainer(tmp_path, evaluation=rows, eval_strategy="steps", eval_steps=3)
    run.train()
    run.save_model()
    final = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(dict(final.named_parameters()), averaged(weights.steps))
    logged = {entry["step"]: entry["eval_nll"] for entry in run.state.log_history if "eval_nll" in entry}
    for step in (3, 6):
        model = tiny()
        model.load_state_dict({**model.state_dict(), **averaged(weights.steps[: step + 1])})
        reference, _ = trainer(tmp_path / "reference", decay=None, model=model, evaluation=rows)
        assert logged[step] == pytest.approx(reference.evaluate()["eval_nll"], rel=1e-5)
    assert run.evaluate()["eval_nll"] == pytest.approx(logged[6], rel=1e-6)


def test_predictions_use_the_average(tmp_path):
    rows = Dataset.from_list(ROWS[:8])
    run, _ = trainer(tmp_path, evaluation=rows, max_steps=2)
    run.train()
    predicted = run.predict(rows).metrics["test_nll"]
    assert predicted == pytest.approx(run.evaluate()["eval_nll"], rel=1e-6)
    trained, _ = trainer(tmp_path / "trained", decay=None, model=run.model, evaluation=rows)
    assert abs(trained.evaluate()["eval_nll"] - predicted) > 1e-3


class Shard(TrainedWeights):
    """The weights of one rank of several."""

    def __init__(self, size: int) -> None:
        self.size = size

    def current(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(self.size)}

    def set(self, values: dict[str, torch.Tensor]) -> None:
        raise AssertionError


@pytest.mark.parametrize(("rank", "ranks", "size"), [(0, 4, 2), (0, 1, 8), (0, 2, 5)])
def test_a_sharded_average_of_another_number_of_ranks_or_form_is_an_error(
    tmp_path, monkeypatch, rank, ranks, size
):
    def average(rank: int, ranks: int, size: int, checkpoint: str | None) -> WeightAverage:
        monkeypatch.setattr(averaging, "trained_weights", lambda *_: Shard(size))
        made = WeightAverage(0.9, SimpleNamespace(process_index=rank, num_processes=ranks))
        made.begin(tiny(), tiny(), checkpoint)
        return made

    for saved in (0, 1):
        average(saved, 2, 4, None).save(tmp_path, is_writer=False)
    assert torch.equal(average(1, 2, 4, str(tmp_path)).values["weight"], torch.ones(4))
    with pytest.raises(UserError) as caught:
        average(rank, ranks, size, str(tmp_path))
    assert str(caught.value).startswith(
        f"--resume_from_checkpoint {tmp_path}: the average of --ema_decay was saved by another number of "
        f"ranks, or in another form, and this run needs weight_average-1-of-{ranks}.safetensors; resume with "
        "the same number of ranks, or start a new run"
    )


def test_the_average_of_a_checkpoint_is_not_pushed_beside_its_model():
    """A hub repository would keep it beside the final model, which is the average."""
    names = [f"{AVERAGE_FILE}.safetensors", f"{AVERAGE_FILE}-1-of-2.safetensors", "model.safetensors"]
    assert [*filter_repo_objects(names, ignore_patterns=RESUME_ONLY_FILES)] == ["model.safetensors"]


def test_the_average_survives_early_stopping_and_the_limit_of_checkpoints(tmp_path):
    """The evaluation of one of two sets decides; the best step is the first, and its average is saved."""
    sets = {"math": Dataset.from_list(ROWS[:8]), "code": Dataset.from_list(ROWS[8:16])}
    run, weights = trainer(
        tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="eval_code_nll", greater_is_better=True,
    )  # fmt: skip
    run.add_callback(EarlyStopping(2))
    run.train()
    assert (run.state.global_step, run.state.best_global_step) == (3, 1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    run.save_model()
    final = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(dict(final.named_parameters()), averaged(weights.steps[:2]))


def test_a_signal_in_an_evaluation_saves_the_trained_weights_and_the_average(tmp_path):
    """The evaluation at step 3 is stopped while the model has the average, and the run then resumes."""
    rows = Dataset.from_list(ROWS)
    flags = {"evaluation": rows, "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    whole, weights = trainer(tmp_path / "whole", **flags)
    whole.train()
    stopped, _ = trainer(tmp_path / "stopped", save_strategy="no", **flags)
    request = StopRequest()
    stopped._run.stop = StopControl(request, stopped.accelerator)
    prediction_step = stopped.prediction_step

    def signalled(*args: object, **kwargs: object) -> object:
        request.number = signal.SIGTERM
        return prediction_step(*args, **kwargs)

    stopped.prediction_step = signalled
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 3"):
            stopped.train()
    finally:
        request.end_training()
    saved = load_file(tmp_path / "stopped/checkpoint-3/model.safetensors")
    assert all(torch.equal(saved[name], weights.steps[3][name]) for name in saved)
    resumed, _ = trainer(tmp_path / "stopped", **flags)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole._run.average.values.items():
        assert torch.equal(resumed._run.average.values[name], value), name


def test_a_resumed_run_continues_the_average_exactly(tmp_path):
    whole, _ = trainer(tmp_path / "whole")
    whole.train()
    resumed, _ = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for name, value in whole._run.average.values.items():
        assert torch.equal(resumed._run.average.values[name], value), name


def test_a_run_that_resumes_without_an_average_begins_one_and_says_so(tmp_path, capsys):
    first, before = trainer(tmp_path / "first", decay=None)
    first.train()
    resumed, after = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-3"))
    assert "note        --ema_decay: from none to 0.8, from step 4 on" in capsys.readouterr().out
    assert_close(resumed._run.average.values, averaged([before.steps[3], *after.steps[1:]]))


def test_skipped_steps_do_not_count(tmp_path):
    """The loss of the rows of step 2 is not finite."""
    run, weights = trainer(tmp_path, on_nonfinite="skip", max_grad_norm=1.0)
    compute_loss = run.compute_loss

    def spoiled(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if run.state.global_step == 1 else loss

    run.compute_loss = spoiled
    run.train()
    steps = weights.steps
    assert all(torch.equal(steps[2][name], weight) for name, weight in steps[1].items())
    assert_close(run._run.average.values, averaged([*steps[:2], *steps[3:]]))


def test_only_trained_weights_are_averaged(tmp_path):
    model = tiny()
    freeze_matching(model, ["model.layers.*"])
    run, weights = trainer(tmp_path, model=model)
    run.train()
    values = run._run.average.values
    assert values.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    expected = averaged(weights.steps)
    assert_close(values, {name: expected[name] for name in values})


def test_half_precision_weights_are_averaged_in_float32(tmp_path):
    run, weights = trainer(tmp_path, decay=0.99, model=tiny().to(torch.bfloat16))
    run.train()
    values = run._run.average.values
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert_close(values, averaged(weights.steps, 0.99))


def test_the_average_of_the_best_step_is_saved(tmp_path):
    rows = Dataset.from_list(ROWS[:8])
    run, weights = trainer(
        tmp_path, evaluation=rows, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="eval_nll", greater_is_better=True,
    )  # fmt: skip
    run.train()
    run.save_model()
    best = run.state.best_global_step
    final = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(dict(final.named_parameters()), averaged(weights.steps[: best + 1]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema_decay", "1"], "--ema_decay 1: must be less than 1"),
        (["--ema_decay", "0"], "--ema_decay 0: must be greater than 0"),
        (
            ["--ema_decay", "0.9", "--save_only_model", "True", "--load_best_model_at_end", "True",
             "--eval_strategy", "steps", "--eval_steps", "500"],
            "--ema_decay 0.9: --save_only_model True saves no average",
        ),
    ],
)  # fmt: skip
def test_invalid_combinations_are_one_error(folder, flags, message):
    with pytest.raises(UserError, match=message):
        check_average(arguments(folder, *flags).training)


def test_the_plan_and_the_disk_space_count_the_average(folder):
    estimates, sizes = [], []
    for more in ([], ["--ema_decay", "0.9"]):
        flags = arguments(folder, *more)
        model = load_meta_model(flags)
        estimates.append(estimate_memory(model, flags.training, tokens=8))
        sizes.append(saved_bytes(model, flags.training)[1])
    bytes_of_average = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert estimates[0].average == 0 and estimates[1].average * 2**30 == pytest.approx(bytes_of_average)
    assert sizes[1] - sizes[0] == bytes_of_average
    assert "average" not in str(estimates[0]) and ", average " in str(estimates[1])
    setting = requested_setting(model, flags.training, ranks=1)
    planned = plan(model, flags.training, setting, full_rows(8), fused=True)
    without = plan(model, arguments(folder).training, setting, full_rows(8), fused=True)
    assert (planned.peak - without.peak) * 2**30 == pytest.approx(bytes_of_average)
