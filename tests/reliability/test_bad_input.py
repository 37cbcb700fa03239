"""Invalid input gives one message that names it, on every rank, and nothing is trained."""

import json
import re
from pathlib import Path

import pytest

from tests.launching import TIMEOUT, launch
from tests.reliability.corpus import CASES, FINE
from tests.reliability.spoiling import Case, Ground

TRYING = Path(__file__).parent / "trying.py"
TWO_RANKS = "test_invalid_input_gives_the_same_message_on_both_ranks"
Outcomes = list[dict[str, dict[str, str]]]
"""For each rank: the outcome of each case by its name."""


def words_of(case: Case, folder: Path, tiny: Path, run: Path | None = None, ranks: int = 1) -> list[str]:
    """Create the files of a case in its own folder and return its command line.

    Args:
        run: an output directory with checkpoints of 8 rows per step.
    """
    folder = folder / case.name
    folder.mkdir()
    settings = {
        "model_name_or_path": tiny,
        "data_files": tiny.parent / "a.jsonl",
        "output_dir": folder / "out",
        "data_cache_dir": folder / "cache",
        "max_steps": 1,
        "save_strategy": "no",
        "report": False,
        "use_cpu": True,
        "preprocessing_num_workers": 1,
        "per_device_train_batch_size": 8 // ranks,
        **case.spoil(Ground(folder, tiny, run)),
    }
    words = [*case.more]
    for name, value in settings.items():
        if value is not None and f"--{name}" not in case.more:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def write_table(tiny: Path, run: Path, folder: Path, ranks: int, cases: list[Case]) -> None:
    """Write the command lines of cases for `trying.py`."""
    rows = [
        {
            "name": case.name,
            "words": words_of(case, folder, tiny, run, ranks),
            # Only templates that never end get a shorter limit. The others must not depend on the machine's
            # speed: with 10 seconds of CPU time, they reach their own limit or end long before.
            "template_seconds": 1.0 if "computes more than" in case.message else None,
        }
        for case in cases
    ]
    (folder / "table.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def outcomes(request, tiny, forks, tmp_path_factory) -> dict[int, Outcomes]:
    """The outcomes by number of ranks, 1 and 2, which run concurrently. Only selected cases are run."""
    selected: dict[int, list[Case]] = {1: [], 2: []}
    for item in request.session.items:
        if item.module is request.module and "outcomes" in item.fixturenames:
            ranks = 2 if item.originalname == TWO_RANKS else 1
            selected[ranks].append(item.callspec.params["case"])
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}-") for ranks in (1, 2)}
    run = tmp_path_factory.mktemp("run") / "out"
    more = ["--max_steps", "2", "--save_steps", "1", "--report", "False", "--use_cpu", "True"]
    more += ["--model_name_or_path", str(tiny), "--data_files", str(tiny.parent / "a.jsonl")]
    (code,), printed = forks.run([*more, "--output_dir", str(run)])
    assert code == 0, printed
    for ranks, folder in folders.items():
        write_table(tiny, run, folder, ranks, selected[ranks])
    tables = [str(word) for ranks, folder in folders.items() for word in (folder, ranks)]
    (code,), printed = forks.run(tables, script=TRYING, MASTER_ADDR="127.0.0.1", TIME_LIMIT=str(3 * TIMEOUT))
    assert code == 0, printed  # of about 200 runs
    return {
        ranks: [json.loads((folder / f"outcomes.{rank}.json").read_text()) for rank in range(ranks)]
        for ranks, folder in folders.items()
    }


def by_name(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def check_refusal(case: Case, outcome: dict[str, str]) -> None:
    assert outcome["how"] == "refused", f"{outcome['how']}: {outcome['message']}\n{outcome['log']}"
    assert re.search(case.message, outcome["message"], re.DOTALL), outcome["message"]
    assert "Traceback" not in outcome["log"]


@by_name(CASES)
def test_invalid_input_gives_one_message(case, outcomes):
    check_refusal(case, outcomes[1][0][case.name])


# Every case is rejected before the ranks diverge, so the default run includes one in sixteen.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if number % 16 == 0 else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
)
def test_invalid_input_gives_the_same_message_on_both_ranks(case, outcomes):
    ended = [rank[case.name] for rank in outcomes[2]]
    # A rank that "followed" exited with the same code and left the message to the other rank.
    reporting = [outcome for outcome in ended if outcome["how"] != "followed"]
    for outcome in reporting:
        check_refusal(case, outcome)
    assert len({outcome["message"] for outcome in reporting}) == 1


@by_name(FINE)
def test_unusual_but_valid_input_trains(case, outcomes):
    outcome = outcomes[1][0][case.name]
    assert outcome["how"] == "went through", f"{outcome['message']}\n{outcome['log']}"
    assert re.search(case.message, outcome["log"], re.MULTILINE), outcome["log"]


@pytest.mark.slow  # the default run has one case in sixteen on two ranks, without a launcher
@pytest.mark.parametrize("name", ["data-cut-line", "zero3-nan", "deepspeed-unknown-key"])
def test_under_the_launcher_the_error_is_one_line_and_all_ranks_exit(tiny, tmp_path, name):
    case = next(case for case in CASES if case.name == name)
    words = words_of(case, tmp_path, tiny)
    finished = launch(words, folder=tmp_path, launcher="deepspeed")
    assert finished.code != 0 and "Traceback" not in finished.output
    errors = re.findall(r"^.*\berror: .*", finished.output, re.MULTILINE)
    assert len(errors) == 1, finished.output
    assert re.search(case.message, finished.output, re.DOTALL)
