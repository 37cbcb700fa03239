"""Interrupted runs end with results that are bit-identical to those of uninterrupted runs."""

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_STOPPED
from tests.launching import ROOT, eval_records, history
from tests.reliability.selecting import mostly_slow

OF_THE_MACHINE = ("tokens_per_second", "peak_memory_gib", "seconds_left")
ENDINGS = ("_runtime", "_per_second")
"""Log entries that differ between identical runs."""
STEPS_PER_EPOCH = 5
KINDS = ("single", "zero3", "fsdp")


@dataclass
class Setting:
    """Settings of a run of two epochs with five steps each, and two micro-batches per step on every rank."""

    kind: str
    flags: dict[str, object]

    @property
    def ranks(self) -> int:
        return 1 if self.kind == "single" else 2


FLAGS: dict[str, dict[str, object]] = {
    "plain": {},
    "packed": {"packing": True, "max_length": 96, "per_device_train_batch_size": 16},
    "workers": {"dataloader_num_workers": 2},
    "by_epoch": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
}


@pytest.fixture(scope="module")
def train(example, forks):
    """Train with a setting; `env` says when to interrupt it (`tests.dying`). Return exit codes and output."""

    def run(output: Path, setting: str, kind: str, env: dict[str, str] | None = None, **flags):
        ranks = 1 if kind == "single" else 2
        more = {
            "single": {},
            "zero3": {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True},
            "fsdp": {"fsdp": True, "use_cpu": True},
            "ddp": {"use_cpu": True},
        }[kind]
        batch = {"per_device_train_batch_size": 32}
        settings = {**batch, **FLAGS[setting], **more, **flags}
        settings["per_device_train_batch_size"] = int(settings["per_device_train_batch_size"]) // ranks
        words = example.words(
            output,
            **{
                "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps",
                "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2,
                "resume_from_checkpoint": "auto", "warmup_ratio": 0.2,
                "per_device_eval_batch_size": 1,  # several batches, between which stop signals are checked
                **settings,
            },
        )  # fmt: skip
        return forks.run(words, ranks, **(env or {}))

    return run


@pytest.fixture(scope="module")
def whole(example, train):
    """Output folders of uninterrupted runs, created on first use."""
    folders: dict[tuple[str, str], Path] = {}

    def make(setting: str, kind: str) -> Path:
        if (setting, kind) not in folders:
            folders[setting, kind] = example.folder / f"whole-{setting}-{kind}"
            codes, output = train(folders[setting, kind], setting, kind)
            assert not any(codes), output
        return folders[setting, kind]

    return make


def logged(folder: Path) -> list[dict[str, object]]:
    """Return all log entries that do not depend on the speed of the machine."""
    return [
        {k: v for k, v in record.items() if k not in OF_THE_MACHINE and not k.endswith(ENDINGS)}
        for record in history(folder)
    ]


def assert_same(folder: Path, reference: Path) -> None:
    expected, got = load_file(reference / "model.safetensors"), load_file(folder / "model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, got[name]), name
    assert logged(folder) == logged(reference)
    assert not list(folder.glob("incomplete-*"))


MOMENTS = [
    ("plain", "micro 4.1"),  # between two micro-batches, in the middle of the first epoch
    ("plain", "step 8"),  # in the second epoch, between two saves
    ("plain", "evaluated 6"),  # right after an evaluation, before its save
    ("plain", "saving 6 optimizer"),  # during a save
    ("plain", "saving 6 sealed"),  # complete, but not yet renamed
    ("packed", "step 7"),
    ("workers", "micro 7.1"),
    ("by_epoch", "saving 5 state"),
    ("by_epoch", "step 6"),
]
QUICK_MOMENTS = [
    ("plain", "micro 4.1", "zero3"), ("plain", "step 8", "single"), ("plain", "evaluated 6", "single"),
    ("plain", "saving 6 optimizer", "single"), ("packed", "step 7", "single"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "moment", "kind"),
    mostly_slow([(*moment, kind) for moment in MOMENTS for kind in KINDS], QUICK_MOMENTS),
)
def test_a_killed_run_equals_the_uninterrupted_run(example, train, whole, setting, moment, kind):
    reference = whole(setting, kind)
    output = example.folder / f"killed-{setting}-{moment}-{kind}".replace(" ", "-")
    codes, printed = train(output, setting, kind, {"DIE_AT": moment})
    assert -signal.SIGKILL in codes, printed
    codes, printed = train(output, setting, kind)
    assert not any(codes), printed
    assert "Traceback" not in printed
    assert_same(output, reference)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["single"]))
