"""scripts/report.py: the page of one run, the comparison of several, and errors for unreadable runs."""

import json
import re
import sys
from pathlib import Path

import pytest

from dft.errors import UserError
from dft.report.pages.comparison import (
    comparison_page,
    comparison_picture,
    differing_arguments,
    labels_of,
    runs_of,
)
from dft.report.pages.history import series
from dft.report.saved_report import load_report
from scripts import report as script
from tests.report.reports import FIRST, LAST, Page, eval_record, run_report, train_record

NAN = float("nan")


def of_alpha(alpha: float, name: str, **metrics: float) -> dict:
    """A run with two evaluations, the second with the given metrics."""
    report = run_report(name=name, alpha=alpha, method="DFT" if alpha else "SFT")
    report["arguments"] = {**report["arguments"], "dft_alpha": alpha, "output_dir": f"runs/{name}"}
    log = [eval_record(0, FIRST), train_record(1), eval_record(2, LAST, objective=0.5, **metrics)]
    return {**report, "log": log}


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return [
        of_alpha(0.0, "sft", nll=0.75, acc=0.625, loss=0.75, avg_p_correct=0.5),
        of_alpha(1.0, "dft", nll=1.5, acc=0.875, loss=0.25, avg_p_correct=NAN),
        of_alpha(0.5, "half", nll=0.75, acc=0.75, loss=0.5, avg_p_correct=0.25),
    ]


@pytest.fixture(scope="module")
def folders() -> list[Path]:
    return [Path("runs/a"), Path("runs/b"), Path("runs/c")]


@pytest.fixture(scope="module")
def page(reports, folders) -> Page:
    return Page(comparison_page(runs_of(reports, folders)))


LABELS = ["● sft, SFT, alpha 0", "■ dft, DFT, alpha 1", "▲ half, DFT, alpha 0.5"]


def header(page: Page) -> list[str]:
    return next(cells for cells in page.rows if cells[0] == "run" and cells[1].startswith("loss"))


def test_the_table_shows_last_values_and_marks_the_best(page):
    columns = [cell.replace("\n", "") for cell in header(page)][1:]
    assert columns == [
        "lossneither is better", "nlllower is better", "avg_p_correcthigher is better", "acchigher is better",
        "objectivenot comparable across methods", "entropyneither is better",
    ]  # fmt: skip
    first, second, third = (page.row(label) for label in LABELS)
    assert first == ["0.7500", "0.7500 best", "0.5000 best", "0.6250", "0.5000", "0.9000"]
    assert second == ["0.2500", "1.5000", "NaN", "0.8750 best", "0.5000", "0.9000"]
    assert third == ["0.5000", "0.7500 best", "0.2500", "0.7500", "0.5000", "0.9000"]
    assert "cannot be compared between methods and no best value is marked" in page.text


def test_runs_with_equal_alpha_can_be_compared_by_objective_but_not_by_loss():
    reports = [of_alpha(1.0, name, loss=loss) for name, loss in (("a", 0.1), ("b", 0.2))]
    reports[1]["log"][2]["eval_objective"] = 0.25
    page = Page(comparison_page(runs_of(reports, [Path("a"), Path("b")])))
    column = [cell.split("lower")[0] for cell in header(page)].index("objective")
    assert [page.row(label)[column - 1] for label in ("● a", "■ b")] == ["0.5000", "0.2500 best"]
    assert (
        page.row("● a")[0] == "0.1000"
        and "across methods" not in page.text
        and "between methods" not in page.text
    )


