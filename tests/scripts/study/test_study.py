"""The tasks of the study, its tables and pictures, and a quick run of all steps."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dft.errors import UserError
from scripts.study import study, study_answers, study_results, study_runs, study_task
from tests.launching import ROOT

LINE = re.compile(r"(\d+)([+-])(\d+)=(\d+)")
SMALL = study.QUICK


def parse_chain(text: str) -> tuple[list[tuple[int, str, int, int]], int]:
    """Return the steps of an answer as (number, sign, number, result), and its final result."""
    *steps, last = text.splitlines()
    groups = [LINE.fullmatch(step).groups() for step in steps]
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in groups], int(last.removeprefix("#### "))


def count_wrong_steps(row: dict) -> int:
    """Return the number of wrong steps, after checking that each step continues from the one before."""
    question, answer = (turn["content"] for turn in row["messages"])
    sign = "-" if "-" in question else "+"
    numbers = list(map(int, question.split(sign)))
    steps, result = parse_chain(answer)
    assert [step[2] for step in steps] == numbers[1:] and steps[0][0] == numbers[0] and steps[-1][3] == result
    assert all(before[3] == after[0] for before, after in zip(steps, steps[1:], strict=False))
    assert {step[1] for step in steps} == {sign}
    right = [first + second if sign == "+" else first - second for first, _, second, _ in steps]
    wrong = sum(result != step[3] for result, step in zip(right, steps, strict=True))
    total = sum(numbers) if sign == "+" else numbers[0] - sum(numbers[1:])
    assert (result == total) == (wrong == 0)
    return wrong


def test_wrong_answers_have_one_wrong_step():
    generator = random.Random(0)
    for task in study_task.TASKS:
        rows = [study_task.conversation(generator, task, count) for count in (2, 3, 5) for _ in range(200)]
        assert not any(map(count_wrong_steps, rows))
    wrong = [count_wrong_steps(study_task.conversation(generator, "sums", 3, wrong=0.3)) for _ in range(2000)]
    assert set(wrong) == {0, 1} and 0.25 < sum(wrong) / len(wrong) < 0.35
    assert study_task.chain([10, 20, 30], "+", wrong_step=0, slip=1) == "10+20=31\n31+30=61\n#### 61"
    assert study_task.chain([200, 20, 30], "-") == "200-20=180\n180-30=150\n#### 150"


def test_data_is_reproducible_and_differs_between_seeds(tmp_path):
    for folder in ("one", "two"):
        study_task.write_data(tmp_path / folder, SMALL)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    first, second = ([(tmp_path / folder / name).read_bytes() for name in files] for folder in ("one", "two"))
    assert first == second
    names = [study_task.tuning_file(data, seed) for data in study_task.DATA for seed in (-1, 0, 1)]
    tuning = [(tmp_path / "one" / name).read_text() for name in names]
    assert len(set(tuning)) == len(tuning)
    questions = {line.split('"content": "')[1].split('"')[0] for text in tuning for line in text.splitlines()}
    longest = max(len(re.findall("[+-]", question)) for question in questions)
    for task in study_task.TASKS:
        for name, count in study_task.SETS.items():
            for line in (tmp_path / "one" / f"{task}-{name}.jsonl").read_text().splitlines():
                asked = json.loads(line)["messages"][0]["content"]
                assert len(re.findall("[+-]", asked)) == count - 1 and not count_wrong_steps(json.loads(line))
    assert longest < study_task.SETS["five"] - 1, "problems of five are longer than those fine-tuned on"
    pretraining = (tmp_path / "one/pretraining.jsonl").read_text()
    assert re.search(r"\d-\d", pretraining) is None, "differences are new to the base model"


def results_with(accuracies: dict[str, list[float]]) -> dict:
    histogram = [1] + [0] * 18 + [3]
    runs = [
        {
            "method": method, "data": data, "seed": seed, "rate": 1e-4, "histogram": histogram,
            "right": {asked: value if "three" in asked else value / 2 for asked in of_data.asked},
        }
        for method, values in accuracies.items() for data, of_data in study_task.DATA.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    others = [
        {**run, "rate": 1e-3, "right": {asked: value + 8 for asked, value in run["right"].items()}}
        for run in runs if run["data"] == study_task.WRONG
    ]  # fmt: skip
    asked = {asked for _, asked in study_task.COLUMNS}
    kinds = {"sums": "right sums", "differences": "differences"}
    rates = [
        {"method": method, "data": data, "seed": -1, "rate": rate, "accuracy": 51.0}
        for method in study_results.ALPHAS for data in kinds.values() for rate in SMALL.rates["sums"]
    ]  # fmt: skip
    return {
        "size": SMALL._asdict(), "base": dict.fromkeys(asked, 50.0), "runs": runs, "rates": rates,
        "at_other_rates": others,
        "before": dict.fromkeys(study_task.DATA, [2] + [1] * 18 + [0]),
        "left_out": dict.fromkeys(asked, 0) | {"sums-three": 1},
    }  # fmt: skip


def test_tables_and_intervals():
    """60, 62, 64: the mean is 62, the standard error 2 / sqrt(3), times 4.303. DFT minus SFT: 10, 8, 9."""
    results = results_with(
        {"SFT": [60.0, 62.0, 64.0], "alpha 0.5": [1.0, 1.0, 1.0], "DFT": [70.0, 70.0, 73.0]}
    )
    mean = study_results.accuracy(results, "SFT", "right sums", "sums-three")
    assert mean.value == 62 and mean.half == pytest.approx(4.303 * 2 / 3**0.5)
    text = study_results.tables(results)
    assert "| SFT | 62.0 ± 5.0 | 31.0 ± 2.5 | 62.0 ± 5.0 | 31.0 ± 2.5 | 62.0 ± 5.0 |" in text
    assert "| differences | base | 10.00 % | 90.00 % | 0.00 % |  |" in text
    assert "| DFT | +9.0 ± 2.5 | +4.5 ± 1.2 | +9.0 ± 2.5 | +4.5 ± 1.2 | +9.0 ± 2.5 |" in text
    assert "Of the 4 problems those that a model was not trained on, at least 3." in text
    assert "| right sums | DFT | 25.00 % | 0.00 % | 75.00 % | 0.0001 |" in text
    wrong = "\n".join(study_results.wrong_data_table(results))
    assert "| 0.0001, sums of three | 62.0 ± 5.0 | 1.0 ± 0.0 | 71.0 ± 4.3 |" in wrong
    assert (
        "| 0.001, sums of three | 70.0 ± 5.0 | 9.0 ± 0.0 | 79.0 ± 4.3 | -61.0 ± 5.0 | +9.0 ± 2.5 |" in wrong
    )
    assert "| 0.001, sums of five | 39.0 ± 2.5 | 8.5 ± 0.0 | 43.5 ± 2.2 |" in wrong
    for figure in (study_results.accuracy_figure(results), study_results.histogram_figure(results)):
        assert [axes.get_title() for axes in figure.axes] == [
            f"fine-tuned on: {name}" for name in study_task.DATA
        ]


def test_histogram_tick_labels_are_plain_numbers():
    """write_png does not parse math text, so math text in labels would appear literally."""
    results = results_with(dict.fromkeys(study_results.ALPHAS, [60.0, 62.0]))
    axis = study_results.histogram_figure(results).axes[0].yaxis
    axis.axes.set_ylim(1e-3, 1)
    texts = [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]
    assert {"0.1 %", "1 %", "10 %", "100 %"} <= set(texts) and not any("$" in text for text in texts)


def test_problems_in_the_training_data_are_left_out(tmp_path):
    def rows(name: str, *numbers: list[int]):
        file = tmp_path / name
        turns = [("+".join(map(str, summands)), study_task.chain(summands)) for summands in numbers]
        messages = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
        study_task.write_rows(file, [{"messages": turns} for turns in messages])
        return file

    problems = rows("problems.jsonl", [10, 20, 30], [11, 20, 30], [12, 20, 30])
    answers = tmp_path / "answers.jsonl"
    grades = {3: [True, False], 1: [True, True], 2: [False, False]}
    study_task.write_rows(
        answers,
        [{"line": n, "samples": [{"right": grade} for grade in of_line]} for n, of_line in grades.items()],
    )
    base, tuning = rows("base.jsonl", [10, 20], [30, 20, 10]), rows("tuning.jsonl", [10, 20, 30])
    assert study_answers.score_unseen(answers, problems, (base,)) == (50.0, 0)
    assert study_answers.score_unseen(answers, problems, (base, tuning)) == (25.0, 1)
    with pytest.raises(UserError, match=r"problems.jsonl: the models were trained on all of its problems"):
        study_answers.score_unseen(answers, problems, (problems,))


def test_a_folder_of_a_different_study_is_rejected(tmp_path):
    """Otherwise a full study would silently reuse the base model of a quick one."""
    folder = tmp_path / "new/study"
    for _ in range(2):
        with study.claim_folder(folder, study.QUICK._asdict()):
            pass
    changed = {**study.QUICK._asdict(), "seeds": 9}
    with (
        pytest.raises(UserError, match=r"study with other settings \(seeds\); name another folder"),
        study.claim_folder(folder, changed),
    ):
        pass
    (tmp_path / "other/base").mkdir(parents=True)
    with (
        pytest.raises(UserError, match="other: holds something else than a study; name another folder"),
        study.claim_folder(tmp_path / "other", study.FULL._asdict()),
    ):
        pass


def test_a_second_process_on_the_folder_of_a_study_is_rejected(tmp_path):
    with (
        study.claim_folder(tmp_path / "study", study.QUICK._asdict()),
        pytest.raises(UserError, match="another process is running a study in it"),
        study.claim_folder(tmp_path / "study", study.QUICK._asdict()),
    ):
        pass
    # A study that was ended before it recorded anything is started again.
    (tmp_path / "study/size.json").unlink()
    with study.claim_folder(tmp_path / "study", study.QUICK._asdict()):
        pass


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/study")):
        with pytest.raises(UserError, match=f"folder {folder}"), study.claim_folder(folder, {}):
            pass


@pytest.mark.parametrize("content", ["", '{"right": {', "[1]"])
def test_a_damaged_result_is_one_error_that_names_the_file(tmp_path, content):
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(UserError, match="result.json: is damaged .* remove it to compute it again"):
        study_runs.read_result(file)


def test_scripts_end_with_a_study_that_is_killed(tmp_path):
    """Otherwise they would go on writing to the folder in which the study is resumed."""
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        f"import os, time\nopen({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))\n"
        f"os.replace({str(tmp_path / 'new')!r}, {str(pid)!r})\ntime.sleep(60)\n"
    )
    code = (
        "from pathlib import Path; from scripts.study import study_runs; study_runs.PRELOADED.clear(); "
        f"study_runs.prepare(); study_runs.run_script(Path({str(script)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        assert wait_until(pid.is_file, 60)
        process.kill()
        process.wait(10)
        assert wait_until(lambda: not Path("/proc", pid.read_text()).exists(), 10)
    finally:
        process.kill()


def wait_until(condition, seconds):
    """Return whether a condition becomes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_best_rate_is_selected_for_each_method_and_task():
    runs = {
        study.Run("SFT", "right sums", -1, 1e-4): 50.0, study.Run("SFT", "right sums", -1, 1e-3): 51.0,
        study.Run("SFT", "differences", -1, 1e-4): 9.0, study.Run("SFT", "differences", -1, 1e-3): 8.0,
    }  # fmt: skip
    assert study.best_rates(runs) == {("SFT", "sums"): 1e-3, ("SFT", "differences"): 1e-4}


