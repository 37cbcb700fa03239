"""scripts/train_multinode.sh and train.slurm: two machines, which here are two launchers on one."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import ROOT, free_port
from tests.reliability.test_train_script import FLAGS as ALL_FLAGS

FLAGS = {
    **ALL_FLAGS, "num_train_epochs": 1, "max_steps": 3, "eval_strategy": "no", "eval_data_files": None,
    "validation_split_percentage": 0, "save_strategy": "no", "gradient_accumulation_steps": 1,
}  # fmt: skip
SRUN = """#!/usr/bin/env bash
# A task on each of two nodes.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
code=0
wait $first || code=$?
wait $second || code=$?
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == requeue ]] && echo "requeued $2" && exit
printf '%s\\n' 127.0.0.1 127.0.0.2
"""
PDSH = """#!/usr/bin/env bash
# Runs its last argument on each host, with its number for %n.
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
    """Variables of a CPU machine, with stand-ins for the tools of a cluster in front."""
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


def run(script, words, environment, **more):
    return subprocess.run(
        [str(ROOT / "scripts" / script), *words],
        env={**environment, **{name: str(value) for name, value in more.items()}},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def assert_same_weights(one, other):
    weights, expected = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())


@pytest.fixture(scope="module")
def reference(example, forks):
    """Two ranks of one machine."""
    output = example.folder / "one-machine"
    flags = {**FLAGS, "use_cpu": True, "deepspeed": ROOT / "ds_config/zero3.json"}
    codes, printed = forks.run(example.words(output, **flags), 2)
    assert not any(codes), printed
    return output


def test_slurm_starts_a_launcher_on_each_machine(example, environment, reference, tmp_path):
    repository = tmp_path / "repository"  # its logs are not ours
    repository.mkdir()
    for name in ("scripts", "dft", "ds_config", "train_dft.py"):
        (repository / name).symlink_to(ROOT / name)
    output = tmp_path / "out"
    slurm = {
        "SLURM_SUBMIT_DIR": repository, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_ID": 7, "MASTER_PORT": free_port(),
    }  # fmt: skip
    done = run("train.slurm", example.words(output, **FLAGS), environment, **slurm)
    logs = [repository / "logs" / f"train_7_node{node}.log" for node in (0, 1)]
    assert done.returncode == 0, done.stdout + done.stderr + logs[0].read_text()
    assert "machine 1 of 2" in done.stdout and "machine 2 of 2" in done.stdout
    assert "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 1" in logs[1].read_text()
    assert "train step 3/3" in logs[0].read_text() and "train step" not in logs[1].read_text()
    assert_same_weights(output, reference)


@pytest.mark.slow
def test_a_hostfile_starts_them_from_the_first(example, environment, reference, tmp_path):
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
    ("given", "told"),
    [
        ({}, "NNODES=: how many machines there are"),
        ({"NNODES": 2}, "NODE_RANK=: which of the 2 machines this is, from 0 to 1"),
        ({"NNODES": 2, "NODE_RANK": 2}, "NODE_RANK=2: which of the 2"),
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR is not set"),
        ({"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 99999}, "MASTER_PORT=99999"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere: no such file"),
        ({"HOSTFILE": "README.md", "NNODES": 2}, "one form or the other"),
        ({"HOSTFILE": "README.md"}, "is not of the form: 10.0.0.1 slots=8"),
    ],
)
def test_what_is_missing_is_said(environment, given, told):
    done = run("train_multinode.sh", [], environment, **given)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and told in done.stderr


def test_slurm_says_where_it_must_be_called(environment, tmp_path):
    done = run("train.slurm", [], environment, SLURM_SUBMIT_DIR=tmp_path)
    assert done.returncode == 1 and "is not the repository" in done.stderr
    assert shutil.which("srun", path=environment["PATH"])
