"""Runs that report to several trackers at once, and the contents of their local files."""

import json
import re
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from swanlab.proto.swanlab.record.v1.record_pb2 import Record as SwanLabRecord
from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
from swanlab.sdk.internal.core_python.store import DataStoreReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from dft.report.run_record import git_commit
from dft.report.samples_callback import COLUMNS
from dft.report.samples_file import SAMPLES, read_samples
from tests.launching import ROOT, history, launch, train_records

Series = dict[str, list[tuple[int, float]]]
"""For each metric under its tracker name: (step, value) pairs in order."""

OF_THE_RUN = (
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos",
)  # fmt: skip
"""Values that are logged once, which SwanLab and wandb store as summaries."""
HISTOGRAM = "eval/p_histogram"
SAMPLES_TABLE = "eval/samples"


def logged(output: Path, *, without: tuple[str, ...] = ()) -> Series:
    """Return the history of trainer_state.json under the names that trackers use."""
    series = defaultdict(list)
    for record in history(output):
        for name, value in record.items():
            if name not in ("step", *without) and not isinstance(value, list):
                kind, plain = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                series[f"{kind}/{plain}"].append((record["step"], value))
    return dict(series)


def histograms(output: Path) -> list[tuple[int, list[int]]]:
    return [
        (record["step"], record["eval_p_histogram"])
        for record in history(output)
        if "eval_p_histogram" in record
    ]


def sample_tables(output: Path) -> list[tuple[int, list[list[Any]]]]:
    """Return the step and the rows of the table of samples of each evaluation, from samples.jsonl."""
    rows, _ = read_samples(output / SAMPLES)
    steps = dict.fromkeys(row["step"] for row in rows)
    return [
        (step, [[row[name] for name in COLUMNS] for row in rows if row["step"] == step]) for step in steps
    ]


