"""Which folders are runs, and the state of each: starting, running, ended or crashed."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

import pytest

from dft.report import live_runs
from dft.report.live_runs import FRESH, State, exceeds_search, find_runs, fingerprint, key_of, load_run
from dft.report.log_file import LOG
from dft.report.saved_report import RUN_REPORT, load_report
from dft.training.checkpoints.output_lock import LOCK_FILE
from tests.report.reports import eval_record, run_report, train_record

LONG_AGO = time.time() - 10 * FRESH


def save_run(folder: Path, status: str = "running", steps: int = 3, machine: str | None = None) -> Path:
    """Save a run whose report is of its start, with a log of some steps and an incomplete line."""
    folder.mkdir(parents=True)
    log = [eval_record(0), *(train_record(step) for step in range(1, steps + 1))]
    done = 0 if status == "running" else steps
    report = run_report(
        name=folder.name, status=status, log=log[: done + 1], steps={"done": done, "total": 10}
    )
    (folder / RUN_REPORT).write_text(json.dumps(report))
    (folder / LOG).write_text("".join(json.dumps(record) + "\n" for record in log) + '{"step": 9, "los')
    (folder / LOCK_FILE).write_text(json.dumps({"process": 1, "machine": machine or socket.gethostname()}))
    os.utime(folder / LOCK_FILE, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def lock():
    """Lock a folder as a run does, until the end of the test."""
    handles = []

    def hold(folder: Path) -> Path:
        handles.append(os.open(folder / LOCK_FILE, os.O_RDONLY))
        fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder

    yield hold
    for handle in handles:
        os.close(handle)


def age(folder: Path, *names: str) -> None:
    for name in names:
        os.utime(folder / name, (LONG_AGO - 1, LONG_AGO - 1))


def test_a_running_run_shows_the_log_up_to_the_last_complete_line(tmp_path, lock):
    run = load_run(lock(save_run(tmp_path / "run")))
    assert run.state is State.RUNNING and run.report["status"] == "running"
    assert [record["step"] for record in run.report["log"]] == [0, 1, 2, 3]
    assert run.report["steps"] == {"done": 3, "total": 10} and run.report["method"] == "DFT"


def test_a_run_whose_process_is_gone_is_marked_as_crashed(tmp_path):
    run = load_run(save_run(tmp_path / "run"))
    assert run.state is State.LOST and len(run.report["log"]) == 4
    assert run.report["status"].startswith("crashed or killed: it has not finished, and no process")


@pytest.mark.parametrize("status", ["finished", "stopped by SIGTERM after step 3", "stopped: NaN"])
def test_a_run_that_ended_has_the_status_of_its_report(tmp_path, status):
    run = load_run(save_run(tmp_path / "run", status))
    assert run.state is State.ENDED and run.report["status"] == status


def test_a_run_of_another_machine_counts_as_running_while_it_is_updated(tmp_path, monkeypatch):
    folder = save_run(tmp_path / "run", machine="elsewhere")
    assert load_run(folder).state is State.RUNNING
    before = fingerprint(folder)
    age(folder, RUN_REPORT, LOG, LOCK_FILE)
    monkeypatch.setattr("dft.report.live_runs.time.time", lambda: LONG_AGO + 5999)
    assert load_run(folder).state is State.LOST and fingerprint(folder) != before
    assert load_run(folder).report["status"].endswith("had no update for 1:40:00")


def test_a_run_that_starts_again_in_its_folder_says_that_it_shows_earlier_values(tmp_path, lock):
    folder = save_run(tmp_path / "run", "finished")
    age(folder, RUN_REPORT, LOG)
    run = load_run(lock(folder))
    assert run.state is State.STARTING
    assert run.report["status"] == "starting; what is shown here was there before" and run.report["log"]


def test_a_run_without_report_is_read_from_its_log_and_not_from_an_earlier_report(tmp_path, lock):
    folder = save_run(tmp_path / "run")
    age(folder, RUN_REPORT)
    (folder / "run_args.yaml").write_text("run_name: second\ndft_alpha: 0.0\n")
    run = load_run(lock(folder))
    assert (run.state, run.report["name"], run.report["method"]) == (State.RUNNING, "second", "SFT")
    assert len(run.report["log"]) == 4


def test_a_new_run_is_listed_before_it_has_logged_anything(tmp_path, lock):
    folder = tmp_path / "runs/new"
    folder.mkdir(parents=True)
    (folder / LOCK_FILE).write_text("{}")
    assert find_runs([tmp_path]) == []
    lock(folder)
    assert find_runs([tmp_path]) == [folder]
    assert load_run(folder).state is State.STARTING and load_run(folder).report["name"] == "new"


def test_a_broken_run_has_the_error_as_its_status(tmp_path):
    folder = save_run(tmp_path / "run")
    (folder / RUN_REPORT).write_text('{"log": [')
    run = load_run(folder)
    assert run.state is State.UNREADABLE and run.report["log"] == [] and run.report["name"] == "run"
    assert run.report["status"].startswith(f"cannot be read: {folder}/report.json: broken JSON")


def test_runs_are_found_two_levels_deep_and_not_inside_of_runs(tmp_path):
    runs = [save_run(tmp_path / name) for name in ("a", "study/b", "study/.hidden", "x/y/too_deep")]
    (tmp_path / "a/checkpoint-2").mkdir()
    (tmp_path / "a/checkpoint-2/trainer_state.json").write_text("{}")
    (tmp_path / "old/checkpoint-7").mkdir(parents=True)
    assert find_runs([tmp_path]) == [runs[0], tmp_path / "old", runs[1]]
    assert find_runs([tmp_path, runs[1], runs[3]]) == [runs[0], tmp_path / "old", runs[1], runs[3]]
    assert find_runs([tmp_path / "nowhere"]) == []


def test_folders_beyond_the_limit_are_not_searched(tmp_path, monkeypatch):
    folders = [save_run(tmp_path / name) for name in ("a", "b", "c")]
    assert find_runs([tmp_path]) == folders and not exceeds_search([tmp_path])
    monkeypatch.setattr(live_runs, "MAX_FOLDERS", 4)  # the folder itself counts
    assert find_runs([tmp_path]) == folders and not exceeds_search([tmp_path])
    monkeypatch.setattr(live_runs, "MAX_FOLDERS", 3)
    assert find_runs([tmp_path]) == folders[:2] and exceeds_search([tmp_path])


def test_keys_differ_and_fingerprints_change_with_the_files(tmp_path):
    first, second = (save_run(tmp_path / name) for name in ("a", "b"))
    assert key_of(first) != key_of(second)
    before = fingerprint(first)
    assert fingerprint(first) == before
    with open(first / LOG, "a") as stream:
        stream.write("\n")
    after = fingerprint(first)
    assert after != before
    (first / "checkpoint-2").mkdir()
    assert fingerprint(first) != after


def test_the_report_of_an_interrupted_run_has_all_that_was_logged(tmp_path):
    folder = save_run(tmp_path / "run")
    assert [record["step"] for record in load_report(folder)["log"]] == [0, 1, 2, 3]
    (folder / RUN_REPORT).unlink()
    report = load_report(folder)
    assert len(report["log"]) == 4 and report["status"] == f"unknown: read from {folder / LOG}"
    state = {"log_history": [train_record(1)], "global_step": 1, "max_steps": 10}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    report = load_report(folder)
    assert len(report["log"]) == 4 and report["steps"] == {"done": 3, "total": 10}
