"""Ranks on the same machine, whose processes can be looked up by process id."""

import os
import socket

from dft.training.parallel import rank_watchdog
from dft.training.parallel.rank_watchdog import RankProcess, local_processes, machine_id, machine_leaders


def ranks_of(machines: list[str]) -> list[RankProcess]:
    """Return ranks on the given machines, all with the same host name and the id of this process."""
    return [RankProcess(rank, "node", machine, os.getpid()) for rank, machine in enumerate(machines)]


def test_machines_with_the_same_host_name_are_distinguished():
    ranks = ranks_of(["a", "a", "b", "b"])
    assert [rank.rank for rank in local_processes(ranks, "a")] == [0, 1]
    assert [rank.rank for rank in local_processes(ranks, "b")] == [2, 3]
    assert {machine: leader.rank for machine, leader in machine_leaders(ranks).items()} == {"a": 0, "b": 2}


def test_machine_id_follows_the_boot_and_the_process_namespace_not_the_host_name(tmp_path, monkeypatch):
    here = machine_id()
    monkeypatch.setattr(socket, "gethostname", lambda: "another-name")
    assert machine_id() == here == machine_id()
    (tmp_path / "boot").write_text("another-boot\n")
    monkeypatch.setattr(rank_watchdog, "BOOT_ID", tmp_path / "boot")
    other_boot = machine_id()
    monkeypatch.setattr(rank_watchdog, "PROCESS_NAMESPACE", tmp_path / "boot")
    assert len({here, other_boot, machine_id()}) == 3


def test_machine_id_without_procfs_uses_host_name_and_network_address(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_watchdog, "BOOT_ID", tmp_path / "missing")
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop")
    assert machine_id().startswith("laptop-") and machine_id() == machine_id()
