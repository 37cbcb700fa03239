"""Runs of trackers that a resumed run continues, names that mlflow accepts, and artifacts."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import wandb
from transformers import TrainerState

from dft.arguments.trackers import artifact_notes, check_trackers
from dft.errors import UserError
from dft.training.measuring.artifacts import log_artifacts
from dft.training.measuring.tracker_callbacks import MLFLOW_NAME, finish_trackers, mlflow_name
from dft.training.measuring.tracker_runs import RUNS_FILE, TrackerRuns
from dft.training.measuring.tracker_setup import prepare_trackers
from dft.training.measuring.trackers import MLFLOW_CHARACTERS, RunRecordCallback
from dft.training.run_options import RunOptions
from dft.training.trainer import DFTTrainer
from tests.training.test_trainer import conversations, trainer

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """A database of mlflow, which takes seconds to create; each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


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
    steps = [step for step, _ in mlflow_series(run_id, "loss")]
    assert steps == [1, 2, 3, 3, 4, 5]  # the checkpoint is at step 2: step 3 was trained and logged twice
    losses = dict(mlflow_series(run_id, "loss"))
    logged = {record["step"]: record["loss"] for record in second.state.log_history if "loss" in record}
    assert losses == logged and first.state.log_history[2]["loss"] == pytest.approx(losses[3], abs=1e-12)
    data = client.get_run(run_id).data
    assert data.params["max_steps"] == "3"  # mlflow keeps parameters as they were first logged
    assert {"loss", "nll", "avg_p_correct", "acc", "grad_norm", "learning_rate"} <= data.metrics.keys()
    assert data.params["hub_token"] == "<HUB_TOKEN>"
    database = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    assert TOKEN.encode() not in database.read_bytes()


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
    assert [step for step, _ in mlflow_series(identities(local)["mlflow"]["id"], "loss")] == [3]


@pytest.mark.parametrize(
    ("error", "is_complete", "status"), [("x", False, "FAILED"), (None, False, "KILLED")]
)
def test_mlflow_records_how_a_run_ended(local, error, is_complete, status):
    with mlflow.start_run() as active:
        finish_trackers(["mlflow"], error, is_complete=is_complete)
    assert mlflow.MlflowClient().get_run(active.info.run_id).info.status == status


def test_mlflow_gets_the_record_as_parameters_of_accepted_length(local):
    trained = run(local, "mlflow", steps=1, finish=False)
    record = {"arguments": {"data_files": ["x" * 9000]}, "data": {"train": {"数": 1}}, "git": None}
    with mlflow.start_run(identities(local)["mlflow"]["id"]):
        RunRecordCallback(record, trained.callback_handler).on_train_begin(None, TrainerState(), None)
    params = mlflow.MlflowClient().get_run(identities(local)["mlflow"]["id"]).data.params
    assert len(params["arguments/data_files"]) == MLFLOW_CHARACTERS and params["git"] == "none"
    assert params[mlflow_name("data/train/数")] == "1"


@pytest.mark.parametrize(
    "name", ["loss", "eval_loss", "eval_a.jsonl/nll", "train/avg_p_correct", "a b:c-d_e.f", "x" * MLFLOW_NAME]
)
def test_names_that_mlflow_accepts_are_unchanged(name):
    assert mlflow_name(name) == name