def test_each_run_has_a_line_in_each_figure_and_a_histogram(page):
    labels = page.values("aria-label")
    (nll,) = (label for label in labels if label.startswith("evaluation-nll: "))
    assert nll == (
        "evaluation-nll: sft, SFT, alpha 0 from 1.2500 to 0.7500 (2 records); "
        "dft, DFT, alpha 1 from 1.2500 to 1.5000 (2 records); "
        "half, DFT, alpha 0.5 from 1.2500 to 0.7500 (2 records)"
    )
    assert sum(label.startswith("training-nll: ") for label in labels) == 1
    assert sum(label.startswith("Tokens by p of ") for label in labels) == 3
    assert page.row("sft, SFT, alpha 0, step 0") == ["38.7\u00a0%", "51.6\u00a0%", "9.7\u00a0%"]
    assert page.row("half, DFT, alpha 0.5, step 2") == ["9.5\u00a0%", "40.5\u00a0%", "50.0\u00a0%"]
    assert len(page.values("id")) == len(set(page.values("id")))
    assert not page.values("src") and "script" not in {tag for tag, _ in page.tags}


def test_only_differing_arguments_are_shown(page, reports):
    start = next(index for index, cells in enumerate(page.rows) if cells[0] == "dft_alpha")
    assert page.rows[start : start + 3] == [
        ["dft_alpha", "0.0", LABELS[0]], ["", "1.0", LABELS[1]], ["", "0.5", LABELS[2]],
    ]  # fmt: skip
    assert list(differing_arguments(reports)) == ["dft_alpha"]
    without_report = {**reports[0], "arguments": {"dft_alpha": 0.0}, "given": {"dft_alpha": 0.0}}
    assert differing_arguments([without_report, reports[0]]) == {
        "learning_rate": ["not given", "1e-06"], "data_files": ["not given", '["a<b>.jsonl"]'],
    }  # fmt: skip


def test_labels_are_made_unique_by_differing_arguments():
    def named(name: str, alpha: float = 1.0, **arguments: object) -> dict:
        report = of_alpha(alpha, name)
        return {**report, "arguments": {**report["arguments"], **arguments}}

    def labels(*reports: dict) -> list[str]:
        return labels_of(reports, [Path(f"runs/{place}") for place in range(len(reports))])

    assert labels(named("a"), named("b")) == ["a", "b"]
    assert labels(named("a"), named("a", 0.5)) == ["a, DFT, alpha 1", "a, DFT, alpha 0.5"]
    assert labels(named("a", seed=1), named("a", seed=2), named("b", seed=2)) == [
        "a, seed 1",
        "a, seed 2",
        "b",
    ]
    assert labels(named("a"), named("a")) == ["a, runs/0", "a, runs/1"]
    assert labels_of([named("a")] * 2, [Path("x")] * 2) == ["a, x, 1", "a, x, 2"]


def test_remarks_name_the_obstacles_to_a_comparison(reports, folders):
    other = {**reports[1], "model": {"name": "another"}, "log": [eval_record(9)]}
    other["log"][0]["eval_supervised_tokens"] = 1000
    text = Page(comparison_page(runs_of([reports[0], other], folders[:2]))).text
    assert "The models differ." in text
    assert "different numbers of tokens (31, 1,000)" in text
    assert "The last evaluations are at different steps." in text


def test_runs_without_logged_metrics_can_be_compared(folders):
    empty = run_report(log=[], tokens=[], data={}, arguments={}, given={}, model={}, steps={}, method=None)
    runs = runs_of([empty, {**empty, "name": "b"}], folders[:2])
    text = Page(comparison_page(runs)).text
    assert "No metrics are logged." in text and "No evaluation has a histogram of p." in text
    assert comparison_picture(runs).axes


def test_the_picture_shows_all_runs_in_each_panel(reports, folders):
    figure = comparison_picture(runs_of(reports, folders))
    titles = [axes.get_title("left") for axes in figure.axes if axes.axison]
    assert titles[:2] == ["nll, evaluation", "avg_p_correct, evaluation"] and "acc, training" in titles
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines if len(line.get_ydata())]
    assert drawn == [[1.25, 0.75], [1.25, 1.5], [1.25, 0.75]]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [label[2:] for label in LABELS]


