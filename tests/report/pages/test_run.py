"""The page of a run shows its report, is self-contained, and is written for incomplete reports too."""

import ast
import json
import re
from pathlib import Path

import pytest

from dft.metrics import CURVES, FURTHER_CURVES, QUALITY
from dft.report.pages.formatting import format_number
from dft.report.pages.run import run_page, run_picture, write_report_page
from dft.report.pages.sections import notes
from dft.report.pages.tokens import conversation_views, lines_of
from dft.report.terminal.data import data_summary
from tests.launching import ROOT
from tests.report.reports import DATA, Page, conversation, eval_record, run_report, train_record

FOLDER = Path("/runs/first")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def html() -> str:
    return run_page(run_report(), FOLDER)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_is_self_contained_and_runs_no_script(html, page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not page.values("src") and not page.values("onclick")
    assert all(link.startswith("#") for link in page.values("href") + page.values("xlink:href"))
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert all(inner.startswith("#") for inner in re.findall(r"url\(([^)]*)\)", html))
    assert page.values("content")[1] == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique(page):
    assert len(page.values("id")) == len(set(page.values("id"))) > 10


def test_the_summary_describes_the_run(page):
    assert page.text.count("first <run>") == 2, "the title and the heading, escaped in the file"
    assert page.row("method") == ["DFT, alpha 1; token weight: alpha * p + (1 - alpha)"]
    assert page.row("model") == ["m/tiny, 1.5 M parameters, float32 weights, sdpa attention"]
    assert page.row("steps") == ["2 of 2 (100 %)"]
    assert page.row("folder") == [str(FOLDER)]
    assert page.row("updated") == ["2026-01-02 03:04:05"]


def test_the_tables_show_logged_values(page):
    assert page.row("nll") == ["1.2500", "1.5000", "1.2500 at 0"]
    assert page.row("acc") == ["0.6000", "0.7500", "0.7500 at 2"]
    assert page.row("loss") == ["0.3500", "0.3500", "–"], "the loss has no best value"
    assert page.row("entropy") == ["0.9000", "0.9000", "–"]
    assert page.row("nll", 1) == ["2.0000", "1.0000"] and page.row("loss", 1) == ["0.2500", "0.1250"]
    assert "first, step\xa00" in page.text and "last, step\xa02" in page.text
    assert "nll rose from 1.2500 to 1.5000 while acc rose from 0.6000 to 0.7500" in page.text


def test_each_logged_metric_has_a_figure_and_its_meaning(page):
    labels = page.values("aria-label")
    logged = ("loss", "nll", "avg_p_correct", "acc", "grad_norm", "learning_rate", "entropy")
    assert all(sum(label.startswith(f"{name}: ") for label in labels) == 1 for name in logged)
    (nll,) = (label for label in labels if label.startswith("nll"))
    assert nll == (
        "nll: training from 2.0000 to 1.0000 (2 records); evaluation from 1.2500 to 1.5000 (2 records)"
    )
    for metric in (*CURVES, *FURTHER_CURVES):
        assert (metric.meaning in page.text) == (metric.name in logged)
    assert {metric.name for metric in QUALITY} <= {metric.name for metric in (*CURVES, *FURTHER_CURVES)}


def test_the_histogram_has_a_table_of_shares_before_and_after(page):
    assert page.row("before, step 0 (31 tokens)") == ["38.7\u00a0%", "51.6\u00a0%", "9.7\u00a0%"]
    assert page.row("after, step 2 (42 tokens)") == ["9.5\u00a0%", "40.5\u00a0%", "50.0\u00a0%"]
    assert "DFT usually polarizes the tokens" in page.text and "--eval_on_start" not in page.text


def test_a_first_evaluation_after_step_0_is_labeled_as_such():
    log = [eval_record(5, [1] * 20), eval_record(9, [2] * 20)]
    text = Page(run_page(run_report(log=log), FOLDER)).text
    assert "“before” is step 5; --eval_on_start True also evaluates the model before training." in text
    text = Page(run_page(run_report(log=log[:1]), FOLDER)).text
    assert "Only one evaluation has a histogram so far, at step 5." in text


def test_tokens_are_shown_with_p_before_and_after(page):
    assert page.targets == [
        ["p 0.125", "</script>", "12", "p1"],
        ["p 0.5, ends the turn", "<|im_end|>", "50", "p5 end"],
        ["p 0.875, before 0.125", "</script>", "87", "p8"],
        ["p 0.999, before 0.5, ends the turn", "<|im_end|>", "99", "p9 end"],
    ]
    assert "a<b>.jsonl:3" in page.text
    assert "step 0, mean p 0.3125" in page.text and "step 2, mean p 0.9370" in page.text
    assert page.text.count("<|im_start|>user↵q") == 2


def test_white_space_and_control_characters_are_visible():
    scored = conversation(
        ("a b\n\n\tc", 0.5), ("", 0.25), ("\x00\u202e\r", 0.0), ("&amp;<", 1.0), prompt=" \n"
    )
    view = {"step": 3, "conversations": [{**scored, "shortened": True}]}
    html = run_page(run_report(log=[], tokens=[view]), FOLDER)
    page = Page(html)
    assert [text for _, text, _, _ in page.targets] == [
        "a b↵", "↵", "⇥\tc", "◌", "\\x00\\u202e\\r", "&amp;<",
    ]  # fmt: skip
    assert [percent for _, _, percent, _ in page.targets] == ["50", "", "", "25", "0", "100"]
    assert html.count('<i class="sp"> </i>') == 2
    assert "Only the last tokens are shown." in page.text and "\x00" not in html


def test_lines_end_at_newlines_only():
    kinds = [[(piece.kind, piece.text) for piece in line] for line in lines_of("\nx y\n")]
    assert kinds == [[], [("text", "x"), ("space", " "), ("text", "y")], []]
    assert lines_of("a\u2028b")[0][1].text == "\\u2028"


def test_a_conversation_is_compared_with_itself_only():
    scored, other = conversation(("a", 0.1)), {**conversation(("a", 0.2)), "line": 4}
    changed = conversation(("b", 0.3))
    for newest in (other, changed):
        views = [{"step": 0, "conversations": [scored]}, {"step": 1, "conversations": [newest]}]
        (shown,) = conversation_views(views)
        assert [reading.step for reading in shown.readings] == [1]
        assert shown.readings[0].tokens[1].before is None
    nowhere = {**scored, "file": "", "line": -1}
    (shown,) = conversation_views([{"step": 0, "conversations": [nowhere]}])
    assert shown.origin == "conversation 1"


def test_metrics_per_file_have_a_table():
    log = [
        {**eval_record(step), "eval_x/a.jsonl/nll": nll, "eval_x/a.jsonl/avg_p_correct": p}
        for step, nll, p in ((0, 2.0, 0.25), (5, 1.5, 0.375))
    ]
    log[1]["eval_b.jsonl/nll"] = 0.5
    page = Page(run_page(run_report(log=log), FOLDER))
    assert page.row("x/a.jsonl") == ["2.0000", "1.5000", "0.2500", "0.3750"]
    assert page.row("b.jsonl") == ["0.5000", "0.5000", "–", "–"]


def test_the_data_section_has_the_lines_of_the_terminal(page):
    for line in data_summary(DATA, str(FOLDER)):
        assert [line[:12].strip(), line[12:]] in page.rows


def test_given_arguments_and_all_arguments_are_listed(page):
    assert page.row("data_files") == page.row("data_files", 1) == ['["a<b>.jsonl"]']
    assert page.row("seed") == ["42"] and page.row("optim_args") == ["null"]
    assert "All 6 arguments" in page.text
    assert page.row("git_commit") == ["null"] and page.row("ranks") == ["2"]


def test_throughput_memory_and_durations(page):
    assert page.row("tokens per second") == ["1500 (median)"]
    assert page.row("peak memory") == ["1.50 GiB"] and page.row("run time") == ["0:01:15"]
    assert page.row("supervised tokens") == ["80 in training"]


NOTHING = {
    "log": [], "tokens": [], "data": {}, "environment": {}, "arguments": {}, "given": {}, "model": {},
    "method": None, "alpha": None, "updated": None, "steps": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (NOTHING, "No metrics have been logged yet."),
        ({"log": [], "status": "running", "steps": {"done": 0, "total": 0}}, "0 of 0 (0 %)"),
        ({"log": [train_record(1)], "tokens": []}, "To evaluate, pass --eval_data_files FILE or"),
        ({"log": [eval_record(4)]}, "No evaluation has a histogram of p."),
        ({"log": [eval_record(4, [0] * 20)]}, "evaluation, step 4 (0 tokens)"),
        ({"log": [{"step": 9, "train_runtime": 3661.0}]}, "1:01:01"),
        ({"log": [{"step": 1, "nll": NAN}]}, "nll is NaN or infinite at step 1 (a cross in its figure)."),
        ({"log": [{"step": step, "nll": INF} for step in range(1, 12)]}, "6, 7, 8 and 3 more"),
        ({"log": [eval_record(n, nll=NAN) for n in (0, 1)]}, "eval_nll is NaN or infinite at step 0, 1"),
        ({"log": [], "tokens": [{"step": 3, "conversations": []}]}, "None yet: evaluations record them."),
        ({"log": [], "tokens": [{"step": 3, "conversations": [conversation(("a", NAN))]}]}, "mean p NaN"),
        ({"log": [], "alpha": 0.0, "method": "SFT", "weight": "1"}, "SFT, alpha 0; token weight: 1"),
        ({"log": [], "name": "\udcff{{ 7 * 7 }}"}, "{{ 7 * 7 }}: run report"),
        ({"log": [], "status": "stopped: nll is not finite"}, "stopped: nll is not finite"),
    ],
)  # fmt: skip
def test_pages_of_incomplete_reports(changes, expected):
    assert expected in Page(run_page(run_report(**changes), FOLDER)).text


