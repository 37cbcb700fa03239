"""Uploads to a stand-in hub that run while training continues."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from huggingface_hub.utils import filter_repo_objects
from transformers.trainer_utils import HubStrategy

from dft.errors import UserError
from dft.training.checkpoints.folder import rotate
from dft.training.checkpoints.hub import HubPublisher
from dft.training.checkpoints.writer import model_files
from dft.training.parallel import waiting


class StandInHub:
    """Takes uploads in a thread, as `HfApi` does, and finishes them when `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.error: Exception | None = None
        self.commits: list[tuple[str, list[str]]] = []
        self.is_running = False
        self._pool = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._pool.shutdown()

    def upload_folder(self, *, run_as_future: bool, **options: Any) -> Future[None]:
        assert run_as_future
        return self._pool.submit(self._commit, **options)

    def _commit(
        self,
        repo_id: str,
        folder_path: Path,
        commit_message: str,
        token: str | None,
        revision: str | None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        path_in_repo: str = "",
    ) -> None:
        self.is_running = True
        assert self.release.wait(60)
        if self.error is not None:
            raise self.error
        files = [
            path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()
        ]
        selected = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.commits.append((commit_message, sorted(f"{path_in_repo}{name}" for name in selected)))


@pytest.fixture
def hub():
    hub = StandInHub()
    yield hub
    hub.release.set()


def make_publisher(hub: StandInHub, **options: Any) -> HubPublisher:
    publisher = HubPublisher(hub, **options)
    publisher.repo_id = "someone/run"
    return publisher


def make_checkpoint(folder: Path) -> Path:
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "additional_chat_templates/tools.jinja"):
        (folder / name).write_text(name)
    return folder


def test_an_upload_does_not_block_and_its_checkpoint_is_not_rotated(tmp_path, hub):
    publisher = make_publisher(hub)
    first = make_checkpoint(tmp_path / "checkpoint-1")
    publisher.push_checkpoint(first, 1)
    assert publisher.is_uploading() and publisher.is_uploading(first) and not hub.commits
    for step in (2, 3):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, 1, None, publisher.folders_in_use())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    hub.release.set()
    publisher.finish(Accelerator(cpu=True), lambda: None)
    rotate(tmp_path, 1, None, publisher.folders_in_use())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_folder_in_use_does_not_take_the_place_of_another_checkpoint(tmp_path):
    folders = [make_checkpoint(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    rotate(tmp_path, 2, None, {folders[0]})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "3", "4"]


def test_the_last_checkpoint_is_pushed_while_another_upload_runs(tmp_path, hub):
    publisher = make_publisher(hub)
    for step in (1, 2, 3):
        publisher.push_checkpoint(make_checkpoint(tmp_path / f"checkpoint-{step}"), step, is_last=step == 3)
    hub.release.set()
    publisher.finish(Accelerator(cpu=True), lambda: None)
    assert [message[-1] for message, _ in hub.commits] == ["1", "3"]


@pytest.mark.parametrize("error", [RuntimeError("Error while uploading"), ValueError("no such folder")])
def test_every_error_of_an_upload_is_a_warning(tmp_path, hub, capsys, error):
    hub.error = error
    hub.release.set()
    publisher = make_publisher(hub)
    publisher.push_checkpoint(make_checkpoint(tmp_path / "checkpoint-1"), 1)
    publisher.finish(Accelerator(cpu=True), lambda: None)
    assert f"checkpoint-1 was not pushed: {type(error).__name__}: {error}" in capsys.readouterr().out


def test_uploads_are_abandoned_after_an_error(tmp_path, hub, capsys):
    publisher = make_publisher(hub, always_push=True)
    for step in (1, 2):
        publisher.push_checkpoint(make_checkpoint(tmp_path / f"checkpoint-{step}"), step)
    while not hub.is_running:
        pass
    publisher.abandon()
    printed = capsys.readouterr().out
    assert f"waiting for the push of {tmp_path / 'checkpoint-1'}" in printed
    assert f"{tmp_path / 'checkpoint-2'} is not pushed, because the run ended with an error" in printed
    hub.release.set()
    hub.close()
    assert [message for message, _ in hub.commits] == ["Training in progress, step 1"]


def test_waiting_reports_progress_to_the_watchdog(tmp_path, hub, monkeypatch):
    """Waiting longer than the watchdog's timeout must not look like a hung rank."""
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 4:
            hub.release.set()

    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    publisher = make_publisher(hub)
    publisher.push_checkpoint(make_checkpoint(tmp_path / "checkpoint-1"), 1)
    publisher.finish(Accelerator(cpu=True), beat)
    assert beats >= 4 and [message for message, _ in hub.commits] == ["Training in progress, step 1"]


@pytest.mark.parametrize("always", [False, True])
def test_a_push_is_skipped_while_another_runs_unless_always_push(tmp_path, hub, capsys, always):
    publisher = make_publisher(hub, always_push=always)
    for step in (1, 2):
        publisher.push_checkpoint(make_checkpoint(tmp_path / f"checkpoint-{step}"), step)
    hub.release.set()
    publisher.finish(Accelerator(cpu=True), lambda: None)
    messages = [message for message, _ in hub.commits]
    assert messages == [f"Training in progress, step {step}" for step in ((1, 2) if always else (1,))]
    assert (
        "checkpoint-2 is not pushed: the previous push is still running" in capsys.readouterr().out
    ) != always


def test_sub_folders_are_pushed_and_files_for_resuming_only_with_checkpoints(tmp_path, hub):
    hub.release.set()
    publisher = make_publisher(hub, strategy=HubStrategy.CHECKPOINT)
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    publisher.push_checkpoint(folder, 1)
    publisher.push_model(folder, model_files(folder), "Model save")
    publisher.finish(Accelerator(cpu=True), lambda: None)
    model = ["additional_chat_templates/tools.jinja", "model.safetensors"]
    every = sorted([*model, "optimizer.pt"])
    assert hub.commits == [
        ("Training in progress, step 1", model),
        ("Training in progress, step 1, checkpoint", [f"last-checkpoint{name}" for name in every]),
        ("Model save", every),
    ]


def test_a_failed_checkpoint_is_a_warning_and_a_failed_model_an_error(tmp_path, hub, capsys):
    hub.error = ConnectionError("no route to the hub")
    hub.release.set()
    publisher = make_publisher(hub)
    publisher.push_checkpoint(make_checkpoint(tmp_path / "checkpoint-1"), 1)
    publisher.finish(Accelerator(cpu=True), lambda: None)
    assert "checkpoint-1 was not pushed: ConnectionError: no route to the hub" in capsys.readouterr().out
    publisher.push_model(tmp_path, ["model.safetensors"], "Model save")
    with pytest.raises(UserError, match="someone/run cannot be pushed: ConnectionError: no route"):
        publisher.finish(Accelerator(cpu=True), lambda: None)
    publisher.finish(Accelerator(cpu=True), lambda: None)  # the failure has been reported


def test_nothing_is_pushed_during_training_with_the_strategy_end(tmp_path, hub):
    publisher = make_publisher(hub, strategy=HubStrategy.END)
    publisher.push_checkpoint(make_checkpoint(tmp_path / "checkpoint-1"), 1)
    assert not publisher.is_uploading()