def save(folder: Path, content: object, name: str = "report.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: object) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    monkeypatch.setattr(script, "report_user_errors", lambda: None)  # the hook applies to the whole process
    script.main()


def test_the_page_of_one_run_is_written_into_its_folder(tmp_path, monkeypatch, capsys):
    save(tmp_path / "r", run_report(log=[train_record(1, nll=NAN)]))
    for path in ("r", "r/report.json"):
        run(monkeypatch, tmp_path, path)
        assert capsys.readouterr().out == "r/report.html\n"
        page = Page((tmp_path / "r/report.html").read_text())
        assert page.row("nll") == ["NaN", "NaN"] and page.row("folder") == [str(tmp_path / "r")]
        assert {path.name for path in (tmp_path / "r").iterdir()} == {
            "report.html",
            "report.json",
            "report.png",
        }
        (tmp_path / "r/report.html").unlink()


def test_a_comparison_is_written_into_the_current_folder_or_to_output(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        save(tmp_path / name, of_alpha(1.0, name))
    run(monkeypatch, tmp_path, "a", "b")
    run(monkeypatch, tmp_path, "a", "b", "--output", "pages/ab.html")
    assert capsys.readouterr().out == "report_comparison.html\npages/ab.html\n"
    assert (tmp_path / "report_comparison.html").read_text() == (tmp_path / "pages/ab.html").read_text()
    pictures = [tmp_path / "report_comparison.png", tmp_path / "pages/ab.png"]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with pytest.raises(UserError, match=r"--output ab: must end in \.html"):
        run(monkeypatch, tmp_path, "a", "b", "--output", "ab")


def test_a_run_without_report_is_read_from_its_newest_trainer_state(tmp_path):
    def state(step: int) -> dict:
        log = [train_record(step, dft_alpha=0.5), eval_record(step)]
        return {"log_history": log, "global_step": step, "max_steps": 100}

    for step in (9, 10):
        save(tmp_path / f"run/checkpoint-{step}", state(step), "trainer_state.json")
    (tmp_path / "run/checkpoint-11").mkdir()  # interrupted while it was saved
    report = load_report(tmp_path / "run")
    assert (report["name"], report["method"], report["alpha"]) == ("run", "DFT", 0.5)
    assert report["steps"] == {"done": 10, "total": 100}
    assert series(report["log"], "eval_nll").steps.tolist() == [10]
    assert report["status"] == f"unknown: read from {tmp_path}/run/checkpoint-10/trainer_state.json"
    save(tmp_path / "run", "dft_alpha: 0.0\nrun_name: named\nmodel_name_or_path: m\n", "run_args.yaml")
    done = {"log_history": [{"step": 12, "train_runtime": 1.0}], "global_step": 12, "max_steps": 12}
    save(tmp_path / "run", done, "trainer_state.json")
    report = load_report(tmp_path / "run")
    assert (report["name"], report["method"], report["status"]) == ("named", "SFT", "finished")
    assert report["given"] == {"dft_alpha": 0.0, "run_name": "named", "model_name_or_path": "m"}
    assert report["model"] == {"name": "m"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "{run}: no such file or folder; pass the --output_dir of a run"),
        ("other.txt", "", "{run}: contains no report.json and no trainer_state.json, nor a checkpoint"),
        (
            "report.json",
            '{"log": [',
            "{run}/report.json: broken JSON (.*); remove it, and trainer_state.json",
        ),
        ("report.json", "[]", "{run}/report.json: not a JSON object; "),
        ("report.json", "{}", "{run}/report.json: 'log' is not a list of records; pass the --output_dir"),
        ("report.json", '{"log": [1]}', "{run}/report.json: 'log' is not a list of records"),
        ("report.json", '{"log": [], "steps": null}', "{run}/report.json: 'steps' is not an object; pass"),
        ("report.json", '{"log": [], "status": 3}', "{run}/report.json: 'status' is not a text; pass"),
        ("report.json", '{"log": [], "tokens": {}}', "{run}/report.json: 'tokens' is not a list; pass"),
        ("report.json", '{"log": [{"step": null}]}', "{run}/report.json: 'log' is not a list of records"),
        (
            "trainer_state.json",
            '{"log_history": [], "global_step": null}',
            "{run}/trainer_state.json: 'global_step' or 'max_steps' is not a number",
        ),
        ("trainer_state.json", "", "{run}/trainer_state.json: broken JSON (.*); pass a run"),
        ("trainer_state.json", "{}", "{run}/trainer_state.json: 'log_history' is not a list of records"),
    ],
)
def test_an_unreadable_run_is_an_error_with_its_path(tmp_path, name, content, message):
    if name is not None:
        save(tmp_path / "run", content, name)
    pattern = message.replace("(", r"\(").replace(")", r"\)").format(run=tmp_path / "run")
    with pytest.raises(UserError, match=pattern) as error:
        load_report(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_broken_run_args_file_is_an_error(tmp_path):
    save(tmp_path / "run", {"log_history": []}, "trainer_state.json")
    for content in ("a: [", "- a"):
        save(tmp_path / "run", content, "run_args.yaml")
        with pytest.raises(UserError, match=r"run_args\.yaml: not .*; fix or remove it"):
            load_report(tmp_path / "run")


def test_the_script_reports_user_errors(tmp_path, monkeypatch):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "nowhere"])
    monkeypatch.setattr(script, "report_user_errors", lambda: calls.append("report_user_errors"))
    with pytest.raises(UserError, match="^nowhere: no such file or folder; pass the --output_dir of a run$"):
        script.main()
    assert calls and not any(tmp_path.iterdir())


