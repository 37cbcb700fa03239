"""Checkpoint folders: completeness, rotation and ownership."""

import json
import os
import stat
from pathlib import Path

import pytest

from dft.errors import UserError
from dft.training.checkpoints.folder import (
    MANIFEST,
    IncompleteCheckpoint,
    newest_checkpoint,
    open_checkpoint,
    publish,
    remove,
    rotate,
    seal,
    unfinished,
    unfinished_folders,
)
from dft.training.checkpoints.resume_point import check_owner, finish_renaming


def write(
    output: Path, step: int, *, resumable: bool = True, text: str = "weights", name: bool = True
) -> Path:
    folder = output / f"checkpoint-{step}"
    staged = unfinished(folder)
    (staged / "deep").mkdir(parents=True)
    (staged / "model.safetensors").write_text(text)
    (staged / "deep" / "optimizer.pt").write_text("moments")
    facts = {"step": step, "resumable": resumable, "ranks": 1, "rows_per_step": 8}
    seal(staged, {**facts, "parallelism": "single process", "order": {}, "model": "m"})
    if name:
        publish(folder)
    return folder


def steps(output: Path) -> list[int]:
    return sorted(int(path.name.split("-")[-1]) for path in output.glob("checkpoint-*"))


def test_a_checkpoint_is_renamed_once_it_is_complete(tmp_path):
    folder = write(tmp_path, 3, name=False)
    assert not folder.exists() and newest_checkpoint(tmp_path)[0] is None
    publish(folder)
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.path, passed_over) == (3, folder, [])
    assert json.loads((folder / MANIFEST).read_text())["files"] == {
        "deep/optimizer.pt": 7,
        "model.safetensors": 7,
    }


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 3), "model.safetensors has 3 of 7 bytes"),
        (lambda folder: (folder / "deep/optimizer.pt").unlink(), "it has no deep/optimizer.pt"),
        (lambda folder: (folder / MANIFEST).unlink(), f"it has no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"its {MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"its {MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {}}'), f"its {MANIFEST} does not contain"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"../x": 1}}'), "it has no ../x"),
    ],
)
def test_an_incomplete_checkpoint_is_skipped_for_an_earlier_one(tmp_path, spoil, reason):
    write(tmp_path, 3)
    folder = write(tmp_path, 6)
    spoil(folder)
    with pytest.raises(IncompleteCheckpoint, match=reason):
        open_checkpoint(folder)
    checkpoint, (line,) = newest_checkpoint(tmp_path)
    assert checkpoint.step == 3 and str(folder) in line and reason in line


def test_a_checkpoint_of_the_model_alone_cannot_be_resumed(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 6, resumable=False)
    checkpoint, (line,) = newest_checkpoint(tmp_path)
    assert checkpoint.step == 3 and "holds the model alone" in line
    assert newest_checkpoint(tmp_path, resumable=False)[0].step == 6


def test_a_rewritten_checkpoint_replaces_the_old_one(tmp_path):
    write(tmp_path, 3, text="before")
    folder = write(tmp_path, 3, text="after")
    assert (folder / "model.safetensors").read_text() == "after" and not unfinished_folders(tmp_path)


def test_only_sealed_checkpoints_are_renamed_later(tmp_path):
    write(tmp_path, 3, name=False)
    half = unfinished(tmp_path / "checkpoint-6")
    half.mkdir()
    (half / "model.safetensors").write_text("wei")
    finish_renaming(tmp_path)
    checkpoint, (line,) = newest_checkpoint(tmp_path)
    assert checkpoint.step == 3 and str(half) in line and "was not completely written" in line


@pytest.mark.parametrize(
    ("limit", "best", "remaining"),
    [
        (None, None, [1, 2, 10, 20]),
        (2, None, [10, 20]),
        (1, None, [20]),
        (1, 2, [2, 20]),
        (2, 2, [2, 20]),
        (3, 2, [2, 10, 20]),
        (9, None, [1, 2, 10, 20]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, remaining):
    for step in (1, 2, 10, 20):
        write(tmp_path, step)
    rotate(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert steps(tmp_path) == remaining


def test_an_interrupted_removal_leaves_no_folder_named_like_a_checkpoint(tmp_path, monkeypatch):
    folder = write(tmp_path, 3)

    def cut_short(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("dft.training.checkpoints.folder.shutil.rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    assert not folder.exists() and unfinished_folders(tmp_path)


def test_a_checkpoint_is_not_writable_by_others(tmp_path):
    before = os.umask(0o002)  # as on systems where all users of a group share files
    try:
        folder = write(tmp_path, 3)
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
    check_owner(folder, trusted=False)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda folder: folder.chmod(0o777), "can be written by others"),
        (lambda folder: (folder / "deep/optimizer.pt").chmod(0o664), "can be written by others"),
        (lambda folder: os.chown(folder, 12345, -1), "belongs to user 12345"),
        (lambda folder: os.chown(folder / "deep/optimizer.pt", 12345, -1), "belongs to user 12345"),
    ],
)
def test_a_checkpoint_that_others_could_have_changed_is_rejected(tmp_path, spoil, fault):
    folder = write(tmp_path, 3)
    try:
        spoil(folder)
    except PermissionError:
        pytest.skip("may not give files away here")
    with pytest.raises(UserError, match=f"{fault}.*--trust_checkpoint True"):
        check_owner(folder, trusted=False)
    check_owner(folder, trusted=True)
