"""Records and histograms for trackers, and a setup in which no tracker stops a run."""

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
from dft.training.measuring.tracker_callbacks import SwanLabRunCallback
from dft.training.measuring.tracker_runs import TrackerRuns
from dft.training.measuring.tracker_setup import prepare_trackers, set_offline_without_login
from dft.training.measuring.trackers import (
    HistogramCallback,
    RunRecordCallback,
    flatten_record,
    truncate_record,
)

COUNTS = [*range(1, 20), 40]
HOST = "machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n"


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """Use a home directory without a login, and clear the variables of all trackers."""
    for name in (
        "SWANLAB_MODE",
        "SWANLAB_API_KEY",
        "SWANLAB_PROJECT",
        "SWANLAB_PROJECT_NAME",
        "SWANLAB_LOG_DIR",
        "MLFLOW_TRACKING_URI",
        "TENSORBOARD_LOGGING_DIR",
        "TRACKIO_DIR",
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_DIR",
        "WANDB_QUIET",
        "WANDB_IDENTITY_TOKEN_FILE",
    ):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(tracker: str) -> str | None:
    return os.environ.get(f"{tracker.upper()}_MODE")


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_trackers_without_a_login_are_set_offline(no_login, tracker):
    (note,) = set_offline_without_login([tracker])
    assert note.startswith(f"{tracker}: no login") and mode(tracker) == "offline"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_a_configured_mode_is_kept(no_login, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "disabled")
    assert set_offline_without_login([tracker]) == [] and mode(tracker) == "disabled"


@pytest.mark.parametrize("tracker", ["swanlab", "wandb"])
def test_key_in_the_environment_counts_as_login(no_login, monkeypatch, tracker):
    monkeypatch.setenv(f"{tracker.upper()}_API_KEY", "0" * 40)
    assert set_offline_without_login([tracker]) == [] and mode(tracker) is None


def test_wandb_login_on_disk_counts(no_login):
    (no_login / ".netrc").write_text(HOST)
    (no_login / ".netrc").chmod(0o600)
    assert set_offline_without_login(["wandb"]) == [] and mode("wandb") is None


def test_other_trackers_are_not_touched(no_login):
    assert set_offline_without_login(["tensorboard"]) == []
    assert mode("swanlab") is None and mode("wandb") is None


def test_logging_dir_is_set_for_all_trackers(no_login):
    prepare_trackers(["tensorboard"], "logs/run")
    for name in ("TENSORBOARD_LOGGING_DIR", "SWANLAB_LOG_DIR", "WANDB_DIR", "TRACKIO_DIR"):
        assert os.environ[name] == str(no_login / "logs/run")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{no_login}/logs/run/mlflow.db"
    assert (no_login / "logs/run").is_dir()
    prepare_trackers(["tensorboard"], "logs/other")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{no_login}/logs/run/mlflow.db"  # it is set
    (no_login / "file").touch()
    with pytest.raises(UserError, match="--logging_dir file/run: cannot be created .Not a directory"):
        prepare_trackers(["tensorboard"], "file/run")


def test_environment_is_unchanged_without_a_tracker(no_login):
    assert prepare_trackers([], "logs") == []
    assert "WANDB_DIR" not in os.environ and not (no_login / "logs").exists()


def test_swanlab_project_variable_of_transformers_works(no_login, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    set_offline_without_login(["swanlab"])
    assert swanlab.Settings().project.name == "mine"


def test_invalid_swanlab_project_name_is_an_error(no_login, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "my project")
    with pytest.raises(UserError, match="SWANLAB_PROJECT 'my project': .* 100 letters"):
        set_offline_without_login(["swanlab"])


@pytest.mark.parametrize(("folder", "name"), [("my project", "my-project"), ("plain", None)])
def test_swanlab_project_name_is_derived_from_any_folder_name(no_login, monkeypatch, folder, name):
    (no_login / folder).mkdir()
    monkeypatch.chdir(no_login / folder)
    set_offline_without_login(["swanlab"])
    assert swanlab.Settings().project.name == name


def test_swanlab_local_mode_without_its_dashboard_is_an_error(no_login, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "local")
    assert prepare_trackers(["swanlab"]) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'swanlab\[dashboard\]'"):
        prepare_trackers(["swanlab"])


def test_truncate_record_shortens_lists_and_texts():
    files = [{"file": f"{n}.jsonl"} for n in range(1050)]
    cut = truncate_record({"data": {"files": files, "few": [1, 2]}, "text": "x" * 2100})
    assert cut["data"]["files"] == [*files[:50], "... and 1,000 more"]
    assert cut["data"]["few"] == [1, 2]
    assert cut["text"] == "x" * 2000 + "... and 100 more characters"


def test_flatten_record_leaves_no_dictionaries():
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
    """On ranks other than the first, the trackers' callbacks have not started anything."""
    handler = SimpleNamespace(callbacks=[TensorBoardCallback(), SwanLabRunCallback(TrackerRuns())])
    state = TrainerState(is_world_process_zero=False)
    RunRecordCallback({"data": {}}, handler).on_train_begin(None, state, None)
    HistogramCallback(handler).on_evaluate(None, state, None, metrics={"eval_p_histogram": COUNTS})
    assert not swanlab.has_run()


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"])
def test_unknown_mode_is_an_error(tracker, monkeypatch):
    monkeypatch.setenv(f"{tracker.upper()}_MODE", "foo")
    with pytest.raises(
        UserError, match=f"{tracker.upper()}_MODE 'foo': not a mode of {tracker}; use online, "
    ):
        prepare_trackers([tracker])
