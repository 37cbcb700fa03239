"""Full, read-only and missing disks: one error, and earlier checkpoints are kept."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dft.errors import EXIT_USER_ERROR
from dft.training.checkpoints.folder import newest_checkpoint
from dft.training.checkpoints.output_lock import LOCK_FILE, lock_output_dir
from tests.launching import ROOT
from tests.reliability.selecting import mostly_slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB; a checkpoint of the example takes 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def words(example, output: Path, ranks: int = 1, **flags) -> list[str]:
    more = {"deepspeed": ROOT / "ds_config/zero3.json", "use_cpu": True} if ranks > 1 else {}
    settings = {
        "save_strategy": "steps", "save_steps": 2, "max_steps": 8, "per_device_train_batch_size": 16,
        "logging_steps": 2, "resume_from_checkpoint": "auto", "save_total_limit": 2, **more, **flags,
    }  # fmt: skip
    return example.words(output, **settings)


FAULTS = {
    "FULL": "checkpoint-4 cannot be saved: no space left on the device",
    "READ_ONLY": "checkpoint-4 cannot be saved: Read-only file system",
    "GONE": "it no longer exists, so checkpoint-4 cannot be saved",
}


@pytest.mark.parametrize(
    ("fault", "ranks"),
    mostly_slow(
        [(fault, ranks) for fault in FAULTS for ranks in (1, 2)], [("FULL", 1), ("READ_ONLY", 1), ("GONE", 1)]
    ),
)
def test_a_disk_that_fails_during_training(example, forks, disk, fault, ranks):
    output = disk / "run"
    at = str(disk if fault != "GONE" else output)
    env = {"DIE_AT": "step 3", "DIE_BY": fault, "DISK": at, "DIE_RANK": "0"}
    codes, printed = forks.run(words(example, output, ranks), ranks, **env)
    assert codes[0] == EXIT_USER_ERROR and all(codes), printed
    assert printed.count("error:") == 1 and FAULTS[fault] in printed and "Traceback" not in printed
    if fault == "READ_ONLY":
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    if fault == "FULL":
        (disk / "ballast").unlink()
    if fault == "GONE":
        Path(f"{output}.gone").rename(output)
    newest, _ = newest_checkpoint(output)
    assert newest is not None and newest.step == 2 and not list(output.glob("incomplete-*/*.safetensors"))
    codes, printed = forks.run(words(example, output, ranks), ranks)
    assert not any(codes), printed


def test_a_disk_that_is_full_when_the_final_model_is_written(example, forks, disk):
    env = {"DIE_AT": "step 8", "DIE_BY": "FULL", "DISK": str(disk)}
    (code,), printed = forks.run(words(example, disk / "run", save_steps=100), **env)
    assert (
        code == EXIT_USER_ERROR and "cannot be saved: no space left" in printed and "Traceback" not in printed
    )


def test_a_disk_that_is_too_small_is_an_error_before_training(example, forks, disk):
    flags = {"save_steps": 1, "save_total_limit": None}
    (code,), printed = forks.run(words(example, disk / "run", **flags))
    assert code == EXIT_USER_ERROR, printed
    assert "8 checkpoints of 0.01 GiB and a model of 0.00 GiB will not fit, with 0.04 GiB free" in printed
    assert "--save_total_limit" in printed and "train step" not in printed


def test_a_read_only_output_directory_is_an_error_at_the_start(example, forks, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    (code,), printed = forks.run(words(example, disk / "run"))
    assert code == EXIT_USER_ERROR and "--output_dir" in printed and "Read-only file system" in printed
    assert "train " not in printed


def test_old_checkpoints_are_removed_only_after_a_newer_one_is_complete(example, forks):
    """With --save_total_limit 1, a save that fails keeps the earlier checkpoint."""
    output = example.folder / "one-kept"
    env = {"DIE_AT": "saving 4 optimizer"}
    forks.run(words(example, output, save_total_limit=1), **env)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    (code,), printed = forks.run(words(example, output, save_total_limit=1))
    assert code == 0, printed
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-8"]
    shutil.rmtree(output)


@pytest.mark.parametrize("ranks", mostly_slow([1, 2], [2]))
def test_a_folder_that_a_live_run_writes_to_is_refused_on_every_rank(example, forks, tmp_path, ranks):
    output = tmp_path / "run"
    output.mkdir()
    lock_output_dir(output)  # by this process
    flags = {"max_steps": 1, "use_cpu": True, "data_cache_dir": tmp_path / "cache"}
    codes, printed = forks.run(example.words(output, **flags), ranks)
    assert codes[0] == EXIT_USER_ERROR and all(codes), printed
    assert printed.count("error:") == 1, printed
    assert f"another run is writing to it (process {os.getpid()} on " in printed
    assert [path.name for path in output.iterdir()] == [LOCK_FILE]
    codes, printed = forks.run(example.words(output, plan=True, **flags))
    assert codes == [0], printed  # a plan writes nothing