def test_a_run_resumes_at_the_end_of_an_epoch(example, train, whole, kind):
    """The save at the last step of an epoch happens before the events at the end of that epoch."""
    how = {"save_strategy": "steps", "save_steps": STEPS_PER_EPOCH}
    reference = example.folder / f"whole-epoch-end-{kind}"
    output = example.folder / f"killed-epoch-end-{kind}"
    assert not any(train(reference, "by_epoch", kind, **how)[0])
    # The first attempt ends before the evaluation at the end of the epoch.
    codes, printed = train(output, "by_epoch", kind, {"DIE_AT": "evaluating 5"}, **how)
    assert -signal.SIGKILL in codes and (output / "checkpoint-5").is_dir(), printed
    codes, printed = train(output, "by_epoch", kind, **how)
    assert not any(codes), printed
    assert [record["step"] for record in eval_records(output)] == [5, 10]
    assert_same(output, reference)


REQUESTS = [
    ("SIGTERM", "micro 4.1", "plain"),
    ("SIGUSR1", "micro 5.2", "plain"),  # at this step an evaluation and a save are due
    ("SIGINT", "evaluating 3", "plain"),
    ("SIGTERM", "micro 9.2", "by_epoch"),  # the last step, followed by the end of training
    ("SIGTERM", "saving 6 model", "plain"),
    ("SIGTERM", "micro 7.1", "workers"),
    ("SIGHUP", "micro 4.1", "plain"),  # the terminal is closed
    ("SIGHUP", "micro 7.1", "workers"),
]
QUICK_REQUESTS = [
    ("SIGUSR1", "micro 5.2", "plain", "zero3"), ("SIGINT", "evaluating 3", "plain", "single"),
    ("SIGTERM", "micro 7.1", "workers", "single"), ("SIGHUP", "micro 4.1", "plain", "single"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "moment", "setting", "kind"),
    mostly_slow([(*request, kind) for request in REQUESTS for kind in KINDS], QUICK_REQUESTS),
)
def test_a_signalled_run_saves_and_resumes(example, train, whole, number, moment, setting, kind):
    reference = whole(setting, kind)
    output = example.folder / f"stopped-{number}-{setting}-{moment}-{kind}".replace(" ", "-")
    env = {"DIE_AT": moment, "DIE_BY": number, "DIE_RANK": str(int(kind != "single"))}
    codes, printed = train(output, setting, kind, env)
    assert set(codes) == {EXIT_STOPPED}, printed
    assert f"stopped by {number} after step" in printed and "to resume: run the same command" in printed
    codes, printed = train(output, setting, kind)
    assert not any(codes), printed
    assert_same(output, reference)


LATE = {"logging_steps": 10, "save_steps": 6, "eval_steps": 6}
"""With these intervals steps 1 to 4 and 7 to 9 end without an event."""
LATE_REQUESTS = [
    ("micro 1.2", "1", 3),  # in step 2, read after step 3
    ("micro 3.1", "1", 5),  # in step 4, and step 5 ends an epoch
    ("step 7", "0", 8),
    ("micro 8.1", "1", 10),  # in step 9, read after the last step
    ("micro 9.2", "1", 10),  # in the last step
    ("evaluating 6", "1", 6),
    ("saving 6 model", "0", 6),
    ("micro 6.1", None, 8),  # on both ranks
]