def test_serving_ends_cleanly_with_ctrl_c(tmp_path, monkeypatch, capsys):
    save(tmp_path / "runs/a", run_report())

    def interrupt(server) -> None:
        assert server.url.startswith("http://127.0.0.1:") and server.pages.seconds == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(script.ReportServer, "serve_forever", interrupt)
    run(monkeypatch, tmp_path, "--serve", "runs", "--port", "0", "--refresh", "3")
    printed = capsys.readouterr().out
    assert re.match(r"1 run at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends this\)\n", printed)
    assert printed.endswith("ended; the runs go on\n") and "ssh -L" in printed
    assert {file.name for file in (tmp_path / "runs/a").iterdir()} == {"report.json"}, "it writes nothing"


def test_other_addresses_than_that_of_this_machine_are_a_warning(tmp_path, monkeypatch, capsys):
    save(tmp_path / "a", run_report())
    monkeypatch.setattr(script.ReportServer, "serve_forever", lambda server: None)
    run(monkeypatch, tmp_path, "--serve", "a", "--port", "0", "--host", "0.0.0.0")
    assert "warning     everyone who can reach this address can read" in capsys.readouterr().out


@pytest.mark.parametrize("exceeds", [True, False])
def test_folders_that_are_not_searched_are_a_warning(tmp_path, monkeypatch, capsys, exceeds):
    save(tmp_path / "a", run_report())
    monkeypatch.setattr(script.ReportServer, "serve_forever", lambda server: None)
    monkeypatch.setattr(script, "exceeds_search", lambda folders: exceeds)
    run(monkeypatch, tmp_path, "--serve", "a", "--port", "0")
    assert ("only the first 5,000 folders are searched" in capsys.readouterr().out) is exceeds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "RUN: name the --output_dir of a run"),
        (("--serve",), "RUN: name the --output_dir of a run, or with --serve a folder of runs"),
        (("--serve", "nowhere"), "nowhere: no such file or folder; name a folder of runs"),
        (("--serve", ".", "--output", "a.html"), "--output a.html: --serve writes no page"),
        ((".", "--port", "1"), "--port has no effect without --serve"),
        ((".", "--host", "::"), "--host has no effect without --serve"),
        (("--serve", ".", "--port", "70000"), r"--port 70000: must lie in \[0, 65535\]"),
        (("--serve", ".", "--refresh", "0"), "--refresh 0: must be at least 1 second"),
    ],
)
def test_wrong_flags_are_errors(tmp_path, monkeypatch, words, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, tmp_path, *words)
