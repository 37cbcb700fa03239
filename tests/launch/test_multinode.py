"""Two nodes, simulated by two launchers on one machine, with a shared disk or one disk each."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dft.training.checkpoints.folder import open_checkpoint
from tests.launching import ROOT, free_port, train_records

LIMIT = 180
FLAGS = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
    "per_device_train_batch_size": 16, "use_cpu": True, "eval_data_files": None,
    "resume_from_checkpoint": "auto",
}  # fmt: skip


class Host(NamedTuple):
    """A simulated node: command prefix, address and network interface."""

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts in separate network namespaces that are connected by a virtual cable."""
    names = [f"dft-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"dft{os.getpid() % 100_000}{letter}" for letter in "ab"]
    namespaces: list[str] = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            namespaces.append(name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in namespaces:
            ip("netns", "del", name)
        pytest.skip(f"no network namespaces here: {error}")
    yield [
        Host(("ip", "netns", "exec", name), f"10.77.0.{number}", end)
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1)
    ]
    for name in names:
        ip("netns", "del", name)


def fork_nodes(example, forks, folders: list[Path], output: str, **flags) -> list[str]:
    """Run one node in each folder without launchers, which take longer than the run."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    words = example.words(Path(output), **FLAGS, **flags)
    codes, printed = forks.run(words, len(folders), FOLDERS=os.pathsep.join(map(str, folders)))
    assert not any(codes), printed
    return [printed]


def run_nodes(
    example, folders: list[Path], output: str, code: int = 0, hosts: Sequence[Host] = (), **flags
) -> list[str]:
    """Run one node in each folder and return what they printed."""
    port = free_port()
    hosts = hosts or [Host()] * len(folders)
    words = example.words(Path(output), **FLAGS, **flags)
    nodes = []
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(example.folder / "cache"),
            "GLOO_SOCKET_IFNAME": hosts[number].interface,
        }  # fmt: skip
        torchrun = [
            *hosts[number].prefix, sys.executable, "-m", "torch.distributed.run",
            f"--nnodes={len(folders)}", f"--node_rank={number}", "--nproc_per_node=1",
            f"--master_addr={hosts[0].address}", f"--master_port={port}",
        ]  # fmt: skip
        nodes.append(
            subprocess.Popen(
                [*torchrun, str(ROOT / "train_dft.py"), *words],
                cwd=folder,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        )
    try:
        printed = [node.communicate(timeout=LIMIT)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                node.kill()
    assert [node.returncode for node in nodes] == [code, code], "\n".join(printed)
    return printed


@pytest.mark.parametrize(
    "shared",
    [pytest.param(True, id="one-disk"), pytest.param(False, id="a-disk-each", marks=pytest.mark.slow)],
)
def test_two_machines_train_save_and_resume(example, forks, tmp_path, shared):
    zero = {"deepspeed": ROOT / "ds_config/zero3.json", "save_on_each_node": not shared}
    reference = tmp_path / "reference"
    codes, printed = forks.run(example.words(reference, **FLAGS, **zero), 2)
    assert not any(codes), printed

    folders = [tmp_path / "north", tmp_path / "south"]
    output = str(tmp_path / "both") if shared else "out"
    places = [tmp_path / "both"] if shared else [folder / "out" for folder in folders]
    if shared:
        fork_nodes(example, forks, folders, output, **zero)
    else:
        run_nodes(example, folders, output, **zero)
    for place in places:
        names = sorted(path.name for path in place.iterdir() if "checkpoint" in path.name)
        assert names == ["checkpoint-3", "checkpoint-4"], "rotation on each disk leaves incomplete ones"
        for name in names:
            facts = open_checkpoint(place / name).facts
            assert facts["ranks"] == 2 and facts["step"] == int(name[-1])
        assert not list(place.glob(".seen-*"))
    expected, got = load_file(reference / "model.safetensors"), load_file(places[0] / "model.safetensors")
    assert all(torch.equal(weight, got[name]) for name, weight in expected.items())
    for record, other in zip(train_records(reference), train_records(places[0]), strict=True):
        assert record["nll"] == other["nll"] and record["grad_norm"] == other["grad_norm"]

    for place in places:
        (place / "checkpoint-4").rename(place / "was-4")
        (place / "model.safetensors").unlink(missing_ok=True)
    if shared:
        printed = fork_nodes(example, forks, folders, output, **zero)
    else:
        printed = run_nodes(example, folders, output, code=1, **zero)
        assert any("only a part of it is on this machine; DeepSpeed resumes only" in text for text in printed)
        assert not any("Traceback" in text.split("torch/distributed/elastic")[0] for text in printed)
        return
    assert "train step 4/4" in printed[0] and "train step 3/4" not in printed[0]
    got = load_file(places[0] / "model.safetensors")
    assert all(torch.equal(weight, got[name]) for name, weight in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero3", "fsdp"])
def test_two_network_namespaces_give_the_weights_of_one_machine(example, forks, tmp_path, hosts, kind):
    """In network namespaces each node has its own address and loopback device."""
    how = {"deepspeed": ROOT / "ds_config/zero3.json"} if kind == "zero3" else {"fsdp": True}
    reference = tmp_path / "reference"
    codes, printed = forks.run(example.words(reference, **FLAGS, **how), 2)
    assert not any(codes), printed
    output = tmp_path / "both"
    run_nodes(example, [tmp_path / "north", tmp_path / "south"], str(output), hosts=hosts, **how)
    expected, got = load_file(reference / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(weight, got[name]) for name, weight in expected.items())
    for record, other in zip(train_records(reference), train_records(output), strict=True):
        assert record["nll"] == other["nll"] and record["grad_norm"] == other["grad_norm"]
