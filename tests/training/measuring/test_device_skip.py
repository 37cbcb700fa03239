"""Steps skipped on the device: the host learns of it later, and nothing else differs.

Here the device is the CPU, whose fused Adam skips steps in the same way.
"""

import math

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from dft.errors import UserError
from dft.training.host_copy import HostCopy
from dft.training.measuring import device_skip, nonfinite
from dft.training.measuring.device_skip import can_skip_on_device
from tests.training.measuring.test_nonfinite import STEPS, Rows, poisoned_model, run, weights
from tests.training.test_trainer import tiny

TIMES = ("seconds", "second", "runtime", "memory")
"""Parts of names of metrics that measure the machine."""
SETTINGS = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "logging_steps": 100}


@pytest.fixture
def on_device(monkeypatch):
    monkeypatch.setattr(device_skip, "DEVICE_TYPES", frozenset({"cpu"}))


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def train(tmp_path, name, rows, policy="skip", **flags):
    trainer = run(tmp_path / name, poisoned_model(), rows, policy, **{**SETTINGS, **flags})
    trainer.train()
    return trainer


def log(trainer) -> list[dict]:
    """Return the log without NaN, which differs from itself, and without times."""
    return [
        {name: repr(value) for name, value in record.items() if not any(word in name for word in TIMES)}
        for record in trainer.state.log_history
    ]


def assert_equal_states(first, second) -> None:
    """Assert that weights, optimizer and schedule of two runs are equal, bit for bit."""
    assert torch.equal(*(flat(trainer.model.state_dict()) for trainer in (first, second)))
    states = [trainer.optimizer.optimizer.state_dict()["state"] for trainer in (first, second)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()
    groups = [trainer.optimizer.param_groups for trainer in (first, second)]
    assert [group["lr"] for group in groups[0]] == [group["lr"] for group in groups[1]]


def flat(state) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()]).nan_to_num(7)


@pytest.mark.parametrize("logging_steps", [1, 2, 3, 100])
@pytest.mark.parametrize("poisoned", [(0,), (6,), (4, 6), (10,)], ids=str)
def test_skipped_steps_give_the_same_run(tmp_path, monkeypatch, poisoned, logging_steps):
    """Two rows are a step: the first, the fourth, the third and fourth, or the last step is skipped."""
    rows = Rows(12, None)
    for row in poisoned:
        rows.rows[row] = Rows(12, row).rows[row]
    on_host = train(tmp_path, "host", rows, logging_steps=logging_steps)
    monkeypatch.setattr(device_skip, "DEVICE_TYPES", frozenset({"cpu"}))
    on_device = train(tmp_path, "device", rows, logging_steps=logging_steps)
    assert_equal_states(on_host, on_device)
    assert log(on_host) == log(on_device)
    steps = {state["step"].item() for state in on_device.optimizer.optimizer.state.values()}
    assert steps == {STEPS - len(poisoned)}
    assert on_device._run.guard.unsettled_step is None
    assert "found_inf" not in vars(on_device.optimizer.optimizer)


def test_a_run_without_skipped_steps_is_the_same(tmp_path, monkeypatch, capsys):
    on_host = train(tmp_path, "host", Rows(12, None), "stop")
    monkeypatch.setattr(device_skip, "DEVICE_TYPES", frozenset({"cpu"}))
    on_device = train(tmp_path, "device", Rows(12, None), "stop")
    assert_equal_states(on_host, on_device)
    assert log(on_host) == log(on_device)


class Watch(TrainerCallback):
    """Records the weights and the learning rate at the end of each step."""

    def __init__(self) -> None:
        self.weights: dict[int, torch.Tensor] = {}
        self.last_begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.last_begun = state.global_step + 1

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = flat(weights(model))