@pytest.mark.parametrize(
    ("moment", "rank", "step"), mostly_slow(LATE_REQUESTS, [LATE_REQUESTS[0], LATE_REQUESTS[3]])
)
def test_ranks_that_agree_one_step_late_stop_together_and_resume(example, forks, train, moment, rank, step):
    """On a GPU, ranks read a step late whether one of them received a signal."""
    reference = example.folder / "whole-late"
    if not reference.exists():
        codes, printed = train(reference, "plain", "ddp", **LATE)
        assert codes == [0, 0], printed
    output = example.folder / f"late-{moment}".replace(" ", "-")
    env = {"DIE_AT": moment, "DIE_BY": "SIGTERM", "LATE_STOP": "1"}
    if rank is not None:
        env["DIE_RANK"] = rank
    codes, printed = train(output, "plain", "ddp", env, **LATE)
    assert codes == [EXIT_STOPPED] * 2, printed
    assert f"stopped by SIGTERM after step {step}:" in printed
    codes, printed = train(output, "plain", "ddp", {"LATE_STOP": "1"}, **LATE)
    assert codes == [0, 0], printed
    assert_same(output, reference)


@pytest.mark.slow
def test_ranks_stop_after_the_last_step_although_nothing_is_logged_or_saved_there(example, train):
    """The end of training is an event, at which the ranks wait for each other."""
    flags = {**LATE, "max_steps": 8, "save_strategy": "no", "eval_strategy": "no"}
    env = {"DIE_AT": "micro 7.1", "DIE_BY": "SIGTERM", "DIE_RANK": "1", "LATE_STOP": "1"}
    output = example.folder / "late-last"
    codes, printed = train(output, "plain", "ddp", env, **flags)
    assert codes == [EXIT_STOPPED] * 2 and "stopped by SIGTERM after step 8:" in printed, printed
    codes, printed = train(output, "plain", "ddp", **flags)
    assert codes == [0, 0] and (output / "model.safetensors").is_file(), printed


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["single"]))
def test_a_second_interrupt_ends_the_run_at_once(example, train, kind):
    output = example.folder / f"twice-{kind}"
    env = {"DIE_AT": "micro 4.1", "DIE_BY": "SIGINT", "DIE_TIMES": "2"}
    codes, printed = train(output, "plain", kind, env)
    assert 130 in codes and "exiting immediately" in printed
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3"]


def test_a_signal_before_training_ends_the_run_at_once(example, forks):
    words = example.words(example.folder / "early", logging_steps=2)
    codes, printed = forks.run(words, DIE_AT="creating", DIE_BY="SIGTERM")
    assert codes == [EXIT_STOPPED] and "before training began" in printed, printed


def test_auto_resume_starts_over_and_names_the_skipped_checkpoints(example, train, whole):
    reference = whole("plain", "single")
    output = example.folder / "passed-over"
    shutil.copytree(reference / "checkpoint-3", output / "checkpoint-3")
    for step, spoil in {6: "optimizer.pt", 9: "manifest.json"}.items():
        shutil.copytree(reference / f"checkpoint-{step}", output / f"checkpoint-{step}")
        os.truncate(output / f"checkpoint-{step}" / spoil, 100)
    codes, printed = train(output, "plain", "single")
    assert codes == [0], printed
    assert "checkpoint-6: not complete, optimizer.pt has 100 of" in printed
    assert "checkpoint-9: not complete, its manifest.json cannot be read" in printed
    assert_same(output, reference)


def test_resuming_a_finished_run_trains_nothing(example, train, whole):
    output = example.folder / "finished"
    shutil.copytree(whole("plain", "single"), output)
    codes, printed = train(output, "plain", "single")
    assert codes == [0], printed
    assert_same(output, whole("plain", "single"))
