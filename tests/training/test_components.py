"""Components of the trainer, each tested without a trainer."""

import math
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from dft.data.batches.sampler import WithBlank
from dft.errors import UserError
from dft.training.checkpoints.folder import open_checkpoint, unfinished_folders
from dft.training.checkpoints.resumer import Resumer, check_optimizer_file
from dft.training.checkpoints.run_state import (
    LastStep,
    PendingEvents,
    RandomState,
    RunFacts,
    RunState,
    StepProgress,
)
from dft.training.checkpoints.writer import CheckpointWriter, saved_use_cache
from dft.training.components import Components
from dft.training.measuring.best import can_be_best
from dft.training.measuring.nonfinite import NonfiniteGuard
from dft.training.parallel.stopping import SIGNALS, StopControl, StoppedEvaluation, StopRequest
from dft.training.samplers import DataOrder
from tests.training.test_trainer import conversations, tiny


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)


def write_checkpoint(folder: Path, accelerator: Accelerator, args: TrainingArguments, digest: str) -> Path:
    facts = RunFacts(args, conversations(4), digest)
    with CheckpointWriter(accelerator, is_writer=True).stage(folder, facts.manifest(1, True)) as staging:
        (staging / "optimizer.pt").write_bytes(b"state")
    return folder


# ---- the state of a run ----


def test_the_run_state_is_read_as_it_was_written(tmp_path):
    state = RunState(PendingEvents(save=True), LastStep(0.5, 1e-4, 3), [1.0, 2.0], 7.0, [[1.0], [2.0]])
    state.write(tmp_path)
    assert RunState.read(tmp_path) == state


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_mean_of_the_loss_does_not_depend_on_the_ranks_that_resume(ranks):
    losses = [1.0, 2.0, 3.0, 6.0]
    state = RunState(PendingEvents(), LastStep(), losses, 0.0, [])
    shares = [state.loss_of_rank(rank, ranks) for rank in range(ranks)]
    assert sum(shares) / ranks == pytest.approx(sum(losses) / len(losses))


def test_random_state_is_restored_in_all_generators():
    state = RandomState.capture()
    first = random.random(), np.random.rand(), torch.rand(1).item()
    state.restore()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_a_stop_replaces_the_events_of_a_step_by_one_save():
    progress, control = StepProgress(), TrainerControl(should_evaluate=True, should_log=True)
    progress.begin_events(control, 4, ends_epoch=True, is_stopping=True)
    assert control.should_save and not control.should_evaluate and progress.last.logged == 4
    assert progress.pending() == PendingEvents(evaluate=True, save=False, end_epoch=True)


def test_a_regular_save_leaves_only_the_end_of_the_epoch_pending():
    progress, control = StepProgress(), TrainerControl(should_evaluate=True, should_save=True)
    progress.begin_events(control, 4, ends_epoch=True, is_stopping=False)
    assert control.should_evaluate and progress.pending() == PendingEvents(end_epoch=True)


# ---- checkpoints ----