NAMES = [
    "eval_数.jsonl/nll",
    "eval_表.jsonl/nll",
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
    assert mapped["eval_数.jsonl/nll"].startswith("eval__.jsonl/nll-")
    with mlflow.start_run() as active:
        mlflow.log_metrics(dict.fromkeys(mapped.values(), 1.0))
    assert mlflow.MlflowClient().get_run(active.info.run_id).data.metrics.keys() == {*mapped.values()}


def test_mlflow_without_the_packages_of_its_database_is_an_error(local, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs sqlalchemy and alembic; pip install sqlalchemy alembic, or set"
    ):
        prepare_trackers(["mlflow"])


# ---- wandb, SwanLab and TensorBoard ----


def test_wandb_continues_the_run_of_the_checkpoint(local):
    run(local, "wandb", steps=2)
    run_id = identities(local)["wandb"]["id"]
    run(local, "wandb", steps=4, resume=True)
    assert identities(local)["wandb"]["id"] == run_id
    folders = [folder.name for folder in (local / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(f"-{run_id}") for name in folders)


@pytest.mark.slow
def test_wandb_run_id_of_the_user_has_precedence(local, monkeypatch):
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    run(local, "wandb", steps=2)
    assert identities(local)["wandb"] == {"id": "mine"}


def test_swanlab_continues_the_run_of_the_checkpoint(local):
    run(local, "swanlab", steps=2)
    run_id = identities(local)["swanlab"]["id"]
    run(local, "swanlab", steps=4, resume=True)
    assert identities(local)["swanlab"]["id"] == run_id


def test_tensorboard_continues_in_the_folder_of_the_run(local, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run(local, "tensorboard", steps=2)
    folder = Path(identities(local)["tensorboard"]["folder"])
    run(local, "tensorboard", steps=4, resume=True)
    assert identities(local)["tensorboard"]["folder"] == str(folder)
    assert len([*folder.glob("events.*")]) == 2


# ---- the file of identities ----


def begin(folder: Path, step: int, checkpoint: str | None = None) -> TrackerRuns:
    runs = TrackerRuns()
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=checkpoint)
    runs.on_train_begin(args, TrainerState(global_step=step), None)
    return runs


def test_identities_are_read_by_a_run_that_resumes_in_place_alone(tmp_path):
    begin(tmp_path, 0).store("wandb", {"id": "a"})
    for checkpoint in (None, "auto", "True", str(tmp_path / "checkpoint-2")):
        assert begin(tmp_path, 2, checkpoint).earlier("wandb") == {"id": "a"}
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    (elsewhere / RUNS_FILE).write_text((tmp_path / RUNS_FILE).read_text())
    assert begin(elsewhere, 2, str(tmp_path / "checkpoint-2")).earlier("wandb") is None
    assert begin(tmp_path, 0).earlier("wandb") is None and not (tmp_path / RUNS_FILE).exists()


def test_a_broken_file_of_identities_is_a_warning(tmp_path, capsys):
    (tmp_path / RUNS_FILE).write_text("{")
    assert begin(tmp_path, 2).earlier("wandb") is None
    assert "cannot be read" in capsys.readouterr().out


def test_other_ranks_write_no_identities(tmp_path):
    runs = TrackerRuns()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    runs.on_train_begin(args, TrainerState(is_world_process_zero=False), None)
    runs.store("wandb", {"id": "a"})
    assert not (tmp_path / RUNS_FILE).exists()


# ---- artifacts ----


def test_mlflow_gets_model_and_reports_as_artifacts_after_training(local):
    trained = run(local, "mlflow", steps=1)
    (local / "out" / "report.html").write_text("page")
    (local / "out" / "data_report.json").write_text("{}")
    trained.save_model()
    files = trained.options.model_files
    assert "model.safetensors" in files and "training_args.bin" not in files
    log_artifacts(trained.args, files)
    store = mlflow.artifacts.list_artifacts(run_id=identities(local)["mlflow"]["id"], artifact_path="model")
    assert sorted(Path(item.path).name for item in store) == sorted(files)
    report = mlflow.artifacts.list_artifacts(run_id=identities(local)["mlflow"]["id"], artifact_path="report")
    assert sorted(item.path for item in report) == ["report/data_report.json", "report/report.html"]


@pytest.mark.slow
def test_wandb_gets_model_and_reports_as_artifacts(local):
    trained = run(local, "wandb", steps=1, finish=False)
    trained.save_model()
    (local / "out" / "report.html").write_text("page")
    logged = {}
    original, wandb.log_artifact = (
        wandb.log_artifact,
        lambda artifact: logged.update({artifact.type: artifact}),
    )
    try:
        log_artifacts(trained.args, trained.options.model_files)
    finally:
        wandb.log_artifact = original
        finish_trackers(["wandb"])
    assert sorted(logged["model"].manifest.entries) == sorted(trained.options.model_files)
    assert [*logged["report"].manifest.entries] == ["report.html"]


def test_artifacts_that_a_tracker_refuses_are_an_error_after_the_model_is_saved(local, monkeypatch):
    trained = run(local, "mlflow", steps=1)
    trained.save_model()

    def refuse(*args: object) -> None:
        raise OSError("the bucket is gone")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", refuse)
    with pytest.raises(
        UserError, match=r"mlflow did not accept the artifacts \(the bucket is gone\); the model is saved"
    ):
        log_artifacts(trained.args, trained.options.model_files)


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
def trackio(local, monkeypatch):
    """trackio with a fresh folder, which it reads once."""
    module = pytest.importorskip("trackio", reason="pip install trackio")
    from trackio.utils import TRACKIO_DIR

    assert TRACKIO_DIR
    return module


def test_trackio_continues_the_run_of_the_checkpoint(trackio, local):
    run(local, "trackio", steps=3, project=local.name)
    identity = identities(local)["trackio"]
    run(local, "trackio", steps=5, resume=True, project=local.name)
    assert identities(local)["trackio"] == identity
    (only,) = trackio.Api().runs(local.name)
    assert only.id == identity["id"]


def test_trackio_does_not_continue_another_run_of_the_same_name(trackio, local, capsys):
    run(local, "trackio", steps=2, run_name="same", project=local.name)
    first = identities(local)["trackio"]
    (local / "out" / RUNS_FILE).write_text(json.dumps({"trackio": {"id": "other", "name": "same"}}))
    run(local, "trackio", steps=3, resume=True, run_name="same", project=local.name)
    assert identities(local)["trackio"]["id"] not in ("other", first["id"])
    assert "is not the one of the checkpoint; a new one starts" in capsys.readouterr().out


def test_trackio_gets_model_as_artifact_and_stays_open_for_it(trackio, local):
    trained = trainer(
        local / "out", conversations(4), report_to=["trackio"], max_steps=1, project=local.name,
        options=RunOptions(log_artifacts=True),
    )  # fmt: skip
    trained.train()
    trained.save_model()
    log_artifacts(trained.args, trained.options.model_files)
    finish_trackers(["trackio"], callbacks=trained.callback_handler.callbacks)
    run_id = identities(local)["trackio"]["id"]
    with pytest.raises(RuntimeError, match=r"Call trackio.init\(\) before"):
        trackio.log({})
    trackio.init(project=local.name)
    stored = trackio.use_artifact(f"model-{run_id}:latest")
    assert sorted(entry["path"] for entry in stored.manifest) == sorted(trained.options.model_files)
    trackio.finish()