def test_nonfinite_values_are_shown():
    log = [{"step": 1, "nll": NAN}, {"step": 2, "nll": INF}]
    assert Page(run_page(run_report(log=log), FOLDER)).row("nll") == ["NaN", "inf"]
    assert [format_number(value) for value in (None, 3, 12345.6, 0.0, 2e-6)] == [
        "–",
        "3",
        "12,346",
        "0.0000",
        "2e-06",
    ]


@pytest.mark.parametrize(("alpha", "nll", "count"), [(1.0, 1.5, 1), (0.0, 1.5, 0), (1.0, 1.0, 0)])
def test_a_rise_of_nll_and_acc_is_explained_for_alpha_near_1(alpha, nll, count):
    log = [eval_record(0), eval_record(1, nll=nll, acc=0.75)]
    assert len([note for note in notes(run_report(alpha=alpha, log=log)) if "rose from" in note]) == count


def test_page_and_picture_are_deterministic_and_the_only_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report_page(json.loads(json.dumps(run_report())), tmp_path / name)
    names = ["report.html", "report.png"]
    assert [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"] == [names, names]
    first, second = ((tmp_path / name / "report.html").read_text() for name in "ab")
    assert first.replace(str(tmp_path / "a"), "") == second.replace(str(tmp_path / "b"), "")
    assert (tmp_path / "a/report.png").read_bytes() == (tmp_path / "b/report.png").read_bytes()


def test_existing_files_are_listed(tmp_path):
    for name in ("trainer_state.json", "model.safetensors", "other.txt"):
        (tmp_path / name).touch()
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    page = Page(run_page(run_report(log=[]), tmp_path))
    assert page.row("trainer_state.json") == ["all logged values and the best step"]
    assert page.row("checkpoint-900, checkpoint-1000") and "other.txt" not in page.text


def test_the_picture_has_the_panels_and_the_histogram():
    log = [train_record(1), eval_record(1, [1] * 20), train_record(2, nll=NAN)]
    figure = run_picture(run_report(log=log))
    shown = [axes.get_title("left") for axes in figure.axes if axes.axison]
    curves = ["loss", "nll", "avg_p_correct", "acc", "grad_norm", "learning_rate", "entropy"]
    assert shown == [*curves, "share of tokens by p"]
    assert figure.get_suptitle() == (
        "first <run>   ·   DFT, alpha 1   ·   step 2 of 2   ·   finished   ·   NaN or infinite: nll"
    )


def test_training_starts_without_matplotlib():
    visited, pending = set(), ["dft.fine_tune", "train_dft", "dft"]
    while pending:
        name = pending.pop()
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in visited or not file.is_file():
            continue
        visited.add(name)
        imported = names_imported(file)
        assert not [module for module in imported if module.startswith("matplotlib")], (
            f"{name} imports matplotlib"
        )
        pending += imported
    assert {"dft.report.run_record", "dft.training.trainer"} <= visited


def names_imported(file: Path) -> list[str]:
    """Return the modules that a file imports at its top level; for `from a import b` both a and a.b."""
    names = []
    for statement in ast.parse(file.read_text()).body:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            names += [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
    return names


def test_each_evaluation_set_has_its_own_table_curves_and_histogram():
    def of_set(record, name):
        return {key.replace("eval_", f"eval_{name}_"): value for key, value in record.items()}

    report = run_report()
    sets = ("math", "code")
    report["log"] = [
        of_set(entry, name) if "eval_nll" in entry else entry for entry in report["log"] for name in sets
    ]
    html = run_page(report, FOLDER)
    page = Page(html)
    for name in sets:
        assert html.count(f"<caption>Evaluation on {name}</caption>") == 1
        assert html.count(f"<h3>Evaluation on {name}</h3>") == 1
        assert f"evaluation on {name} from 1.2500 to 1.5000 (2 records)" in html
    assert "</svg> evaluation on code</li>" in html
    assert len(page.values("id")) == len(set(page.values("id")))
    assert page.row("last evaluation") == ["0:00:04"], "of both sets"