def test_a_failed_save_keeps_the_earlier_checkpoint(tmp_path, accelerator, args):
    folder = write_checkpoint(tmp_path / "checkpoint-1", accelerator, args, "digest")
    writer = CheckpointWriter(accelerator, is_writer=True)
    with (
        pytest.raises(UserError, match="checkpoint-1 cannot be saved: no space left"),
        writer.stage(folder, {}) as staging,
    ):
        (staging / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    assert open_checkpoint(folder).step == 1 and not unfinished_folders(tmp_path)


def test_the_cache_setting_is_restored_after_a_save_that_fails():
    model = tiny()
    model.config.use_cache = False
    with pytest.raises(OSError), saved_use_cache(model, True):
        assert model.config.use_cache
        raise OSError
    assert model.config.use_cache is False


def test_resuming_checks_owner_and_model_before_anything_is_loaded(tmp_path, accelerator, args):
    folder = write_checkpoint(tmp_path / "checkpoint-1", accelerator, args, "digest")
    assert Resumer(accelerator, tmp_path).resolve(True, "digest") == str(folder)
    with pytest.raises(UserError, match="a checkpoint of another model"):
        Resumer(accelerator, tmp_path).resolve(str(folder), "other")
    (folder / "optimizer.pt").chmod(0o666)
    resumer = Resumer(accelerator, tmp_path)
    with pytest.raises(UserError, match=r"optimizer.pt can be written by others.*--trust_checkpoint True"):
        resumer.resolve(str(folder), "digest")
    assert resumer.checkpoint is None
    assert Resumer(accelerator, tmp_path, trust_checkpoint=True).resolve(True, "digest") == str(folder)


def test_a_checkpoint_with_the_optimizer_of_deepspeed_alone_does_not_start_a_new_optimizer(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / name).touch()
    check_optimizer_file(tmp_path)
    (tmp_path / "optimizer.pt").rename(tmp_path / "global_step1")
    with pytest.raises(
        UserError, match="has no optimizer and schedule that a run without DeepSpeed can load"
    ):
        check_optimizer_file(tmp_path)


def test_resuming_without_a_checkpoint(tmp_path, accelerator):
    resumer = Resumer(accelerator, tmp_path)
    assert resumer.resolve(None, "") is None and resumer.resolve(False, "") is None
    with pytest.raises(UserError, match="there is no complete checkpoint"):
        resumer.resolve(True, "")


def test_a_checkpoint_that_lacks_weights_is_not_resumed(accelerator, tmp_path):
    resumer, model = Resumer(accelerator, tmp_path), tiny()
    model.save_pretrained(tmp_path)
    assert resumer.load_model(model, str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its files lack 1 weights of the model, including model.norm.weight"):
        resumer.load_model(model, str(tmp_path))
    assert not resumer.load_model(torch.nn.Linear(1, 1), str(tmp_path)), "left to transformers"


def test_changed_data_and_seed_are_reported(tmp_path, args):
    manifest = RunFacts(args, conversations(4)).manifest(1, True)
    assert RunFacts(args, conversations(4)).differences(manifest) == []
    other = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=7)
    lines = RunFacts(other, conversations(5)).differences(manifest)
    assert [line.split()[0] for line in lines] == ["warning", "warning"]
    assert "training data differ" in lines[0] and "--seed was 42 and is 7" in lines[1]


# ---- stopping ----


def test_an_evaluation_is_stopped_at_the_next_check(accelerator):
    request = StopRequest()
    control = StopControl(request, accelerator)
    assert not control.is_requested()
    request.number = 15
    with pytest.raises(StoppedEvaluation):
        for _ in range(20):
            control.stop_evaluation_if_requested()
    assert str(control.stopped(3, "checkpoint-3")) == "stopped by SIGTERM after step 3"


@pytest.fixture
def signals():
    """Restore the handlers of signals and the output streams after a test."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_nohup_ignores_stay_ignored(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = StopRequest()
    request.listen()
    request.begin_training()
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.number == 0
    request.end_training()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_output_errors_are_ignored_once_the_terminal_is_closed(signals):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    reader, writer = os.pipe()
    sys.stdout = os.fdopen(writer, "w")
    os.close(reader)
    request = StopRequest()
    request.begin_training()
    with pytest.raises(BrokenPipeError):
        print("line", flush=True)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)  # from the launcher, too
    print("line", flush=True)
    assert request.number == signal.SIGHUP and sys.stdout.fileno() == writer


def test_a_run_without_signals_is_never_asked_to_stop(accelerator):
    assert not StopControl(None, accelerator).is_requested()


# ---- non-finite values ----


def test_a_skipped_step_is_removed_from_the_sums_and_does_not_update_weights(tmp_path, accelerator):
    weight = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([weight])
    optimizer = accelerator.prepare(torch.optim.SGD([weight], lr=1.0))
    guard, total = NonfiniteGuard("skip", accelerator, tmp_path, fp16=False), torch.tensor([5.0])
    loss = guard.watch((weight * math.nan).sum(), torch.tensor([math.nan]), {}, total)
    total += math.nan
    loss.backward()
    guard.handle_gradient(math.nan, 1, model, optimizer, None, [], total)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2)) and total.item() == 5
    assert optimizer.step_was_skipped
    guard.watch(weight.sum(), torch.tensor([1.0]), {}, total)
    guard.handle_gradient(1.0, 2, model, optimizer, None, [], total)
    assert not optimizer.step_was_skipped


def test_an_unfinished_step_is_removed_from_the_sums(tmp_path, accelerator):
    guard, total = NonfiniteGuard("stop", accelerator, tmp_path, fp16=False), torch.tensor([5.0])
    guard.watch(torch.tensor(1.0), torch.tensor([1.0]), {}, total)
    total += 1
    guard.roll_back(total)
    assert total.item() == 5
    guard.roll_back(total)  # without an unfinished step
    assert total.item() == 5


# ---- other components ----


def test_the_order_of_the_training_data_depends_only_on_the_epoch(args):
    order, dataset = DataOrder(args), WithBlank(conversations(9), 0)
    sampler = order.train_sampler(dataset)
    first = list(sampler)
    order.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == sorted(first)
    order.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize(("nll", "expected"), [(1.0, True), (math.nan, False)])
def test_the_evaluation_set_of_the_metric_must_be_finite(args, nll, expected):
    args.metric_for_best_model = "eval_code_acc"
    metrics = {"eval_code_acc": 0.5, "eval_code_nll": nll, "eval_math_nll": math.nan}
    assert can_be_best(metrics, args, is_saving=True) == expected


@pytest.mark.parametrize(
    ("metrics", "is_saving", "expected"),
    [
        ({"eval_loss": 1.0, "eval_nll": 1.0}, True, True),
        ({"eval_loss": 1.0, "eval_nll": 1.0}, False, False),
        ({"eval_loss": 1.0, "eval_nll": math.nan}, True, False),
        ({"eval_nll": 1.0}, True, False),
    ],
)
def test_only_a_finite_evaluation_with_a_checkpoint_can_be_the_best(args, metrics, is_saving, expected):
    assert can_be_best(metrics, args, is_saving) == expected


def test_the_batch_size_search_of_trainer_is_an_error(tmp_path):
    from dft import DFTTrainer

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, auto_find_batch_size=True
    )
    with pytest.raises(ValueError, match="auto_find_batch_size: .*requested_batch"):
        DFTTrainer(tiny(), arguments, train_dataset=conversations(2))


def test_uploads_are_finished_before_the_last_line_of_the_log():
    calls: list[str] = []
    components = SimpleNamespace(
        saver=SimpleNamespace(finish_uploads=lambda: calls.append("uploads")),
        recorder=SimpleNamespace(complete_summary=lambda *_: calls.append("summary")),
        _args=SimpleNamespace(save_total_limit=1),
    )
    Components.complete_summary(components, {"train_loss": 1.0}, TrainerState(), 0.5)
    assert calls == ["uploads", "summary"]


@pytest.mark.parametrize("loads_best", [False, True])
def test_the_newest_checkpoint_is_kept_beside_the_best_one_at_the_end(tmp_path, loads_best):
    """With save_total_limit 1, Trainer removes it, and a longer run would begin again after the best step."""
    from dft import DFTTrainer

    def run(steps: int, rate: float) -> TrainerState:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=steps, save_steps=1,
            eval_strategy="steps", eval_steps=1, save_total_limit=1, metric_for_best_model="eval_nll",
            greater_is_better=False, learning_rate=rate, lr_scheduler_type="constant",
            load_best_model_at_end=loads_best, report_to="none",
        )  # fmt: skip
        trainer = DFTTrainer(tiny(), arguments, train_dataset=conversations(8), eval_dataset=conversations(4))
        trainer.train(resume_from_checkpoint=steps > 3)
        assert arguments.save_total_limit == 1, "for the next run of the same trainer"
        return trainer.state

    state = run(3, rate=10.0)  # far too large, so that the first step is the best one
    assert state.best_global_step == 1
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert folders == {"checkpoint-1", "checkpoint-3"}
    longer = run(4, rate=10.0)
    assert [entry["step"] for entry in longer.log_history if "eval_nll" in entry] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
