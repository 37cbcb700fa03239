"""The tasks of the study on a pretrained model, its selection of methods, and its tables."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from dft.errors import UserError

pytest.importorskip("reasoning_gym", reason="pip install -r requirements-real.txt")
pytestmark = pytest.mark.real

from scripts.study import real_results, real_study, real_tasks, study_results  # noqa: E402
from scripts.study.real_tasks import DATA, PARTS, TASKS, held_out, is_right, problems, validation  # noqa: E402
from tests.launching import ROOT  # noqa: E402


def test_problems_are_distinct_and_asked_ones_are_not_trained_on():
    assert len(problems("products")) == 100 and len(problems("short sums")) == 200
    for part, options in PARTS.items():
        assert len(problems(part)) - options.held_out - options.validation >= 40
    asked = {problem.question for task in TASKS for problem in held_out(task)}
    chosen = {problem.question for task in TASKS for problem in validation(task)}
    assert len(asked) == 300 and len(chosen) == 160 and not asked & chosen
    for data in DATA.values():
        rows = real_tasks.training_rows(data, 240, "seed")
        questions = {row["messages"][0]["content"] for row in rows}
        assert len(rows) == 240 and not questions & (asked | chosen)
        assert rows == real_tasks.training_rows(data, 240, "seed")
        assert rows != real_tasks.training_rows(data, 240, "another seed")


def count_wrong(name, rows, seed):
    """Return the number of wrong answers in a data set to fine-tune on."""
    by_question = {problem.question: problem for part in DATA[name].parts for problem in problems(part)}
    pairs = [
        [turn["content"] for turn in row["messages"]]
        for row in real_tasks.training_rows(DATA[name], rows, seed)
    ]
    return sum(not is_right(by_question[question], answer) for question, answer in pairs)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("half known", 0, 0), ("half known, 3 in 10 wrong", 0.25, 0.35)]
)
def test_share_of_wrong_answers(name, low, high):
    assert low <= count_wrong(name, 1000, "seed") / 1000 <= high


def test_verifier_grades_the_last_number_or_word():
    for task in TASKS:
        assert all(is_right(problem, problem.written_out()) for problem in held_out(task))
    product = next(
        problem for problem in problems("products") if problem.entry["metadata"]["expression"] == "6 * 7"
    )
    assert product.written_out() == "6 * 7 = 42"
    for text in ("42", "The answer is 42.", "**42**", "6 times 7 is 42"):
        assert is_right(product, text), text
    for text in ("", "no idea", "42, no, 41", "-42", "4", "6 * 7"):
        assert not is_right(product, text), text
    word = problems("spelling")[0]
    assert is_right(word, f"It is {word.answer}.") and not is_right(word, word.answer[::-1] + " backward")
    letters = " ".join(reversed(word.answer))
    assert word.written_out() == f"{letters}, backward {' '.join(word.answer)}: {word.answer}"


def test_answers_that_were_cut_are_left_out(tmp_path):
    records = [
        {"question": "q1", "samples": [{"text": " Yes. ", "stopped": True}]},
        {"question": "q2", "samples": [{"text": "No, becau", "stopped": False}]},
        {"question": "q3", "samples": [{"text": " ", "stopped": True}]},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    real_tasks.write_own_answers(tmp_path / "answers.jsonl", tmp_path / "own.jsonl")
    (row,) = map(json.loads, (tmp_path / "own.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in row["messages"]] == ["q1", "Yes."]
    assert len(set(real_tasks.PLAIN_QUESTIONS)) == 200
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[1:]))
    with pytest.raises(UserError, match="ended none of its answers to plain questions"):
        real_tasks.write_own_answers(tmp_path / "answers.jsonl", tmp_path / "own.jsonl")


def trial(method, rate, right, data="new"):
    return {"method": method, "data": data, "rate": rate, "right": {DATA[data].learned: right}}


def test_best_rate_is_that_of_the_highest_accuracy_and_of_equal_ones_the_lowest():
    trials = [
        trial("SFT", 1e-3, 50), trial("SFT", 1e-4, 50), trial("SFT", 1e-5, 49), trial("DFT", 1e-3, 1),
        trial("SFT", 1e-2, 99, data="half known"),
    ]  # fmt: skip
    best = real_study.select(trials, "new")
    assert {method: result["rate"] for method, result in best.items()} == {"SFT": 1e-4, "DFT": 1e-3}
    assert real_study.groups() == {"half known": "half known", "new": "new"}


def test_finished_runs_are_not_repeated_and_another_study_is_refused(tmp_path):
    study = real_study.Study(tmp_path, tmp_path / "model", real_study.SIZES["quick"], None, 1)
    run = real_study.Run("alpha 0.5", "half known, 3 in 10 wrong", 0, 1e-4)
    assert run.name == "alpha_0.5-half_known_3_in_10_wrong-0-0.0001"
    file = tmp_path / "runs" / run.name / "result.json"
    file.parent.mkdir(parents=True)
    result = {**run._asdict(), "right": {"a": 1}, "curve": []}
    file.write_text(json.dumps(result))
    assert study.results([run, run]) == [result] * 2
    for damaged in ('{"right": {"a"', "{}", '{"right": {"a": 1}}'):
        file.write_text(damaged)
        with pytest.raises(UserError, match="result.json: is damaged .* remove it to compute it again"):
            study.results([run])
    (tmp_path / "base.json").write_text("")
    with pytest.raises(UserError, match="base.json: is damaged"):
        study.base_result()


def results_with(values):
    """Return the content of study.json, with the accuracies of each method in two seeds."""
    files = [real_tasks.task_file(real_study.Path(), "test", task).name for task in TASKS]
    scores = {
        file: {"nll": 1.0, "avg_p_correct": 0.5, "p_end_of_turn": 0.25, "p_histogram": [1] + [0] * 18 + [3]}
        for file in [*files, "own-answers.jsonl", "gsm8k.jsonl"]
    }
    answers = {task: [problem.written_out() for problem in held_out(task)] for task in TASKS}
    whole = {"avg_p_correct": 0.7, "silenced_share": 0.02, "gradient_kept": 0.3, "p_end_of_turn": 0.5}
    training = {name: {"whole": whole, "advice": [{"recommendation": "DFT fits"}]} for name in DATA}
    base = {"right": dict.fromkeys(TASKS, 50.0), "stopped": dict.fromkeys(TASKS, 90.0), "answers": answers,
            "scores": scores, "training": training}  # fmt: skip
    runs = [
        {"method": method, "data": name, "seed": seed, "rate": 1e-4, "right": dict.fromkeys(TASKS, value),
         "stopped": dict.fromkeys(TASKS, 100.0), "answers": answers, "scores": scores,
         "curve": [{"step": step, "eval_nll": 1.0, "eval_avg_p_correct": 0.5} for step in (0, 8)]}
        for method, of_seeds in values.items() for name in DATA for seed, value in enumerate(of_seeds)
    ]  # fmt: skip
    trials = [trial(method, 1e-4, 75.0) for method in values]
    size = {"seeds": 2, "rates": dict.fromkeys(("half known", "new"), [1e-4, 1e-3])}
    return {"size": size, "methods": list(values), "base": base, "trials": trials, "runs": runs}


def test_tables_and_pictures(tmp_path, capsys):
    """DFT 70, 74; SFT 60, 62: 72 against 61; the differences are 10 and 12; t for two seeds is 12.706."""
    results = results_with({"SFT": [60.0, 62.0], "DFT": [70.0, 74.0]})
    real_results.write_results(results, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| base | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    assert "| DFT | 72.0 ± 25.4 |" in text and "| DFT | +11.0 ± 12.7 |" in text
    assert "| half known | 0.70 | 2 % | 30 % | 0.500 | DFT (72.0) | +11.0 |" in text
    assert "| 0.0001: new | 75.0 | 75.0 |" in text and "| 0.001: new |  |  |" in text
    assert "| | base | 1.000 | 0.500 | 1.000 | 0.500 |" in text
    assert "| half known | SFT | 0.250 ± 0.000 | 100 % |" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6 and all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert text.count("`'") == 3 * 2 * 3 and text.count("✓") == 1 + 3 * 2 * 3
    for name in ("accuracy", "histograms", "curves"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            figures = json.loads((tmp_path / "figures.json").read_text())
            assert picture.info[study_results.DIGEST] == study_results.digest_of(figures)


def test_pictures_in_the_documentation_are_of_the_figures_there():
    docs = ROOT / "docs"
    figures = json.loads((docs / "study_real.json").read_text())
    assert figures == real_results.without_answers(figures), "texts or folders of a machine"
    for name in ("accuracy", "histograms", "curves"):
        with Image.open(docs / f"images/study_real_{name}.png") as picture:
            assert picture.info[study_results.DIGEST] == study_results.digest_of(figures)
    page = (docs / "study_real.md").read_text()
    parts = (
        real_results.accuracy_table, real_results.difference_table, real_results.forgetting_table,
        real_results.ending_table, real_results.preflight_table, real_results.rate_table,
    )  # fmt: skip
    for part in parts:
        lines = part(figures)
        assert "\n".join(lines[: lines.index("")]) in page  # the page wraps the text below


def test_page_states_how_many_answers_are_wrong_and_how_many_end():
    page = " ".join((ROOT / "docs/study_real.md").read_text().split("\n"))
    figures = json.loads((ROOT / "docs/study_real.json").read_text())
    name = "half known, 3 in 10 wrong"
    rows = figures["size"]["rows"]["half known"]
    counts = [count_wrong(name, rows, f"{name} {seed}") for seed in range(figures["size"]["seeds"])]
    shares = [f"{100 * count / rows:.0f}" for count in counts]
    assert (
        f"{counts[0]}, {counts[1]} and {counts[2]} of the {rows} answers are wrong, which is "
        f"{shares[0]}, {shares[1]} and {shares[2]} %"
    ) in page
    ended = [
        round(run["stopped"]["spelling"])
        for run in figures["runs"]
        if (run["method"], run["data"]) == ("DFT", "new")
    ]
    assert f"the seeds say {ended[0]}, {ended[1]} and {ended[2]} %" in page


def test_missing_package_is_one_error():
    code = "import sys; sys.modules['reasoning_gym'] = None; import scripts.study.real_tasks"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    expected = "error: the package reasoning-gym is missing; run: pip install -r requirements-real.txt\n"
    assert done.stderr == expected
