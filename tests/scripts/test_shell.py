"""The shell scripts with a stand-in for deepspeed: the commands they start, their messages and exit codes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dft.loss.objectives import OBJECTIVES, parameters_of
from tests.launching import ROOT
from tests.reliability.selecting import mostly_slow

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
DATA = ("--data_files", "a.jsonl")


@pytest.fixture
def copy(tmp_path):
    """Copy the scripts to a temporary repository; return it and the bin folder of its environment."""
    root = tmp_path / "repo with space"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "dft").symlink_to(ROOT / "dft")
    bin_folder = tmp_path / "env" / "bin"
    bin_folder.mkdir(parents=True)
    # Not a symbolic link: Python would look for its packages next to the link.
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_folder / "python").chmod(0o755)
    return root, bin_folder


def fake_deepspeed(bin_folder: Path, body: str) -> None:
    (bin_folder / "deepspeed").write_text(f"#!/usr/bin/env bash\n{body}\n")
    (bin_folder / "deepspeed").chmod(0o755)


def start(copy, *words: str, **env: str | None) -> subprocess.Popen[str]:
    """Start train.sh without a GPU; a variable set to None is removed from its environment."""
    root, bin_folder = copy
    env = {**os.environ, "VIRTUAL_ENV": str(bin_folder.parent), "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.Popen(
        [str(root / "scripts" / "train.sh"), *words],
        cwd="/",
        env={name: value for name, value in env.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(copy, *words: str, **env: str | None) -> tuple[int, str, str]:
    process = start(copy, *words, **env)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_failure(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.name == "environment.sh" or "set -euo pipefail" in script.read_text()


WITH_HELP = [*SCRIPTS, *sorted((ROOT / "scripts/paper").glob("*.sh"))]


@pytest.mark.parametrize("script", WITH_HELP, ids=lambda path: path.name)
def test_help_only_prints_the_comment_at_the_top(script, tmp_path):
    if script.name == "environment.sh":
        pytest.skip("sourced by the other scripts")
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, timeout=20, cwd=tmp_path, check=False,
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    comment = [line[2:] for line in script.read_text().split("set -euo")[0].splitlines()[1:]]
    assert done.stdout.splitlines() == comment and len(comment) > 1
    assert not list(tmp_path.iterdir())


def test_the_reason_for_a_failure_is_the_last_line_of_the_log_and_of_stderr(copy):
    fake_deepspeed(
        copy[1], 'echo "error: --max_length 0: too short"; echo "[ERROR] launch.py: exits"; exit 2'
    )
    code, _, errors = run(copy, *DATA, MODEL="m")
    (log,) = (copy[0] / "logs").glob("train_*.log")
    expected = ["error: --max_length 0: too short", f"error: training ended with exit code 2; see {log}"]
    assert code == 2 and errors.splitlines() == log.read_text().splitlines()[-2:] == expected


def test_trackers_write_into_the_output_folder_unless_logging_dir_is_set(copy):
    fake_deepspeed(copy[1], 'printf "%s\\n" "$@"')
    for words, env, expected in (
        ((), {}, "outputs/dft/logs"),
        (("--output_dir", "there"), {}, "there/logs"),
        (("--output_dir=there",), {"LOGGING_DIR": "elsewhere"}, "elsewhere"),
    ):
        _, output, _ = run(copy, *DATA, *words, MODEL="m", SHOW_LOG="1", **env)
        command = output.splitlines()
        assert command[command.index("--logging_dir") + 1] == expected


def test_train_starts_from_any_folder_and_prints_the_path_of_the_log(copy):
    fake_deepspeed(copy[1], 'printf "%s\\n" "$PWD" "$@"; echo to-stderr >&2')
    code, output, errors = run(copy, *DATA, "--learning_rate", "1e-6", MODEL="/models/a b", OUTPUT_DIR="out")
    assert code == 0, errors
    (log,) = (copy[0] / "logs").glob("train_*.log")
    assert f"log: {log}" in output and f"tail -f {log}" in output
    lines = log.read_text().splitlines()
    assert lines[1] == str(copy[0])
    assert "to-stderr" in lines and "/models/a b" in lines
    words = lines[2:]
    for flag, value in {
        "--num_accelerators": "2",
        "--dft_alpha": "0.7",
        "--deepspeed": "./ds_config/zero3.json",
        "--validation_split_percentage": "2.0",
        "--data_files": "a.jsonl",
    }.items():
        assert words[words.index(flag) + 1] == value
    assert words.count("--learning_rate") == 1 and words[words.index("--learning_rate") + 1] == "1e-6"


@pytest.mark.parametrize(
    "words", [("--max_length", "64"), ("--max_length=64",), ("--max-length", "64"), ("--max-length=64",)]
)
def test_flags_given_on_the_command_line_replace_the_defaults(copy, words):
    fake_deepspeed(copy[1], 'printf "%s\\n" "$@"')
    code, output, errors = run(copy, *DATA, *words, MODEL="m", SHOW_LOG="1")
    assert code == 0, errors
    command = output.splitlines()
    assert "8192" not in command
    assert [word for word in command if word.startswith(("--max_length", "--max-length"))] == [words[0]]
    assert command[command.index("--packing") + 1] == "False"


@pytest.mark.parametrize(
    ("words", "alphas"),
    [
        ((), ["0.9"]),
        pytest.param(("--objective", "asft"), ["0.9"], marks=pytest.mark.slow),
        (("--objective", "power", "--objective=dft"), ["0.9"]),
        (("--dft_alpha", "0.4"), ["0.4"]),
        (("--dft-alpha=0.4",), []),
        (("--objective", "power"), []),
        (("--objective=eaft",), []),
        pytest.param(("--objective", "power", "--dft_alpha", "0.4"), ["0.4"], marks=pytest.mark.slow),
    ],
)
def test_the_default_alpha_is_passed_only_to_objectives_that_have_one(copy, words, alphas):
    fake_deepspeed(copy[1], 'printf "%s\\n" "$@"')
    code, output, errors = run(copy, *DATA, *words, MODEL="m", DFT_ALPHA="0.9", SHOW_LOG="1")
    assert code == 0, errors
    command = output.splitlines()
    assert [command[at + 1] for at, word in enumerate(command) if word == "--dft_alpha"] == alphas


@pytest.mark.parametrize(("objective", "alphas"), [("power", []), ('"dft"', ["0.7"])])
def test_the_objective_is_also_read_from_a_config_file(copy, tmp_path, objective, alphas):
    (tmp_path / "run.yaml").write_text(f"learning_rate: 1e-6\nobjective: {objective}\n")
    fake_deepspeed(copy[1], 'printf "%s\\n" "$@"')
    _, output, errors = run(copy, *DATA, "--config", str(tmp_path / "run.yaml"), MODEL="m", SHOW_LOG="1")
    command = output.splitlines()
    assert [command[at + 1] for at, word in enumerate(command) if word == "--dft_alpha"] == alphas, errors


@pytest.mark.parametrize(
    ("files", "alphas", "as_one_flag"),
    [
        pytest.param(("power", None), [], True, marks=pytest.mark.slow),
        (("power", None), [], False),
        (("power", "dft"), ["0.7"], True),
        pytest.param(("power", "dft"), ["0.7"], False, marks=pytest.mark.slow),
        pytest.param(("dft", "power"), [], True, marks=pytest.mark.slow),
        pytest.param(("dft", "power"), [], False, marks=pytest.mark.slow),
    ],
)
def test_the_objective_is_read_from_the_last_config_file_that_has_one(
    copy, tmp_path, files, alphas, as_one_flag
):
    words = []
    for number, objective in enumerate(files):
        file = tmp_path / f"{number} file.yaml"
        file.write_text(f"objective: {objective}\n" if objective else "learning_rate: 1e-6\n")
        words += [str(file)] if words and as_one_flag else ["--config", str(file)]
    fake_deepspeed(copy[1], 'printf "%s\n" "$@"')
    _, output, errors = run(copy, *DATA, *words, MODEL="m", SHOW_LOG="1")
    command = output.splitlines()
    assert command.count("--config") == (1 if as_one_flag else 2)
    assert [command[at + 1] for at, word in enumerate(command) if word == "--dft_alpha"] == alphas, errors


def test_output_and_data_flags_may_be_written_with_dashes(copy):
    fake_deepspeed(copy[1], 'printf "%s\n" "$@"')
    code, output, errors = run(
        copy, "--model-name-or-path=m", "--data-files", "a.jsonl", "--output-dir", "there", SHOW_LOG="1"
    )
    assert code == 0, errors
    command = output.splitlines()
    assert command[command.index("--logging_dir") + 1] == "there/logs"
    assert not {"--model_name_or_path", "--data_files", "--output_dir"} & set(command)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reall",), "unknown argument --reall; usage: bash scripts/quickstart.sh [--real] [FOLDER]"),
        (("-r",), "unknown argument -r; usage: bash scripts/quickstart.sh [--real] [FOLDER]"),
        (("a", "--real"), "unexpected argument --real; usage: bash scripts/quickstart.sh [--real] [FOLDER]"),
        (("--real", "--cpu"), "unknown argument --cpu; usage: bash scripts/quickstart.sh --real [FOLDER]"),
        (("--real", "a", "b"), "unexpected argument b; usage: bash scripts/quickstart.sh --real [FOLDER]"),
        (("file/a",), "FOLDER file/a cannot be used; usage: bash scripts/quickstart.sh [--real] [FOLDER]"),
    ],
)
def test_wrong_arguments_of_the_quickstarts_are_usage_errors(copy, tmp_path, words, message):
    root, bin_folder = copy
    (tmp_path / "file").touch()
    done = subprocess.run(
        ["bash", root / "scripts/quickstart.sh", *words], capture_output=True, text=True, timeout=20,
        cwd=tmp_path, check=False, env={**os.environ, "VIRTUAL_ENV": str(bin_folder.parent)},
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["env", "file", "repo with space"]


def test_no_objective_is_named_in_the_script():
    code = (ROOT / "scripts/train.sh").read_text().split("# Nothing below this line needs editing.")[1]
    assert not [name for name in OBJECTIVES if re.search(rf"\b{name}\b", code.replace("dft.loss", ""))]


@pytest.mark.parametrize("objective", mostly_slow(OBJECTIVES, ["asft"]))
def test_alpha_is_passed_only_to_objectives_that_have_one(copy, objective):
    fake_deepspeed(copy[1], 'printf "%s\\n" "$@"')
    code, output, errors = run(copy, *DATA, "--objective", objective, MODEL="m", SHOW_LOG="1")
    assert code == 0, errors
    assert ("--dft_alpha" in output.splitlines()) == ("alpha" in parameters_of(objective))


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [
        (DATA, {}, "MODEL is still /path/to/model: set it at the top of scripts/train.sh"),
        ((), {"MODEL": "m"}, "DATA_FILES is still /path/to/train.jsonl"),
        (DATA, {"MODEL": "m", "NUM_GPUS": "3"}, "NUM_GPUS=3, but no GPU is visible here"),
    ],
)
def test_placeholders_that_were_not_edited_are_named(copy, words, env, message):
    fake_deepspeed(copy[1], "echo started")
    code, output, errors = run(copy, *words, **env)
    assert code != 0 and message in errors and "started" not in output


@pytest.mark.parametrize(
    ("env", "chosen"),
    [
        ({}, "--include localhost:0,1,2,3"),
        ({"NUM_GPUS": "2"}, "--num_gpus 2"),
        ({"GPU_IDS": "1,3"}, "--include localhost:1,3"),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, "--include localhost:2,3"),
        ({"CUDA_VISIBLE_DEVICES": "1,2,3", "NUM_GPUS": "2"}, "--include localhost:1,2"),
        ({"NUM_GPUS": "0"}, "--num_accelerators 2"),
        ({"NUM_GPUS": "8"}, "NUM_GPUS=8, but the visible GPUs are 0,1,2,3"),
        ({"NUM_GPUS": "all"}, "NUM_GPUS=all: must be auto or a number"),
    ],
)
def test_the_requested_gpus_are_used(copy, env, chosen):
    fake_deepspeed(copy[1], 'echo "$1 $2"')
    # The real command prints line by line with pauses, so a reader that exits early breaks the pipe.
    nvidia_smi = copy[1] / "nvidia-smi"
    nvidia_smi.write_text('#!/usr/bin/env bash\nfor i in 0 1 2 3; do echo "GPU $i: H100"; sleep 0.05; done\n')
    nvidia_smi.chmod(0o755)
    env = {"MODEL": "m", "SHOW_LOG": "1", "CUDA_VISIBLE_DEVICES": None, **env}
    _, output, errors = run(copy, *DATA, **env)
    assert chosen in output + errors


def test_the_exit_code_of_training_is_passed_on(copy):
    fake_deepspeed(copy[1], "exit 7")
    code, _, errors = run(copy, *DATA, MODEL="m")
    assert code == 7 and "training ended with exit code 7" in errors


def test_runs_that_start_at_once_get_different_ports_and_logs(copy):
    fake_deepspeed(copy[1], 'while [[ $1 != --master_port ]]; do shift; done; echo "port $2"; sleep 2')
    runs = [start(copy, *DATA, MODEL="m", SHOW_LOG="1") for _ in range(4)]
    outputs = [process.communicate(timeout=240)[0] for process in runs]
    ports = {line for output in outputs for line in output.splitlines() if line.startswith("port ")}
    logs = {line for output in outputs for line in output.splitlines() if line.startswith("log: ")}
    assert len(ports) == len(logs) == 4 and all(process.returncode == 0 for process in runs)


def test_a_signal_ends_every_process(copy, tmp_path):
    pids = tmp_path / "pids"
    fake_deepspeed(copy[1], f'sleep 300 & echo $$ $! >"{pids}"; wait')
    process = start(copy, *DATA, MODEL="m")
    deadline = time.monotonic() + 30
    while not (pids.is_file() and pids.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "ended by SIGTERM before training began" in errors
    for pid in map(int, pids.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


LAUNCHER = """
rank() {{ {rank}; }}
launch() {{ rank & wait $!; exit $?; }}
[[ $1 != ranks ]] || {{ shift; "$@"; exit; }}
launch & wait $!; exit $?
"""
"""A process with a child and a grandchild, like deepspeed, its launcher and a rank."""


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.is_file() and path.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


def fake_ranks(copy, rank: str) -> None:
    fake_deepspeed(copy[1], LAUNCHER.format(rank=rank))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "name"), [("TERM", "SIGTERM"), ("USR1", "SIGUSR1"), ("INT", "SIGINT")])
def test_a_signal_reaches_the_ranks_and_they_have_time_to_save(copy, tmp_path, number, name):
    fake_ranks(
        copy, f'trap "sleep 1; echo saved >>{tmp_path}/saved; exit 75" {number}; '
        f"echo $BASHPID >{tmp_path}/pid; while true; do sleep 0.1; done",
    )  # fmt: skip
    process = start(copy, *DATA, "--save_only_model", "False", MODEL="m", MAX_RESTARTS="3")
    rank = int(wait_for(tmp_path / "pid"))
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "saved").is_file() and not is_running(rank)
    assert f"{name}: finishing the step and saving" in errors and "everything is saved" in errors


def test_a_second_signal_ends_the_run_at_once(copy, tmp_path):
    fake_ranks(copy, f'trap "" TERM; echo $BASHPID >{tmp_path}/pid; while true; do sleep 0.1; done')
    process = start(copy, *DATA, MODEL="m")
    rank = int(wait_for(tmp_path / "pid"))
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # far less than GRACE = 1,800 seconds
    assert process.returncode == 143 and not is_running(rank)
    assert "ended at once by a second signal; there is no checkpoint" in errors


def test_a_rank_that_does_not_save_in_time_is_killed(copy, tmp_path):
    fake_ranks(copy, f'trap "" TERM; echo $BASHPID >{tmp_path}/pid; while true; do sleep 0.1; done')
    process = start(copy, *DATA, MODEL="m", GRACE="1")
    rank = int(wait_for(tmp_path / "pid"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and not is_running(rank)
    assert "ended after 1 s without a checkpoint being saved; there is no checkpoint" in errors


def test_killing_the_launcher_ends_all_ranks(copy, tmp_path):
    fake_ranks(copy, f"echo $BASHPID $PPID >{tmp_path}/pid; exec sleep 300")
    process = start(copy, *DATA, MODEL="m")
    rank, _ = map(int, wait_for(tmp_path / "pid").split())
    (deepspeed,) = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "deepspeed"], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(deepspeed), signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode != 0 and not is_running(rank)


CRASHES = """
step=$(ls -d {output}/checkpoint-* 2>/dev/null | wc -l)
echo "attempt at $step: $*" >>{output}/attempts
{then}
exit 9
"""


@pytest.mark.parametrize(
    ("then", "restarts", "attempts", "code"),
    [
        ("((step >= 2)) && exit 0; mkdir {output}/checkpoint-$((step + 1))", 3, 3, 0),
        ("mkdir {output}/checkpoint-$((step + 1))", 2, 3, 9),
        ("mkdir {output}/incomplete-checkpoint-$RANDOM", 5, 2, 9),
        ("exit 2", 5, 1, 2),
        ("exit 75", 5, 1, 75),
        ("mkdir {output}/checkpoint-$((step + 1))", 0, 1, 9),
    ],
    ids=["finishes", "too-often", "no-progress", "refused", "stopped", "not-asked-for"],
)
def test_restarts_resume_and_stop_without_progress(copy, tmp_path, then, restarts, attempts, code):
    output = tmp_path / "run"
    output.mkdir()
    fake_deepspeed(copy[1], CRASHES.format(output=output, then=then.format(output=output)))
    words = (*DATA, "--save_only_model", "False", "--output_dir", str(output))
    ended, _, errors = run(copy, *words, MODEL="m", MAX_RESTARTS=str(restarts))
    attempt_lines = (output / "attempts").read_text().splitlines()
    assert (len(attempt_lines), ended) == (attempts, code), errors
    assert all("--resume_from_checkpoint auto" in line for line in attempt_lines[1:])
    if restarts:
        assert "--resume_from_checkpoint auto" in attempt_lines[0]


@pytest.mark.parametrize("saves", [True, False])
def test_exit_code_76_restarts_with_the_smaller_batch(copy, tmp_path, saves):
    """Exit code 76 does not count as a crash."""
    output = tmp_path / "run"
    output.mkdir()
    then = '(($(wc -l <"{output}/attempts") >= 3)) && exit 0; ' + saves * "mkdir -p {output}/checkpoint-1; "
    then = then.format(output=output) + "exit 76"
    fake_deepspeed(copy[1], CRASHES.format(output=output, then=then))
    code, printed, _ = run(copy, *DATA, "--output_dir", str(output), MODEL="m")
    attempt_lines = (output / "attempts").read_text().splitlines()
    assert (
        code == 0 and len(attempt_lines) == 3 and printed.count("restarting with a smaller batch size") == 2
    )
    assert all(("--resume_from_checkpoint auto" in line) == saves for line in attempt_lines[1:])


def test_restarts_need_checkpoints_that_can_be_resumed(copy):
    fake_deepspeed(copy[1], "echo started")
    code, output, errors = run(copy, *DATA, MODEL="m", MAX_RESTARTS="2")
    assert code == 2 and "set --save_only_model False" in errors and "started" not in output


def test_rerunning_setup_does_not_install_anything():
    finished = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh"), "--dev"],
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [f"environment ready: {sys.prefix}"]


PIP = """#!/usr/bin/env bash
[[ "$*" == *"-m pip install"* ]] || exec {python} "$@"
echo "Collecting torch==2.13.0"
echo "  Downloading torch-2.13.0.whl.metadata (28 kB)"
echo "Downloading torch-2.13.0-cp311.whl (800.0 MB)"
echo "Using cached numpy-2.2.0-cp311.whl (16.0 MB)"
sleep 0.2
echo "Installing collected packages: numpy, torch"
sleep 2.5
{end}
"""


def setup_with_pip(tmp_path: Path, end: str) -> subprocess.CompletedProcess[str]:
    """Run setup.sh in an environment without packages, with a stand-in for pip that takes 2.7 seconds."""
    root, environment = tmp_path / "repo", tmp_path / "env"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "requirements.txt").write_text("no-such-package==1.0\n")
    script = root / "scripts" / "setup.sh"
    script.write_text(script.read_text().replace("PROGRESS_INTERVAL=10", "PROGRESS_INTERVAL=1"))
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(PIP.format(python=sys.executable, end=end))
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "VIRTUAL_ENV": str(environment), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_setup_prints_a_line_per_package_and_one_while_pip_is_silent(tmp_path):
    finished = setup_with_pip(tmp_path, "exit 0")
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if not line.startswith("  downloading (")]
    assert lines[:4] == [
        "installing: no-such-package==1.0",
        "  Downloading torch-2.13.0-cp311.whl (800.0 MB)",
        "  Using cached numpy-2.2.0-cp311.whl (16.0 MB)",
        "  installing 2 packages",
    ]
    assert lines[4].startswith("  installed 0 of 2 packages (") and lines[-1].startswith("environment ready")


def test_setup_fails_when_pip_does(tmp_path):
    finished = setup_with_pip(tmp_path, "echo 'ERROR: no space left' >&2; exit 1")
    assert finished.returncode == 2 and "environment ready" not in finished.stdout
    assert finished.stderr.splitlines() == [
        "ERROR: no space left",
        "error: pip could not install requirements.txt",
    ]


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--dve"], sys.prefix, "unknown argument --dve"),
        ([], "/nowhere", "/nowhere is not a Python environment"),
    ],
)
def test_setup_rejects_unknown_arguments_and_broken_environments(words, environment, message):
    finished = subprocess.run(
        ["bash", str(ROOT / "scripts" / "setup.sh"), *words],
        env={**os.environ, "VIRTUAL_ENV": environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode != 0 and message in finished.stderr


def test_unmet_requirements_are_listed(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# a comment\ntorch==0.1\nno-such-package==1.0  # why\npytest==" + pytest.__version__ + "\n"
    )
    words = [sys.executable, str(ROOT / "scripts" / "check_requirements.py"), str(file)]
    finished = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.split() == ["torch==0.1", "no-such-package==1.0"]
