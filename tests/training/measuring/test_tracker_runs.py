"""Runs of trackers that a resumed run continues, names that mlflow accepts, and artifacts."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import sqlalchemy
import swanlab
import wandb
from transformers import TrainerState, TrainingArguments

from dft.arguments.trackers import artifact_notes, check_trackers
from dft.errors import UserError
from dft.training.measuring.artifacts import log_artifacts
from dft.training.measuring.tracker_callbacks import (
    MLFLOW_NAME,
    MLflowRunCallback,
    SwanLabRunCallback,
    WandbRunCallback,
    finish_trackers,
    mlflow_name,
)
from dft.training.measuring.tracker_runs import RUNS_FILE, TrackerRuns
from dft.training.measuring.tracker_setup import check_mlflow_server, prepare_trackers
from dft.training.measuring.trackers import MLFLOW_CHARACTERS, RunRecordCallback
from dft.training.run import prepare_run
from dft.training.run_options import RunOptions
from dft.training.trainer import DFTTrainer
from tests.launching import free_port
from tests.training.model.loading_helpers import arguments
from tests.training.test_trainer import conversations, tiny, trainer

TOKEN = "hf_" + "s3cret" * 6


def skip_disk(connection, record) -> None:
    """Let a database not wait for the disk, which takes most of the time of its many small transactions."""
    connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    """A database of mlflow; each test has an experiment of its own."""
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", skip_disk)
    yield f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", skip_disk)


@pytest.fixture
def local(tmp_path, store, monkeypatch):
    """A folder for the local files of all trackers, without a login and without a network."""
    monkeypatch.chdir(tmp_path)  # mlflow stores artifacts below it
    for name in (
        "WANDB_RUN_ID",
        "WANDB_RESUME",
        "SWANLAB_RUN_ID",
        "SWANLAB_RESUME",
        "MLFLOW_RUN_ID",
        "MLFLOW_MAX_LOG_PARAMS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path / "swanlab"))
    monkeypatch.setenv("SWANLAB_PROJECT_NAME", "dft-tests")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(tmp_path.name)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def run(
    folder: Path, tracker: str, *, steps: int, resume: bool = False, finish: bool = True, **flags: object
) -> DFTTrainer:
    """Train for some steps with checkpoints after each, and end the run of the tracker if `finish` is set."""
    trained = trainer(
        folder / "out", conversations(16), report_to=[tracker], max_steps=steps, save_strategy="steps",
        save_steps=2, per_device_train_batch_size=2, **flags,
    )  # fmt: skip
    trained.train(resume_from_checkpoint=resume or None)
    if finish:
        finish_trackers([tracker], callbacks=trained.callback_handler.callbacks)
    return trained


def identities(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "out" / RUNS_FILE).read_text())


def assert_without_token(folder: Path) -> None:
    """Assert that the files of a tracker hold arguments of the run, but no token."""
    contents = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert any(b"per_device_train_batch_size" in content for content in contents)
    assert not any(TOKEN.encode() in content for content in contents)


def mlflow_series(run_id: str, name: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id, name)
    return [(metric.step, metric.value) for metric in history]


def runs_of(folder: Path) -> list[mlflow.entities.Run]:
    experiment = mlflow.get_experiment_by_name(folder.name)
    return mlflow.MlflowClient().search_runs([experiment.experiment_id])


# ---- mlflow ----


def test_mlflow_continues_the_run_of_the_checkpoint(local):
    first = run(local, "mlflow", steps=3, hub_token=TOKEN)
    run_id = identities(local)["mlflow"]["id"]
    client = mlflow.MlflowClient()
    assert client.get_run(run_id).info.status == "FINISHED"
    shutil.rmtree(local / "out" / "checkpoint-3")  # as if the run had been killed before it was saved
    second = run(local, "mlflow", steps=5, resume=True)
    assert identities(local)["mlflow"]["id"] == run_id
    assert [row.info.run_id for row in runs_of(local)] == [run_id]
    steps = [step for step, _ in mlflow_series(run_id, "train/loss")]
    assert steps == [1, 2, 3, 3, 4, 5]  # the checkpoint is at step 2: step 3 was trained and logged twice
    losses = dict(mlflow_series(run_id, "train/loss"))
    logged = {record["step"]: record["loss"] for record in second.state.log_history if "loss" in record}
    assert losses == logged and first.state.log_history[2]["loss"] == pytest.approx(losses[3], abs=1e-12)
    data = client.get_run(run_id).data
    assert data.params["max_steps"] == "3"  # mlflow keeps parameters as they were first logged
    names = {name for record in second.state.log_history for name in record} - {"step", "changed_flags"}
    assert "avg_p_correct" in names and data.metrics.keys() == {f"train/{name}" for name in names}
    assert data.params["hub_token"] == "<HUB_TOKEN>"
    database = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    assert TOKEN.encode() not in database.read_bytes()


@pytest.mark.slow
def test_a_new_run_does_not_continue_an_earlier_run_of_mlflow(local):
    run(local, "mlflow", steps=2)
    earlier = identities(local)["mlflow"]["id"]
    run(local, "mlflow", steps=2)
    assert identities(local)["mlflow"]["id"] != earlier
    assert len(runs_of(local)) == 2


@pytest.mark.slow
def test_a_run_that_mlflow_has_lost_is_replaced_by_a_new_one(local, capsys):
    run(local, "mlflow", steps=2)
    file = local / "out" / RUNS_FILE
    file.write_text('{"mlflow": {"id": "0123456789abcdef0123456789abcdef"}}')
    run(local, "mlflow", steps=3, resume=True)
    assert "mlflow: run 0123456789abcdef0123456789abcdef cannot be continued" in capsys.readouterr().out
    assert [step for step, _ in mlflow_series(identities(local)["mlflow"]["id"], "train/loss")] == [3]


@pytest.mark.parametrize(
    ("error", "is_complete", "status"), [("x", False, "FAILED"), (None, False, "KILLED")]
)
def test_mlflow_records_how_a_run_ended(local, error, is_complete, status):
    with mlflow.start_run() as active:
        finish_trackers(["mlflow"], error, is_complete=is_complete)
    assert mlflow.MlflowClient().get_run(active.info.run_id).info.status == status


def test_mlflow_gets_the_record_as_parameters_of_accepted_length(local):
    record = {"arguments": {"data_files": ["x" * 9000]}, "data": {"train": {"数": 1}}, "git": None}
    handler = SimpleNamespace(callbacks=[MLflowRunCallback(TrackerRuns())])
    with mlflow.start_run() as active:
        RunRecordCallback(record, handler).on_train_begin(None, TrainerState(), None)
    params = mlflow.MlflowClient().get_run(active.info.run_id).data.params
    assert len(params["arguments/data_files"]) == MLFLOW_CHARACTERS and params["git"] == "none"
    assert params[mlflow_name("data/train/数")] == "1"


@pytest.mark.parametrize(
    "name", ["train/loss", "eval/a.jsonl/nll", "train_loss", "a b:c-d_e.f", "x" * MLFLOW_NAME]
)
def test_names_that_mlflow_accepts_are_unchanged(name):
    assert mlflow_name(name) == name


NAMES = [
    "eval/数.jsonl/nll",
    "eval/表.jsonl/nll",
    "a//b",
    "/a",
    "../a",
    ".",
    "..",
    "a/./b",
    "a/",
    "x" * 251,
    "x" * 252,
    "a(b)",
]


def test_other_names_are_mapped_to_distinct_names_that_mlflow_accepts(local):
    mapped = {name: mlflow_name(name) for name in NAMES}
    assert len({*mapped.values()}) == len(NAMES) and max(map(len, mapped.values())) <= MLFLOW_NAME
    assert mapped["eval/数.jsonl/nll"].startswith("eval/_.jsonl/nll-")
    with mlflow.start_run() as active:
        mlflow.log_metrics(dict.fromkeys(mapped.values(), 1.0))
    assert mlflow.MlflowClient().get_run(active.info.run_id).data.metrics.keys() == {*mapped.values()}


def test_mlflow_without_the_packages_of_its_database_is_an_error(local, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs sqlalchemy and alembic; pip install sqlalchemy alembic, or set"
    ):
        prepare_trackers(["mlflow"])


def test_a_server_of_mlflow_that_does_not_answer_is_an_error_before_any_work(local, folder):
    uri = f"http://someone:hunter2@127.0.0.1:{free_port()}"
    mlflow.set_tracking_uri(uri)
    words = ["--output_dir", str(local / "out"), "--report_to"]
    with pytest.raises(UserError) as caught:
        prepare_run(arguments(folder, *words, "tensorboard", "mlflow"))
    message = str(caught.value)
    shown = uri.replace("hunter2", "***")
    assert message.startswith(f"--report_to mlflow: its store {shown} cannot be used (API request to ")
    assert "Connection refused" in message and "hunter2" not in message and "\n" not in message
    assert message.endswith("; start or correct it (MLFLOW_TRACKING_URI), or remove mlflow from --report_to")
    check_mlflow_server(["tensorboard"])
    prepare_run(arguments(folder, *words, "mlflow", "--plan", "True"))  # trains nothing


def start_mlflow(folder: Path) -> MLflowRunCallback:
    callback = MLflowRunCallback(TrackerRuns())
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    callback.setup(args, TrainerState(), tiny())
    return callback


def test_a_database_that_mlflow_cannot_open_is_an_error(local):
    mlflow.set_tracking_uri("postgresql://someone:hunter2@127.0.0.1/runs")
    with pytest.raises(UserError, match=r"store postgresql://someone:\*\*\*@127.0.0.1/runs cannot be used"):
        start_mlflow(local)


def test_a_server_of_mlflow_that_is_gone_at_the_end_does_not_stop_the_program(local, monkeypatch, capsys):
    def refuse(*args: object) -> None:
        raise mlflow.exceptions.MlflowException("no route to host")

    callback = start_mlflow(local)
    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", refuse)
    callback.on_train_end(None, TrainerState(), None)
    mlflow.start_run()
    finish_trackers(["mlflow"])
    assert capsys.readouterr().out == (
        "warning     mlflow: its run may be incomplete (no route to host)\n" * 2
    )


# ---- wandb, SwanLab and TensorBoard ----


def test_wandb_continues_the_run_of_the_checkpoint(local):
    run(local, "wandb", steps=2, hub_token=TOKEN)
    run_id = identities(local)["wandb"]["id"]
    run(local, "wandb", steps=4, resume=True)
    assert identities(local)["wandb"]["id"] == run_id
    folders = [folder.name for folder in (local / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{run_id}") for name in folders)
    assert_without_token(local / "wandb")


@pytest.mark.slow
def test_wandb_run_id_of_the_user_has_precedence(local, monkeypatch):
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    run(local, "wandb", steps=2)
    assert identities(local)["wandb"] == {"id": "mine"}


def test_swanlab_continues_the_run_of_the_checkpoint(local):
    run(local, "swanlab", steps=2, hub_token=TOKEN)
    run_id = identities(local)["swanlab"]["id"]
    run(local, "swanlab", steps=4, resume=True)
    assert identities(local)["swanlab"]["id"] == run_id
    assert_without_token(local / "swanlab")


@pytest.mark.parametrize(
    ("tracker", "kind", "error"),
    [
        ("wandb", WandbRunCallback, wandb.errors.CommError("timed out")),
        ("swanlab", SwanLabRunCallback, swanlab.exceptions.AuthenticationError("timed out")),
        ("swanlab", SwanLabRunCallback, ConnectionError("timed out")),
    ],
)
def test_a_tracker_that_cannot_start_its_run_is_an_error(local, monkeypatch, tracker, kind, error):
    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules[tracker], "init", refuse)
    callback = kind(TrackerRuns())
    with pytest.raises(UserError) as caught:
        callback.setup(TrainingArguments(output_dir=str(local), use_cpu=True), TrainerState(), tiny())
    assert str(caught.value) == (
        f"--report_to {tracker}: its run cannot be started (timed out); check the network and the key "
        f"({tracker} login), or set {tracker.upper()}_MODE=offline"
    )


def test_tensorboard_continues_in_the_folder_of_the_run(local, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run(local, "tensorboard", steps=2, hub_token=TOKEN)
    folder = Path(identities(local)["tensorboard"]["folder"])
    run(local, "tensorboard", steps=4, resume=True)
    assert identities(local)["tensorboard"]["folder"] == str(folder)
    assert len([*folder.glob("events.*")]) == 2
    assert_without_token(folder)


# ---- the file of identities ----


def begin(folder: Path, step: int, checkpoint: str | None = None) -> TrackerRuns:
    runs = TrackerRuns()
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=checkpoint)
    runs.on_train_begin(args, TrainerState(global_step=step), None)
    return runs


def test_identities_are_read_by_a_run_that_resumes_in_place_alone(tmp_path):
    begin(tmp_path, 0).store("wandb", {"id": "a"})
    for checkpoint in (None, "auto", "True", str(tmp_path / "checkpoint-2")):
        assert begin(tmp_path, 2, checkpoint).identity("wandb") == {"id": "a"}
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    (elsewhere / RUNS_FILE).write_text((tmp_path / RUNS_FILE).read_text())
    assert begin(elsewhere, 2, str(tmp_path / "checkpoint-2")).identity("wandb") is None
    assert begin(tmp_path, 0).identity("wandb") is None and not (tmp_path / RUNS_FILE).exists()


def test_a_broken_file_of_identities_is_a_warning(tmp_path, capsys):
    (tmp_path / RUNS_FILE).write_text("{")
    assert begin(tmp_path, 2).identity("wandb") is None
    assert "cannot be read" in capsys.readouterr().out


def test_other_ranks_write_no_identities(tmp_path):
    runs = TrackerRuns()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    runs.on_train_begin(args, TrainerState(is_world_process_zero=False), None)
    runs.store("wandb", {"id": "a"})
    assert not (tmp_path / RUNS_FILE).exists()


# ---- artifacts ----


def send_artifacts(folder: Path, tracker: str, run_id: str) -> None:
    """Log a model and a report as the artifacts of a run."""
    for name in ("model.safetensors", "README.md", "report.html"):
        (folder / name).write_text(name)
    runs = begin(folder, 0)
    runs.store(tracker, {"id": run_id})
    args = SimpleNamespace(output_dir=str(folder), report_to=[tracker])
    log_artifacts(args, ["model.safetensors", "README.md"], [runs])


def test_mlflow_gets_model_and_reports_as_artifacts_of_a_run_that_has_ended(local, capsys):
    with mlflow.start_run() as active:
        pass
    send_artifacts(local, "mlflow", active.info.run_id)
    for kind, names in (("model", ["README.md", "model.safetensors"]), ("report", ["report.html"])):
        stored = mlflow.artifacts.list_artifacts(run_id=active.info.run_id, artifact_path=kind)
        assert sorted(item.path for item in stored) == [f"{kind}/{name}" for name in names]
    assert "artifacts   3 files logged to mlflow: model, report" in capsys.readouterr().out


def test_wandb_gets_model_and_reports_as_artifacts(local, monkeypatch):
    logged = {}
    monkeypatch.setattr(wandb, "log_artifact", lambda artifact: logged.update({artifact.name: artifact}))
    send_artifacts(local, "wandb", "abc")
    assert {name: sorted(artifact.manifest.entries) for name, artifact in logged.items()} == {
        "model-abc": ["README.md", "model.safetensors"],
        "report-abc": ["report.html"],
    }


@pytest.mark.parametrize(
    ("target", "name", "error"),
    [
        (mlflow.MlflowClient, "log_artifact", OSError("the bucket is gone")),
        (mlflow.MlflowClient, "log_artifact", mlflow.exceptions.MlflowException("the bucket is gone")),
        (wandb, "log_artifact", wandb.errors.CommError("the bucket is gone")),
        ("trackio", "log_artifact", RuntimeError("the bucket is gone")),
    ],
)
def test_artifacts_that_a_tracker_refuses_are_an_error_after_the_model_is_saved(
    local, monkeypatch, target, name, error
):
    def refuse(*args: object) -> None:
        raise error

    tracker = "trackio" if target == "trackio" else "wandb" if target is wandb else "mlflow"
    monkeypatch.setattr(pytest.importorskip("trackio") if target == "trackio" else target, name, refuse)
    with pytest.raises(UserError) as caught:
        send_artifacts(local, tracker, "abc")
    assert str(caught.value) == (
        f"--log_artifacts True: {tracker} did not accept the artifacts (the bucket is gone); the model is "
        f"saved in {local}, and nothing has to be trained again"
    )


def test_artifacts_are_logged_to_the_current_run_if_its_file_cannot_be_written(local, monkeypatch, capsys):
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    sent = []
    monkeypatch.setattr("dft.training.measuring.tracker_runs.write_atomically", refuse)
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", lambda self, run, *args: sent.append(run))
    send_artifacts(local, "mlflow", "abc")
    assert sent == ["abc"] * 3 and "a resumed run starts new tracker runs" in capsys.readouterr().out


def test_a_tracker_of_an_earlier_start_gets_no_artifacts(tmp_path, monkeypatch):
    runs = begin(tmp_path, 0)
    runs.store("mlflow", {"id": "earlier"})
    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", lambda *args: pytest.fail("logged"))
    (tmp_path / "model.safetensors").touch()
    args = SimpleNamespace(output_dir=str(tmp_path), report_to=["tensorboard"])
    log_artifacts(args, ["model.safetensors"], [begin(tmp_path, 2)])


def test_artifacts_are_off_by_default():
    assert not RunOptions().log_artifacts and artifact_notes(["tensorboard"], False) == []


def test_trackers_without_artifacts_get_a_line_before_training():
    assert artifact_notes(["wandb", "tensorboard"], True) == [
        "--log_artifacts True: tensorboard gets no artifacts; wandb, mlflow, trackio do"
    ]
    assert artifact_notes([], True) == ["--log_artifacts True has no effect without --report_to"]


# ---- trackers that are not installed ----


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("comet_ml", r"--report_to comet_ml: its package is not installed; pip install 'comet_ml>=3.43.2'"),
        ("clearml", r"--report_to clearml: its package is not installed; pip install clearml"),
        ("azure_ml", r"--report_to azure_ml: .* use --report_to mlflow"),
        ("kubeflow", r"--report_to kubeflow: .* KUBEFLOW_TRAINER_SERVER_URL"),
        ("mlfow", r"--report_to mlfow: unknown tracker; choose from azure_ml, "),
    ],
)
def test_a_tracker_that_cannot_be_used_is_an_error_with_its_remedy(tracker, message):
    with pytest.raises(UserError, match=message):
        check_trackers(["tensorboard", tracker])


def test_mlflow_that_is_switched_off_names_the_variable(monkeypatch):
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", "true")
    with pytest.raises(UserError, match="DISABLE_MLFLOW_INTEGRATION=TRUE switches it off"):
        check_trackers(["mlflow"])


# ---- trackio ----


@pytest.fixture
def trackio(local):
    """The module, which reads the name of its folder once."""
    return pytest.importorskip("trackio", reason="pip install trackio")


def test_trackio_continues_the_run_of_the_checkpoint(trackio, local):
    from trackio.utils import TRACKIO_DIR

    run(local, "trackio", steps=3, project=local.name, hub_token=TOKEN)
    identity = identities(local)["trackio"]
    run(local, "trackio", steps=5, resume=True, project=local.name)
    assert identities(local)["trackio"] == identity
    (only,) = trackio.Api().runs(local.name)
    assert only.id == identity["id"]
    assert_without_token(TRACKIO_DIR)


@pytest.mark.slow
def test_trackio_does_not_continue_another_run_of_the_same_name(trackio, local, capsys):
    run(local, "trackio", steps=2, run_name="same", project=local.name)
    first = identities(local)["trackio"]
    (local / "out" / RUNS_FILE).write_text(json.dumps({"trackio": {"id": "other", "name": "same"}}))
    run(local, "trackio", steps=3, resume=True, run_name="same", project=local.name)
    assert identities(local)["trackio"]["id"] not in ("other", first["id"])
    assert "is not the one of the checkpoint; a new one starts" in capsys.readouterr().out


def test_trackio_gets_model_as_artifact_and_ends_its_run_afterwards(trackio, local):
    trained = trainer(
        local / "out", conversations(4), report_to=["trackio"], max_steps=1, project=local.name,
        options=RunOptions(log_artifacts=True),
    )  # fmt: skip
    trained.train()
    trained.save_model()
    assert {"model.safetensors", "config.json"} <= {*trained.options.model_files}
    assert "training_args.bin" not in trained.options.model_files
    log_artifacts(trained.args, trained.options.model_files, trained.callback_handler.callbacks)
    finish_trackers(["trackio"], callbacks=trained.callback_handler.callbacks)
    run_id = identities(local)["trackio"]["id"]
    with pytest.raises(RuntimeError, match=r"Call trackio.init\(\) before"):
        trackio.log({})
    trackio.init(project=local.name)
    stored = trackio.use_artifact(f"model-{run_id}:latest")
    assert sorted(entry["path"] for entry in stored.manifest) == sorted(trained.options.model_files)
    trackio.finish()
