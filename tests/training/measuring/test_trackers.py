"""What trackers are told beside metrics, and that none of them stops a run with a question or an error."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import swanlab
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback

from dft.errors import UserError
from dft.training.measuring.trackers import (
    HistogramCallback,
    RunRecordCallback,
    SwanLabRunCallback,
    flatten_record,
    prepare_trackers,
    set_offline_without_login,
    truncate_record,
)

COUNTS = [*range(1, 20), 40]
HOST = "machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n"


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A home directory without a login, and no variable of a tracker."""
    for name in (
        "SWANLAB_MODE",
        "SWANLAB_API_KEY",
        "SWANLAB_PROJECT",
        "SWANLAB_PROJECT_NAME",
        "SWANLAB_LOG_DIR",
        "TENSORBOARD_LOGGING_DIR",
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_DIR",
        "WANDB_QUIET",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(tracker: str) -> str | None:
    return os.environ.get(f"{tracker.upper()}_MODE")


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_without_a_login_it_goes_offline(nobody, tracker):
    (note,) = set_offline_without_login([tracker])
    assert note.startswith(f"{tracker}: no login") and mode(tracker) == "offline"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_a_mode_is_left_alone(nobody, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "disabled")
    assert set_offline_without_login([tracker]) == [] and mode(tracker) == "disabled"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_a_key_in_the_environment_is_a_login(nobody, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_API_KEY", "0" * 40)
    assert set_offline_without_login([tracker]) == [] and mode(tracker) is None


def test_a_wandb_login_on_disk_is_found(nobody):
    (nobody / ".netrc").write_text(HOST)
    (nobody / ".netrc").chmod(0o600)
    assert set_offline_without_login(["wandb"]) == [] and mode("wandb") is None


def test_a_tracker_that_is_not_asked_for_is_not_touched(nobody):
    assert set_offline_without_login(["tensorboard"]) == []
    assert mode("swanlab") is None and mode("wandb") is None


def test_all_write_into_the_folder_that_was_given(nobody):
    prepare_trackers(["tensorboard"], "logs/run")
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR"):
        assert os.environ[name] == str(nobody / "logs/run")
    assert (nobody / "logs/run").is_dir()
    (nobody / "file").touch()
    with pytest.raises(UserError, match="--logging_dir file/run: cannot be made .Not a directory"):
        prepare_trackers(["tensorboard"], "file/run")


def test_without_a_tracker_nothing_is_set(nobody):
    assert prepare_trackers([], "logs") == []
    assert "WANDB_DIR" not in os.environ and not (nobody / "logs").exists()


# ---- SwanLab's own ----


def test_the_variable_that_transformers_has_for_the_project_works(nobody, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    set_offline_without_login(["swanlab"])
    assert swanlab.Settings().project.name == "mine"


def test_a_name_that_swanlab_refuses_is_an_error(nobody, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "my project")
    with pytest.raises(UserError, match="SWANLAB_PROJECT 'my project': .* 100 letters"):
        set_offline_without_login(["swanlab"])


@pytest.mark.parametrize(("folder", "name"), [("my project", "my-project"), ("plain", None)])
def test_a_folder_of_any_name_will_do(nobody, monkeypatch, folder, name):
    (nobody / folder).mkdir()
    monkeypatch.chdir(nobody / folder)
    set_offline_without_login(["swanlab"])
    assert swanlab.Settings().project.name == name


def test_local_mode_without_its_dashboard_is_an_error(nobody, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "local")
    assert prepare_trackers(["swanlab"]) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'swanlab\[dashboard\]'"):
        prepare_trackers(["swanlab"])


# ---- the record and the histogram ----


def test_long_lists_and_texts_are_cut():
    files = [{"file": f"{n}.jsonl"} for n in range(1050)]
    cut = truncate_record({"data": {"files": files, "few": [1, 2]}, "text": "x" * 2100})
    assert cut["data"]["files"] == [*files[:50], "... and 1,000 more"]
    assert cut["data"]["few"] == [1, 2]
    assert cut["text"] == "x" * 2000 + "... and 100 more characters"


def test_swanlab_gets_no_dictionaries():
    record = {
        "data": {"train": {"tokens": 9, "files": [{"file": "a"}], "empty": {}}, "names": ["a"], "seed": None}
    }
    assert flatten_record(record) == {
        "data/train/tokens": 9,
        "data/train/files": '[{"file": "a"}]',
        "data/names": ["a"],
        "data/seed": "none",
    }


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


@pytest.mark.parametrize(("prefix", "tag"), [("eval", "eval/p_histogram"), ("eval_b", "eval/b_p_histogram")])
def test_tensorboard_shows_the_histogram(tmp_path, prefix, tag):
    handler = SimpleNamespace(callbacks=[TensorBoardCallback(SummaryWriter(str(tmp_path)))])
    metrics = {f"{prefix}_p_histogram": COUNTS, f"{prefix}_loss": 1.0}
    HistogramCallback(handler).on_evaluate(None, TrainerState(global_step=7), None, metrics=metrics)
    events = read_events(tmp_path)
    assert events.Tags()["histograms"] == [tag]
    (event,) = events.Histograms(tag)
    shown = event.histogram_value
    assert event.step == 7 and shown.bucket == COUNTS and shown.num == sum(COUNTS)
    assert (shown.min, shown.max, shown.bucket_limit[0]) == (0, 1, 0.05)
    middles = [(n + 0.5) / 20 for n in range(20)]
    assert shown.sum == pytest.approx(sum(m * count for m, count in zip(middles, COUNTS, strict=True)))


def test_tensorboard_shows_the_record(tmp_path):
    handler = SimpleNamespace(callbacks=[TensorBoardCallback(SummaryWriter(str(tmp_path)))])
    record = {"environment": {"git_commit": "abc"}, "data": {"files": [*range(60)]}}
    RunRecordCallback(record, handler).on_train_begin(None, TrainerState(), None)
    (event,) = read_events(tmp_path).Tensors("run/data/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert json.loads(text.strip("`").removeprefix("json"))["files"][-1] == "... and 10 more"


def test_ranks_without_a_tracker_send_nothing(tmp_path):
    """Their callbacks have begun no run and made no writer."""
    handler = SimpleNamespace(callbacks=[TensorBoardCallback(), SwanLabRunCallback()])
    state = TrainerState(is_world_process_zero=False)
    RunRecordCallback({"data": {}}, handler).on_train_begin(None, state, None)
    HistogramCallback(handler).on_evaluate(None, state, None, metrics={"eval_p_histogram": COUNTS})
    assert not swanlab.has_run()


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_a_mode_that_a_tracker_does_not_know_is_one_error(tracker, monkeypatch):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "foo")
    with pytest.raises(UserError, match=f"{tracker.upper()}_MODE 'foo': {tracker} knows online, "):
        prepare_trackers([tracker])
