"""The recipe of the paper: its settings, its data, and a run of all steps on stand-ins."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from dft.arguments.parser import parse_arguments
from dft.errors import UserError
from scripts.paper import prepare, table
from tests.launching import ROOT

PAPER = {
    "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.01, "max_grad_norm": 1.0, "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "num_train_epochs": 1, "bf16": True,
}  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    """A folder with the scripts and a stand-in for scripts/train.sh that prints its arguments."""
    (tmp_path / "scripts/paper").mkdir(parents=True)
    for name in ("environment.sh", "paper/train.sh", "paper/evaluate.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "scripts/train.sh").write_text(
        '#!/bin/bash\nprintf "%s\\n" "$MODEL" "$OUTPUT_DIR" "$@" "END"\n'
    )
    (tmp_path / "scripts/train.sh").chmod(0o755)
    return tmp_path


def run_shell_script(repository, *words, script="train.sh", **environment):
    return subprocess.run(
        ["bash", f"scripts/paper/{script}", *words], cwd=repository, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(repository), **environment}, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "per_device", "accumulated"), [("8", "4", 8), ("1", "16", 16), ("2", "1", 128)]
)
def test_settings_are_those_of_the_paper(repository, monkeypatch, gpus, per_device, accumulated):
    done = run_shell_script(repository, NUM_GPUS=gpus, PER_DEVICE=per_device)
    runs = [part.splitlines() for part in done.stdout.split("END\n")[:-1]]
    assert [run[:2] for run in runs] == [
        ["Qwen/Qwen2.5-Math-1.5B", "runs/paper/sft"], ["Qwen/Qwen2.5-Math-1.5B", "runs/paper/dft"]
    ]  # fmt: skip
    for run, alpha in zip(runs, (0.0, 1.0), strict=True):
        flags = run[2:]
        assert "--data_files" in flags and "runs/paper/data/train.jsonl" in flags
        arguments = parse_arguments(
            [
                *flags,
                "--model_name_or_path",
                "x",
                "--output_dir",
                str(repository / "out"),
                "--use_cpu",
                "True",
            ]
        )
        assert arguments.dft.dft_alpha == alpha and arguments.data.max_length == 2048
        assert arguments.model.torch_dtype == "bfloat16" and arguments.training.optim == "adamw_torch"
        for name, value in PAPER.items():
            assert vars(arguments.training)[name] == value, name
        steps = (
            arguments.training.per_device_train_batch_size * arguments.training.gradient_accumulation_steps
        )
        assert steps * int(gpus) == 256 and arguments.training.gradient_accumulation_steps == accumulated


def test_answers_are_sampled_as_in_the_paper(repository):
    python = repository / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" END\n')
    python.chmod(0o755)
    done = run_shell_script(repository, script="evaluate.sh", VIRTUAL_ENV=str(repository))
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("END\n")[0].splitlines()
    assert words[0] == "scripts/evaluate.py" and "base=Qwen/Qwen2.5-Math-1.5B" in words
    flags = {"--samples": "16", "--temperature": "1", "--top_p": "1", "--max_new_tokens": "4096"}
    assert {name: words[words.index(name) + 1] for name in flags} == flags
    assert [word for word in words if word.endswith(".jsonl")] == [
        f"runs/paper/data/{name}.jsonl" for name in prepare.BENCHMARKS
    ]


def test_a_batch_not_divisible_into_micro_batches_is_rejected(repository):
    done = run_shell_script(repository, NUM_GPUS="3")
    assert done.returncode == 2 and done.stdout == ""
    assert "3 processes x PER_DEVICE=4 do not divide 256 conversations per step" in done.stderr
    done = run_shell_script(repository, NUM_GPUS="8", METHODS="sft ppo")
    assert done.returncode == 2 and "ppo is neither sft nor dft" in done.stderr


TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": r"\boxed{2}"}]


@pytest.mark.parametrize(
    "row",
    [{"messages": TURNS, "problem": "?"}, {"problem": "1+1?", "solution": r"\boxed{2}", "messages": None}],
)
def test_training_rows_become_conversations(row):
    assert prepare.conversation(row, "x", None) == {"messages": TURNS}
    system = {"role": "system", "content": "Box it."}
    assert prepare.conversation(row, "x", "Box it.") == {"messages": [system, *TURNS]}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "Q", "answer": "42", "solution": "long"}, "42"),
        ({"question": "Q", "answer": r"$\frac{1}{2}$"}, r"\frac{1}{2}"),
        ({"question": "Q", "final_answer": ["$3$"]}, "3"),
        ({"question": "Q", "final_answer": ["1", "2"]}, "1, 2"),
        ({"question": "Q", "final_answer": ["$1$", "$2$"]}, "1, 2"),
        ({"question": "Q", "answer": "$5$ cm"}, "5 cm"),
        ({"question": "Q", "answer": r"($\$18.90$, $2$) "}, r"(\$18.90, 2)"),
        ({"problem": "Q", "solution": r"so \boxed{204}"}, "204"),
        ({"problem": "Q", "answer": r"\boxed{7}"}, "7"),
        ({"question": "Q", "answer": 27.0}, "27.0"),
        ({"question": "Q", "answer": 0}, "0"),
    ],
)
def test_benchmark_rows_become_problems(row, answer):
    assert prepare.problem(row, "x", None) == {
        "messages": [{"role": "user", "content": "Q"}],
        "answer": answer,
    }


def test_unknown_columns_are_an_error():
    with pytest.raises(UserError, match="x: it has the columns text; expected messages, or problem"):
        prepare.conversation({"text": "a"}, "x", None)
    with pytest.raises(UserError, match="x: it has the columns problem, solution; expected"):
        prepare.problem({"problem": "Q", "solution": "no box"}, "x", None)


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
        [{"role": "user", "content": None}],
        ["1+1?"],
        "1+1?",
    ],
)
def test_a_row_with_turns_without_role_or_content_is_an_error(tmp_path, monkeypatch, turns):
    good = [{"role": "user", "content": "1+1?"}]
    with pytest.raises(
        UserError, match=r"^x, row 3: a turn of its messages is .*expected the strings role and"
    ):
        prepare.conversation({"messages": turns}, "x, row 3", None)
    lines = [json.dumps({"messages": turns}) + "\n" for turns in (good, [{"role": None, "content": "2"}])]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    words = ["prepare.py", str(tmp_path / "out"), "--train", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(prepare, "report_user_errors", lambda: None)
    with pytest.raises(UserError, match="a.jsonl, row 2: a turn of its messages is {'role': None"):
        prepare.main()


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare, "report_user_errors", lambda: None)
    for folder in "file", "file/data":
        monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path / folder)])
        with pytest.raises(UserError, match=f"^folder .*{folder}: is not a folder; remove it or"):
            prepare.main()


def test_sources_are_loaded_and_sampled(tmp_path):
    rows = [{"problem": f"{n}?", "solution": str(n)} for n in range(50)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        loaded = prepare.load_rows(str(tmp_path / name))
        assert [loaded[index] for index in range(50)] == rows
    sampled = list(prepare.sample_rows(Dataset.from_list(rows), 10, seed=1))
    assert all(row == rows[number - 1] for number, row in sampled)
    assert sampled == list(prepare.sample_rows(Dataset.from_list(rows), 10, seed=1)) and len(sampled) == 10
    assert sampled != list(prepare.sample_rows(Dataset.from_list(rows), 10, seed=2))
    assert len(list(prepare.sample_rows(Dataset.from_list(rows), 99, seed=1))) == 50
    with pytest.raises(UserError, match="none.parquet: cannot be loaded"):
        prepare.load_rows(str(tmp_path / "none.parquet"))


def test_the_table_has_averages_and_marks_missing_values():
    for name, average in {"base": 15.92, "sft": 18.01, "dft": 31.58}.items():  # as printed in the paper
        assert sum(table.PUBLISHED[name]) / 5 == pytest.approx(average, abs=0.006)
    files = [{"file": name, "avg": {"value": 0.1 * number}} for number, name in enumerate(table.TITLES)]
    results = {"models": [{"name": "dft", "files": files}, {"name": "sft", "files": files[:2]}]}
    lines = table.table(results).splitlines()
    assert lines[4].startswith("| DFT | 64.89 / 0.00 | 20.94 / 10.00 |") and lines[4].endswith(
        "31.58 / 20.00 |"
    )
    assert lines[3].startswith("| SFT | 43.76 / 0.00 | 13.04 / 10.00 | 12.63 / – |") and lines[3].endswith(
        "/ – |"
    )
    assert lines[2].count("–") == 6
    shown = (ROOT / "scripts/paper/README.md").read_text()
    assert table.table({"models": []}) in shown


@pytest.mark.slow
def test_the_whole_recipe_runs_on_stand_ins(tmp_path):
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "scripts/paper/dry_run.sh", str(tmp_path)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    right = {model["name"]: [file["avg"]["value"] for file in model["files"]] for model in results["models"]}
    assert list(right) == ["base", "sft", "dft"] and all(len(values) == 5 for values in right.values())
    assert sum(right["sft"]) > sum(right["base"]), "SFT learns to repeat a number in a box"
    assert "| DFT | 64.89 /" in done.stdout