def test_documents_and_pictures_match_the_results():
    results = json.loads((ROOT / "docs/study.json").read_text())
    assert results["size"] == json.loads(json.dumps(study.FULL._asdict()))
    text = (ROOT / "docs/study.md").read_text()
    for part in study_results.tables(results).strip().split("\n\n"):
        assert part in text
    for name in ("study_accuracy.png", "study_histograms.png"):
        with Image.open(ROOT / "docs/images" / name) as picture:
            assert picture.text[study_results.DIGEST] == study_results.digest_of(results), name
    accuracies = study_results.tables(results).split("\n\n")[0]
    figure = re.compile(r"[\d.]+ ± [\d.]+")
    assert figure.findall(accuracies) == figure.findall(text)[: len(figure.findall(accuracies))]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_shows_the_figures_of_the_study_on_a_pretrained_model(name):
    results = json.loads((ROOT / "docs/study_real.json").read_text())
    text = (ROOT / name).read_text()
    wrong, task = "half known, 3 in 10 wrong", "short arithmetic"
    figures = [
        study_results.accuracy(results, method, data, asked)
        for method, data, asked in (("DFT", wrong, task), ("SFT", wrong, task), ("SFT", "new", "spelling"))
    ]
    assert all(f" {figure.value:.1f} %" in text for figure in figures)
    assert study_results.accuracy(results, "DFT", "new", "spelling").value == 0
    difference = study_results.difference_to_sft(results, "DFT", wrong, task)
    assert f"{difference.value:+.1f} ± {difference.half:.1f}" in text
    for data in ("half known", "new"):
        assert f"{results['base']['training'][data]['whole']['avg_p_correct']:.2f}" in text


@pytest.fixture
def environment(monkeypatch):
    """Restore the environment variables that `study_runs.prepare` sets."""
    for name in (*study_runs.SETTINGS, "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    study_runs.prepare()


def test_a_failed_script_ends_the_study_with_its_output(environment, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)evaluate.py --model .*failed with exit code 1:.*gone.jsonl"):
        study_runs.run_script(
            ROOT / "scripts/evaluate.py", "--model", tmp_path, "--data", tmp_path / "gone.jsonl",
            "--output", tmp_path / "asked",
        )  # fmt: skip


@pytest.mark.slow
def test_a_quick_study_runs(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py", str(tmp_path), "--quick"])
    study.main()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    results = json.loads((tmp_path / "study.json").read_text())
    weights = [
        (tmp_path / folder / "model.safetensors").read_bytes()
        for folder in ("base", *(f"runs/{method}-right_sums-0-0.001" for method in ("SFT", "DFT")))
    ]
    assert len(set(weights)) == 3, "fine-tuning changes the base model, and alpha has an effect"
    assert len(results["runs"]) == len(study_results.ALPHAS) * len(study_task.DATA) * SMALL.seeds
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("accuracy.png", "histograms.png"))
