"""scripts/train_multinode.sh and train.slurm with two nodes, simulated by two launchers on one machine."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dft.errors import EXIT_STOPPED, EXIT_USER_ERROR
from tests.launching import ROOT, free_port
from tests.reliability.test_train_script import FLAGS as ALL_FLAGS

LIMIT = 120
"""Maximum seconds of one run; they take 10 to 30."""
FLAGS = {
    **ALL_FLAGS, "num_train_epochs": 1, "max_steps": 3, "eval_strategy": "no", "eval_data_files": None,
    "validation_split_percentage": 0, "save_strategy": "no", "gradient_accumulation_steps": 1,
}  # fmt: skip
SRUN = """#!/usr/bin/env bash
# Runs a task on each of two nodes, forwards signals to them, and exits with the highest code, like srun.
while [[ $1 == --* ]]; do shift; done
echo "cores for a task: $SRUN_CPUS_PER_TASK"
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks[node]=$!; done
trap 'kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
    while code=0; wait "$task" || code=$?; kill -0 "$task" 2>/dev/null; do :; done
    ((code <= highest)) || highest=$code
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == requeue ]] && echo "requeued $2" && exit
printf '%s\\n' 127.0.0.1 127.0.0.2
"""
PDSH = """#!/usr/bin/env bash
# Runs its last argument on each host, with %n replaced by the index of the host.
while [[ $1 != -w ]]; do shift; done
IFS=, read -ra hosts <<<"$2"
shift 2
code=0 jobs=()
for number in "${!hosts[@]}"; do bash -c "${*//%n/$number}" & jobs+=($!); done
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit $code
"""
SSH = """#!/usr/bin/env bash
echo 127.0.0.1
"""


@pytest.fixture
def environment(example, tmp_path):
    """Environment variables of a CPU machine, with stand-ins for cluster tools first on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "pdsh": PDSH, "ssh": SSH}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        **os.environ, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": "", "CPU_RANKS": "1",
        "NUM_GPUS": "0",
        "HOME": str(example.folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(example.folder / "cache"), "PATH": f"{tools}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository with its own logs folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("scripts", "dft", "ds_config", "train_dft.py"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def job(repository):
    """Environment variables that Slurm sets for a job on two nodes."""
    return {
        "SLURM_SUBMIT_DIR": repository, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_ID": 7, "SLURM_CPUS_PER_TASK": 3, "MASTER_PORT": free_port(),
    }  # fmt: skip


def start(script, words, environment, **more):
    return subprocess.Popen(
        [str(ROOT / "scripts" / script), *words],
        env={**environment, **{name: str(value) for name, value in more.items()}},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(script, words, environment, **more):
    process = start(script, words, environment, **more)
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def end(process):
    """Kill a process and its children."""
    if process.poll() is None:
        for member in (*psutil.Process(process.pid).children(recursive=True), process):
            member.kill()


def assert_same_weights(first, other):
    weights, expected = load_file(first / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())


@pytest.fixture(scope="module")
def reference(example, forks):
    """The reference run: two ranks on one machine."""
    output = example.folder / "one-machine"
    flags = {**FLAGS, "use_cpu": True, "deepspeed": ROOT / "ds_config/zero3.json"}
    codes, printed = forks.run(example.words(output, **flags), 2)
    assert not any(codes), printed
    return output


@pytest.mark.slow
def test_slurm_starts_a_launcher_on_each_machine(example, environment, reference, repository, tmp_path):
    output = tmp_path / "out"
    done = run("train.slurm", example.words(output, **FLAGS), environment, **job(repository))
    logs = [repository / "logs" / f"train_7_node{node}.log" for node in (0, 1)]
    assert done.returncode == 0, done.stdout + done.stderr + logs[0].read_text()
    assert "machine 1 of 2" in done.stdout and "machine 2 of 2" in done.stdout
    assert "cores for a task: 3" in done.stdout and "requeued" not in done.stdout
    assert "torchrun.py --nnodes 2 --node_rank 1 --nproc_per_node 1" in logs[1].read_text()
    assert "train step 3/3" in logs[0].read_text() and "train step" not in logs[1].read_text()
    assert_same_weights(output, reference)
    assert not list((repository / "logs").glob("*.code"))


@pytest.mark.parametrize(
    ("number", "requeues"),
    [(signal.SIGUSR1, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)],
    ids=["time-is-over", "cancelled"],
)
def test_a_signalled_job_saves_and_is_requeued(example, environment, repository, tmp_path, number, requeues):
    output, log = tmp_path / "out", repository / "logs" / "train_7_node0.log"
    words = example.words(output, **{**FLAGS, "max_steps": 100_000})
    ranks = "1" if requeues else "2"  # the slow case has several ranks on a machine
    process = start("train.slurm", words, {**environment, "CPU_RANKS": ranks}, **job(repository))
    try:
        deadline = time.monotonic() + LIMIT
        while not (log.is_file() and "train step" in log.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)  # to the batch shell only, as Slurm does
        printed, errors = process.communicate(timeout=LIMIT)
    finally:
        end(process)
    assert process.returncode == EXIT_STOPPED, printed + errors + log.read_text()
    assert ("requeued 7" in printed) is requeues
    assert errors.count("everything is saved") == 2, "expected one such message on each machine"
    assert len(list(output.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize(
    ("ends", "code", "requeues"),
    [
        (("sys.exit(75)", "os.kill(os.getpid(), 15)"), 75, True),
        (("os.kill(os.getpid(), 9)", "sys.exit(75)"), 75, True),
        (("sys.exit(2)", "sys.exit(1)"), 2, False),
    ],
    ids=["first-of-two", "second-of-two", "neither"],
)
def test_a_job_is_requeued_if_any_machine_stopped_with_everything_saved(
    environment, repository, ends, code, requeues
):
    (repository / "scripts").unlink()
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    (repository / "scripts/torchrun.py").write_text(
        f"import os, sys\nnode = sys.argv[sys.argv.index('--node_rank') + 1]\nexec({ends!r}[int(node)])\n"
    )
    words = ["--model_name_or_path", "m", "--data_files", "a.jsonl"]
    done = run("train.slurm", words, environment, **job(repository))
    assert done.returncode == code, done.stdout + done.stderr
    assert ("requeued 7" in done.stdout) is requeues
    assert not list((repository / "logs").glob("*.code"))


def test_invalid_input_is_not_retried(example, environment, tmp_path):
    log = tmp_path / "train.log"
    words = example.words(tmp_path / "out", **{**FLAGS, "max_length": -5})
    done = run(
        "train_multinode.sh", words, {**environment, "CPU_RANKS": "2"}, NNODES=1, NODE_RANK=0,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), LOG_FILE=log, MAX_RESTARTS=2,
    )  # fmt: skip
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr + log.read_text()
    assert "restart" not in done.stdout and "Traceback" not in log.read_text()


def test_a_stopped_launcher_reports_the_signal(tmp_path):
    program, started, port = tmp_path / "rank.py", tmp_path / "started", free_port()
    program.write_text(f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)")
    launcher = subprocess.Popen(
        [sys.executable, ROOT / "scripts/torchrun.py", "--nproc_per_node=1", f"--master_port={port}",
         program],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        errors = launcher.communicate(timeout=LIMIT)[1]
    finally:
        end(launcher)
    assert launcher.returncode == 128 + signal.SIGTERM
    assert "the launcher was stopped by SIGTERM" in errors and "Traceback" not in errors


def test_a_launcher_under_nohup_goes_on_when_the_terminal_closes(tmp_path):
    program, started, port = tmp_path / "rank.py", tmp_path / "started", free_port()
    program.write_text(
        f"import pathlib, time; started = pathlib.Path({str(started)!r}); started.touch()\n"
        "while started.exists(): time.sleep(0.1)"
    )
    launcher = subprocess.Popen(
        ["nohup", sys.executable, ROOT / "scripts/torchrun.py", "--nproc_per_node=1", f"--master_port={port}",
         program],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT
        while not started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(launcher.pid, signal.SIGHUP)  # as the kernel does
        time.sleep(1)
        started.unlink()
        output = launcher.communicate(timeout=LIMIT)[0]
    finally:
        end(launcher)
    assert launcher.returncode == 0, output


@pytest.mark.parametrize(
    ("ends", "codes"),
    [
        (("time.sleep(60)", "sys.exit(76)"), [76]),
        (("time.sleep(60)", "os.kill(os.getpid(), signal.SIGKILL)"), [128 + signal.SIGKILL]),
        (("sys.exit(75)", "time.sleep(2); sys.exit(76)"), [75, 76]),
        (("sys.exit(0)", "sys.exit(0)"), [0]),
    ],
    ids=["code", "signal", "machine-left-behind", "done"],
)
def test_torchrun_exits_with_the_code_of_the_first_failed_rank(tmp_path, ends, codes):
    """Two codes stand for two machines with one rank each, one code for one machine with two ranks."""
    program, port = tmp_path / "rank.py", free_port()
    program.write_text(f"import os, signal, sys, time\nexec({ends!r}[int(os.environ['RANK'])])\n")
    nodes = [
        subprocess.Popen(
            [
                sys.executable, str(ROOT / "scripts/torchrun.py"), f"--nnodes={len(codes)}",
                f"--node_rank={node}", f"--nproc_per_node={2 // len(codes)}", "--master_addr=127.0.0.1",
                f"--master_port={port}", str(program),
            ],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(len(codes))
    ]  # fmt: skip
    try:
        printed = [node.communicate(timeout=LIMIT)[1] for node in nodes]
    finally:
        for node in nodes:
            end(node)
    assert [node.returncode for node in nodes] == codes, "\n".join(printed)
    assert not any("Traceback" in text for text in printed)


@pytest.mark.slow
def test_a_hostfile_starts_both_machines_from_the_first(example, environment, reference, tmp_path):
    hosts = tmp_path / "hostfile"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    log, output = tmp_path / "train.log", tmp_path / "out"
    done = run(
        "train_multinode.sh", example.words(output, **FLAGS), environment,
        HOSTFILE=hosts, LOG_FILE=log, MASTER_ADDR="127.0.0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    assert_same_weights(output, reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "NNODES=: must be the number of machines"),
        ({"NNODES": 2}, "NODE_RANK=: must be the index of this machine, from 0 to 1"),
        ({"NNODES": 2, "NODE_RANK": 2}, "NODE_RANK=2: must be the index of this machine, from 0 to 1"),
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR is not set"),
        ({"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 99999}, "MASTER_PORT=99999"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file"),
        ({"HOSTFILE": "README.md", "NNODES": 2}, "set one or the other"),
        ({"NNODES": 9, "NODE_RANK": "08"}, "NODE_RANK=08: must be the index of this machine, from 0 to 8"),
        (
            {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 2**64 + 1},
            f"MASTER_PORT={2**64 + 1}",
        ),
        ({"HOSTFILE": "README.md"}, "expected a line such as: 10.0.0.1 slots=8"),
        ("# nothing\n\n", "lists no machine"),
        ("a slots=1\nb slots=1\na slots=2\n", "a is listed twice; merge the lines and add their slots"),
        ("a slots=1\r\n", "it has Windows line endings"),
    ],
)
def test_invalid_multinode_settings_are_rejected(environment, tmp_path, settings, message):
    if isinstance(settings, str):
        (tmp_path / "hosts").write_text(settings)
        settings = {"HOSTFILE": tmp_path / "hosts"}
    done = run("train_multinode.sh", [], environment, **settings)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and message in done.stderr


def test_slurm_script_outside_the_repository_is_rejected(environment, tmp_path):
    done = run("train.slurm", [], environment, SLURM_SUBMIT_DIR=tmp_path)
    assert done.returncode == 2 and "is not the repository" in done.stderr
    assert shutil.which("srun", path=environment["PATH"])