def assert_same(actual: Series, expected: Series, *, rel: float) -> None:
    assert actual.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in actual[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [value for _, value in actual[name]] == pytest.approx(values, rel=rel, nan_ok=True), name


def assert_is_the_record(record: dict[str, Any], output: Path) -> None:
    """Check that the configuration contains report.json and data_report.json."""
    report = json.loads((output / "report.json").read_text())
    assert record["environment"] == report["environment"]
    assert record["environment"]["git_commit"] == git_commit(ROOT)
    assert record["arguments"] == report["arguments"] and record["arguments"]["learning_rate"] == 2e-3
    data = json.loads((output / "data_report.json").read_text())
    assert record["data"]["train"]["supervised_tokens"] == data["train"]["supervised_tokens"]


# ---- three trackers at once, two of them offline ----


@pytest.fixture(scope="module")
def several(example, forks) -> tuple[Path, Path, str]:
    """Return the output folder, the tracker folder and the output of a run on two ranks."""
    output, logs = example.folder / "tracked", example.folder / "tracked-logs"
    words = example.words(
        output,
        data_files=[example.train, example.other],
        report_to=["tensorboard", "swanlab", "wandb"],
        logging_dir=logs,
        run_name="several",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        max_eval_samples=16,
        log_per_file=True,
        report=True,
        generate_samples=2,
        generate_samples_max_tokens=8,
    )
    home = example.folder / "home"
    home.mkdir(exist_ok=True)
    env = {"SWANLAB_PROJECT": "dft-tests", "WANDB_PROJECT": "dft-tests", "HOME": str(home)}
    codes, printed = forks.run(words, 2, **env)
    assert codes == [0, 0], printed
    assert [(step, len(rows)) for step, rows in sample_tables(output)] == [(2, 2), (4, 2)]
    assert len(histograms(output)) == 2 and "eval/eval.jsonl/nll" in logged(output)
    return output, logs, printed


def test_tensorboard_contains_all_metrics(several):
    output, logs, _ = several
    (file,) = logs.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert_same(scalars, logged(output), rel=1e-6)  # stored as float32

    shown = [(event.step, event.histogram_value) for event in events.Histograms(HISTOGRAM)]
    assert [(step, list(histogram.bucket)) for step, histogram in shown] == histograms(output)
    assert shown[0][1].bucket_limit == pytest.approx([edge / 20 for edge in range(1, 21)])

    for number in (1, 2):
        texts = events.Tensors(f"{SAMPLES_TABLE}/{number}/text_summary")
        for text, (step, rows) in zip(texts, sample_tables(output), strict=True):
            blocks = [
                f"**{name}**\n\n```\n{value}\n```"
                for name, value in zip(COLUMNS, rows[number - 1], strict=True)
            ]
            assert (text.step, text.tensor_proto.string_val[0].decode()) == (step, "\n\n".join(blocks))

    record = {}
    for name in ("arguments", "data", "environment"):
        (text,) = events.Tensors(f"run/{name}/text_summary")
        shown = text.tensor_proto.string_val[0].decode()
        record[name] = json.loads(shown.removeprefix("```json\n").removesuffix("\n```"))
    assert_is_the_record(record, output)


def test_wandb_contains_all_metrics(several):
    output, logs, printed = several
    (file,) = logs.glob("wandb/offline-run-*/run-*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    scalars, shown, tables, ended, project = defaultdict(list), [], [], False, ""
    for record in wandb_records(file):
        config.update(wandb_items(record.config.update))
        summary.update(wandb_items(record.summary.update))
        row = wandb_items(record.history.item)
        for name, value in row.items():
            if name == HISTOGRAM:
                shown.append((row["train/global_step"], value))
            elif name == SAMPLES_TABLE:
                table = json.loads((file.parent / "files" / value["path"]).read_text())
                tables.append((row["train/global_step"], table))
            elif not name.startswith("_") and name != "train/global_step":
                scalars[name].append((row["train/global_step"], value))
        ended |= record.HasField("exit") and record.exit.exit_code == 0
        project = record.run.project or project
    assert ended and project == "dft-tests"
    assert_same(dict(scalars), logged(output, without=OF_THE_RUN), rel=1e-12)
    assert [(step, histogram["values"]) for step, histogram in shown] == histograms(output)
    assert [(step, table["data"]) for step, table in tables] == sample_tables(output)
    assert tables[0][1]["columns"] == list(COLUMNS)
    assert shown[0][1]["bins"] == pytest.approx([edge / 20 for edge in range(21)])
    assert summary["train_loss"] == history(output)[-1]["train_loss"]
    assert_is_the_record(config, output)


def wandb_records(file: Path) -> Iterator[WandbRecord]:
    with WBDataStoreReader() as reader:
        reader.open(file)
        while (data := reader.scan()) is not None:
            yield WandbRecord.FromString(data)


def wandb_items(items: Any) -> dict[str, Any]:
    """Join the keys of nested dictionaries, which wandb flattens."""
    flattened: dict[str, Any] = {}
    for item in items:
        *way, last = item.nested_key or [item.key]
        inner = flattened
        for key in way:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return flattened


def test_swanlab_offline_contains_all_metrics(several):
    output, logs, _ = several
    (folder,) = logs.glob("run-*")
    scalars, charts, start, finish = read_swanlab(folder)
    assert start.project == "dft-tests" and start.name == "several"
    assert finish.state == RunState.RUN_STATE_FINISHED and not finish.error
    assert_same(scalars, swanlab_series(output), rel=1e-12)

    bars, tables = (
        [(step, json.loads((folder / "media/echarts" / name).read_text())) for step, name in charts[key]]
        for key in (HISTOGRAM, SAMPLES_TABLE)
    )
    assert [
        (step, [list(row.values()) for row in table["rowData"]]) for step, table in tables
    ] == sample_tables(output)
    assert [(step, chart["series"][0]["data"]) for step, chart in bars] == histograms(output)
    assert bars[0][1]["xAxis"][0]["data"][:2] == ["0.00 to 0.05", "0.05 to 0.10"]
    assert_is_the_record(swanlab_config(folder), output)


def swanlab_series(output: Path) -> Series:
    """Remove entries that SwanLab deduplicates: it keeps one value of a metric, such as `epoch`, per step."""
    series = logged(output, without=OF_THE_RUN)
    series["train/global_step"] = [(record["step"], record["step"]) for record in history(output)]
    last = history(output)[-1]
    series |= {f"single_value/{name}": [(last["step"], last[name])] for name in OF_THE_RUN}
    return {name: [*dict(points).items()] for name, points in series.items()}


def read_swanlab(folder: Path) -> tuple[Series, dict[str, list[tuple[int, str]]], Any, Any]:
    """Return scalars, files of each chart, and the start and end records of a run."""
    (file,) = folder.glob("run-*.swanlab")
    scalars, charts, start, finish = defaultdict(list), defaultdict(list), None, None
    reader = DataStoreReader()
    reader.open(file)
    while (data := reader.scan()) is not None:
        record = SwanLabRecord.FromString(data)
        if record.HasField("scalar") and not record.scalar.key.startswith("__swanlab__"):
            scalars[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
        elif record.HasField("media"):
            files = [(record.media.step, item.filename) for item in record.media.value.items]
            charts[record.media.key] += files
        elif record.HasField("start"):
            start = record.start
        elif record.HasField("finish"):
            finish = record.finish
    reader.close()
    return dict(scalars), charts, start, finish


def swanlab_config(folder: Path) -> dict[str, Any]:
    """Return the configuration, whose entries of the run are named `<group>/<name>`."""
    config = yaml.safe_load((folder / "files/config.yaml").read_text())
    record: dict[str, Any] = {}
    for name, entry in config.items():
        *way, last = name.split("/")
        inner = record
        for key in way:
            inner = inner.setdefault(key, {})
        inner[last] = None if entry["value"] == "none" else entry["value"]
    return record


def test_trackers_print_little_and_leave_no_process(example, forks, several):
    output, logs, printed = several
    for tracker in ("swanlab", "wandb"):
        assert printed.count(f"{tracker}: no login and no {tracker.upper()}_MODE") == 1
    assert not re.search(r"Run summary|wandb: WARNING|Traceback|\x1b", printed)
    home = str(example.folder / "home")
    deadline = time.monotonic() + 10
    while remaining := [
        process.info
        for process in psutil.process_iter(["environ", "cmdline"])
        if of_home(process, home) or process.pid in forks.processes()
    ]:
        assert time.monotonic() < deadline, remaining
        time.sleep(0.2)


def of_home(process: psutil.Process, home: str) -> bool:
    return (process.info["environ"] or {}).get("HOME") == home


# ---- SwanLab in local mode ----


@pytest.mark.slow
def test_swanlab_local_contains_all_metrics_except_histogram_and_table(example):
    output, logs = example.folder / "local", example.folder / "local-logs"
    words = example.words(
        output,
        report_to="swanlab",
        logging_dir=logs,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        max_eval_samples=8,
        report=True,
        generate_samples=1,
    )
    finished = launch(words, folder=example.folder, env={"SWANLAB_MODE": "local"})
    assert finished.code == 0, finished.output
    (folder,) = logs.glob("run-*")
    scalars, charts, _, finish = read_swanlab(folder)
    assert finish.state == RunState.RUN_STATE_FINISHED and not charts
    assert_same(scalars, swanlab_series(output), rel=1e-12)
    assert_is_the_record(swanlab_config(folder), output)


# ---- a killed run ----


@pytest.mark.slow
def test_a_killed_run_continues_the_runs_of_its_trackers(example, forks):
    """Two named evaluation sets, whose metrics and histograms all trackers get, and artifacts at the end."""
    output, logs = forks.folder / "killed", forks.folder / "killed-logs"
    words = example.words(
        output,
        report_to=["mlflow", "wandb", "swanlab", "tensorboard"],
        logging_dir=logs,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_data_files=[f"math={example.other}", f"code={example.eval}"],
        max_eval_samples=8,
        log_artifacts=True,
        report=True,
        resume_from_checkpoint="auto",
    )
    codes, printed = forks.run(words, DIE_AT="step 4")
    assert codes == [-signal.SIGKILL], printed
    before = json.loads((output / "tracker_runs.json").read_text())
    assert before.keys() == {"mlflow", "wandb", "swanlab", "tensorboard"}

    codes, printed = forks.run(words)
    assert codes == [0] and "resumes from step 2" in printed, printed
    assert json.loads((output / "tracker_runs.json").read_text()) == before
    for tracker, pattern in (("wandb", "wandb/offline-run-*"), ("swanlab", "run-*")):
        names = [folder.name for folder in logs.glob(pattern)]
        assert len(names) == 2 and all(name.endswith(before[tracker]["id"]) for name in names), names
    client = mlflow.MlflowClient(f"sqlite:///{logs}/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert (run.info.run_id, run.info.status) == (before["mlflow"]["id"], "FINISHED")
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/nll")]
    # Steps after the checkpoint are logged again. Whether the killed run had sent them is a matter of chance.
    assert points[-4:] == [(record["step"], record["nll"]) for record in train_records(output)[2:]]
    assert sorted({step for step, _ in points}) == [1, 2, 3, 4, 5, 6]
    assert run.data.metrics.keys() == logged(output, without=("changed_flags",)).keys()
    assert {"eval/math_nll", "eval/code_nll"} <= run.data.metrics.keys()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert {record["step"]: record["eval_code_nll"] for record in lines if "eval_code_nll" in record} == {
        record["step"]: record["eval_code_nll"] for record in history(output) if "eval_code_nll" in record
    }
    for kind, name in (("model", "model.safetensors"), ("report", "report.html")):
        assert f"{kind}/{name}" in [file.path for file in client.list_artifacts(run.info.run_id, kind)]
    assert "tensorboard gets no artifacts" in printed and "files logged to wandb: model, report" in printed