@pytest.mark.parametrize(("logging_steps", "last_begun"), [(100, 5), (4, 4)])
def test_a_run_stops_at_the_next_step_with_the_weights_before_the_bad_one(
    tmp_path, on_device, logging_steps, last_begun
):
    """Step 4 is not finite. It is noticed before the update of step 5, or when step 4 is to be logged."""
    model, watch = poisoned_model(), Watch()
    flags = {**SETTINGS, "logging_steps": logging_steps, "save_strategy": "steps", "save_steps": 3}
    trainer = run(tmp_path, model, Rows(12, 6), "stop", **flags)
    trainer.add_callback(watch)
    with pytest.raises(UserError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("step 4: the loss of file 0:7 on rank 0 is not finite. ")
    assert "The weights were not updated" in message and "checkpoint-3. " in message
    assert watch.last_begun == last_begun
    assert torch.equal(flat(weights(model)), watch.weights[3])
    assert trainer.state.global_step == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-3"}
    trainer.train_dataset = Rows(12, None)
    trainer.train(resume_from_checkpoint=True)  # the flag of the stopped run is not left in the optimizer
    assert trainer.state.global_step == STEPS


def test_a_step_that_is_not_finite_is_neither_saved_nor_evaluated(tmp_path, on_device):
    trainer = run(
        tmp_path, poisoned_model(), Rows(12, 6), "stop", **SETTINGS, save_strategy="steps", save_steps=4
    )  # fmt: skip
    with pytest.raises(UserError, match=r"step 4: .*there is no checkpoint yet"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("save_steps", [4, 5])
def test_a_run_resumes_exactly_after_a_skipped_step(tmp_path, on_device, save_steps):
    """Step 4 is skipped. Step 4 itself is saved, or the step after it."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == save_steps

    whole = train(tmp_path, "whole", Rows(12, 6))
    first = run(tmp_path / "parts", poisoned_model(), Rows(12, 6), "skip", **SETTINGS)
    first.add_callback(Stop())
    first.train()
    assert first.state.global_step == save_steps
    second = run(tmp_path / "parts", poisoned_model(), Rows(12, 6), "skip", **SETTINGS)
    second.train(resume_from_checkpoint=True)
    assert_equal_states(whole, second)
    assert whole.state.log_history[-1]["train_loss"] == second.state.log_history[-1]["train_loss"]


def test_the_host_reads_the_norm_of_a_step_during_the_next_one(tmp_path, on_device, monkeypatch):
    model, reads = tiny(), []
    trainer = run(tmp_path, model, Rows(12, None), "stop", **SETTINGS)
    watch = Watch()
    trainer.add_callback(watch)
    read = HostCopy.read

    def record(self) -> float:
        reads.append((watch.last_begun, len(watch.weights)))
        return read(self)

    monkeypatch.setattr(HostCopy, "read", record)
    trainer.train()
    # (step in progress, completed steps): all but the last are read during the next step.
    assert reads == [(step + 1, step) for step in range(1, STEPS)] + [(STEPS, STEPS)]


def test_too_many_skipped_steps_stop_the_run(tmp_path, on_device, monkeypatch):
    monkeypatch.setattr(nonfinite, "MAX_CONSECUTIVE_SKIPS", 3)
    rows = Rows(12, 0)
    rows.rows = [rows.rows[0]] * 12
    with pytest.raises(UserError, match="step 4: .*and neither were the 3 steps before it"):
        train(tmp_path, "run", rows)


def test_without_memory_after_a_nonfinite_step_nothing_is_saved(tmp_path, on_device):
    """Step 5 does not fit while the host does not know of step 4."""
    model = poisoned_model()
    trainer = run(tmp_path, model, Rows(12, 6), "stop", **SETTINGS)
    watch = Watch()
    trainer.add_callback(watch)

    def fail(*_):
        if watch.last_begun == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="step 4: the loss of file 0:7"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda weights: torch.optim.AdamW(weights, fused=True), True),
        (lambda weights: torch.optim.Adam(weights, fused=True), True),
        (lambda weights: torch.optim.AdamW(weights), False),
        (lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(0.1), fused=True), False),
        (lambda weights: torch.optim.SGD(weights, fused=True), False),
        (lambda weights: torch.optim.Adagrad(weights, fused=True), False),
    ],
)
def test_only_fused_adam_skips_steps_on_the_device(on_device, accelerator, optimizer, expected):
    wrapped = accelerator.prepare(optimizer([torch.nn.Parameter(torch.ones(2))]))
    assert can_skip_on_device(torch.tensor(1.0), wrapped) is expected
    assert not can_skip_on_device(1.0, wrapped)


def test_a_cpu_skips_on_the_host(accelerator):
    wrapped = accelerator.prepare(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True))
    assert not can_skip_on_device(torch.tensor(1.0), wrapped)


def test_an_unfused_optimizer_waits_before_the_update(tmp_path, on_device, monkeypatch):
    monkeypatch.setattr(HostCopy, "read", lambda _: pytest.fail("the norm was not read before the update"))
    trainer = train(tmp_path, "run", Rows(12, 6), optim="adamw_torch")
    assert flat(trainer.model.state_dict()).isfinite().all()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
