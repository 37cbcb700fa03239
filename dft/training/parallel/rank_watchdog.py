"""Detects ranks that died or stopped making progress.

A rank that dies or hangs leaves the others waiting in a collective until the timeout of the process group,
half an hour by default, and their error does not say which rank is missing. The watchdog is a thread in each
rank that looks for missing ranks and ends its own rank with an error that names them.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _get_default_store

from dft.errors import EXIT_RANK_LOST, UserError, set_error_reporter
from dft.training.parallel.stopping import Stopped

PERIOD = 1.0
"""Seconds between two checks."""
HEARTBEAT_TIMEOUT = 60.0
"""Seconds without a heartbeat or a response of the store after which a machine counts as lost."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROCESS_NAMESPACE = Path("/proc/self/ns/pid")


def machine_id() -> str:
    """Return a name for this machine's process namespace, in which process ids are unique.

    Host names are not enough: cloud images and containers often share one. Linux has a random id per boot,
    and containers on one machine differ in their process namespace. Elsewhere the network address is used.
    """
    try:
        boot_id = BOOT_ID.read_text(encoding="ascii").strip()
        namespace = PROCESS_NAMESPACE.stat().st_ino
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"
    return f"{boot_id}-{namespace}"


@dataclass(frozen=True)
class RankProcess:
    """The process of one rank.

    Attributes:
        rank: global rank.
        host: host name, for messages only.
        machine: `machine_id` of the rank.
        process: process id, unique on the machine.
    """

    rank: int
    host: str
    machine: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


def machine_leaders(ranks: Sequence[RankProcess]) -> dict[str, RankProcess]:
    """Return the first rank of each machine by machine id."""
    return {rank.machine: rank for rank in reversed(ranks)}


def local_processes(ranks: Sequence[RankProcess], machine: str) -> dict[RankProcess, psutil.Process]:
    """Return the running processes of the ranks on one machine, this one."""
    return {
        rank: psutil.Process(rank.process)
        for rank in ranks
        if rank.machine == machine and psutil.pid_exists(rank.process)
    }


class RankWatchdog:
    """Thread that ends this rank when another rank of the run is missing.

    All ranks must create it at the same time, when training begins.

    Processes on the same machine are looked up by process id. The first rank of each machine writes
    heartbeats for the other machines into the store of the process group, and every rank reads the results of
    other machines from the store. A signal that stops the whole process, such as SIGSTOP, stops its
    heartbeats too.

    Args:
        timeout: seconds without a micro-batch after which a rank counts as hung.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.me = RankProcess(dist.get_rank(), socket.gethostname(), machine_id(), os.getpid())
        self.ranks = [RankProcess(**fields) for fields in gather_object([asdict(self.me)])]
        self._leaders = machine_leaders(self.ranks)
        self._is_leader = self._leaders[self.me.machine] == self.me
        self._processes = local_processes(self.ranks, self.me.machine)
        store = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in the annotations of torch
        self._store = dist.PrefixStore("rank_watchdog", store)
        self._beats, self._last_beat = 0, time.monotonic()
        self._heartbeats: dict[str, tuple[int, float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Record progress of this rank, which is about to run another micro-batch or to save."""
        self._beats += 1
        self._last_beat = time.monotonic()

    def close(self) -> None:
        """Stop watching, because this rank is finished and no longer waits for others."""
        self._closed.set()
        self._thread.join()

    def report_failure(self, code: int) -> None:
        """Notify the other ranks that this rank exits with an error.

        The first rank to call this prints its error. The others exit with the same code without printing.
        Rank 0 prints it if all ranks have the same error.

        Args:
            code: exit code.
        """
        first = self._processes.get(self.ranks[0])
        if self.me.rank:
            time.sleep(PERIOD)
        self.close()
        if first is not None and not is_alive(first):  # it has printed the error, and its store is gone
            set_error_reporter(False)
            return
        is_first = self._store.add("failing", 1) == 1
        if is_first:
            self._store.set("failed", json.dumps([self.me.rank, code]))
            time.sleep(3 * PERIOD)  # until all ranks have read it
        set_error_reporter(is_first)

    def wait_for_verdict(self) -> None:
        """Wait long enough for the thread to determine whether a missing rank caused an error.

        If so, the thread ends this rank and this call does not return.
        """
        self._thread.join(4 * PERIOD)

    # The methods below run in the thread.

    def _watch(self) -> None:
        store_access, tick = ThreadPoolExecutor(1, "rank-watchdog"), 0
        while not self._closed.wait(PERIOD):
            tick += 1
            dead = [rank for rank, process in self._processes.items() if not is_alive(process)]
            error = f"{dead[0]} died; its last output is above" if dead else None
            if error is not None and (len(self._leaders) == 1 or dead[0].rank == 0):
                self._end(error)  # the store, which ends with rank 0, is not needed
            try:
                # A store whose process is stopped never answers.
                store_access.submit(self._exchange_state, tick, error).result(HEARTBEAT_TIMEOUT)
            except FutureTimeout:
                self._end(f"{self.ranks[0]} did not respond for {HEARTBEAT_TIMEOUT:.0f} s")
            except dist.DistError as failure:
                self._end(f"{self.ranks[0]} died or cannot be reached ({type(failure).__name__})")
        store_access.shutdown(wait=False)

    def _exchange_state(self, tick: int, error: str | None) -> None:
        """Exchange state with the other ranks once; end this rank if one of them is missing."""
        if self._store.check(["failed"]):
            self._follow(*json.loads(self._store.get("failed")))
        if error is not None:
            self._report(error)
        if self._is_leader and len(self._leaders) > 1:
            self._exchange_heartbeats(tick)
        if self._store.check(["lost"]):
            self._end(self._store.get("lost").decode())
        if time.monotonic() - self._last_beat > self.timeout:
            self._report(self._find_hung_ranks())

    def _follow(self, rank: int, code: int) -> None:
        """Exit after the rank that reports its error; otherwise the launcher would cut its message short."""
        process = self._processes.get(self.ranks[rank])
        deadline = time.monotonic() + HEARTBEAT_TIMEOUT
        while time.monotonic() < deadline and process is not None and is_alive(process):
            time.sleep(PERIOD / 4)
        self._end(None, code)

    def _exchange_heartbeats(self, tick: int) -> None:
        """Write the heartbeat of this machine and check the heartbeats of the others."""
        self._store.set(f"alive/{self.me.machine}", str(tick))
        now = time.monotonic()
        for machine, leader in self._leaders.items():
            key = f"alive/{machine}"
            current = int(self._store.get(key)) if self._store.check([key]) else 0
            previous, since = self._heartbeats.get(machine, (-1, now))
            self._heartbeats[machine] = (current, now if current != previous else since)
            if now - self._heartbeats[machine][1] > HEARTBEAT_TIMEOUT:
                self._report(f"{leader} sent no heartbeat for {HEARTBEAT_TIMEOUT:.0f} s")

    def _report(self, error: str) -> None:
        self._store.set("lost", error)
        self._end(error)

    def _find_hung_ranks(self) -> str:
        """Return an error that names the ranks with the fewest micro-batches.

        All running ranks reach this point at about the same time, since all wait for the hung rank.
        """
        self._store.set(f"stalled/{self.me.rank}", json.dumps(self._beats))
        time.sleep(3 * PERIOD)
        beats = {}
        for rank in self.ranks:
            key = f"stalled/{rank.rank}"
            if self._store.check([key]):
                beats[rank] = json.loads(self._store.get(key))
        most = max(beats.values())
        silent = [rank for rank in self.ranks if rank not in beats]
        hung = silent or [rank for rank, count in beats.items() if count < most] or self.ranks
        return f"{', '.join(map(str, hung))} made no progress for {self.timeout:.0f} s (--ddp_timeout)"

    def _end(self, error: str | None, code: int = EXIT_RANK_LOST) -> None:
        """End this rank, whose main thread may wait forever. One rank of each machine prints the error."""
        if self._closed.is_set():
            return
        running = (rank for rank, process in self._processes.items() if is_alive(process, stopped=False))
        reporter = next(running, self.me)
        if error is not None and reporter == self.me:
            print(
                f"error: {error}. Training cannot continue without it. Run the same command with "
                "--resume_from_checkpoint auto to resume from the newest complete checkpoint",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(code)


@contextmanager
def watch_ranks(timeout: float) -> Iterator[RankWatchdog | None]:
    """Run a watchdog within the context. Yields None if there is only one rank.

    An error of this rank ends the other ranks too. If it was caused by a missing rank, like most errors of
    collectives, the watchdog reports that rank instead.

    Args:
        timeout: seconds without a micro-batch after which a rank counts as hung.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    watchdog = RankWatchdog(timeout)
    code: int | None = EXIT_RANK_LOST
    try:
        yield watchdog
        code = None
    except Stopped:
        code = None
        raise
    except UserError as error:
        code = error.code
        raise
    except RuntimeError:
        watchdog.wait_for_verdict()
        raise
    finally:
        if code is None:
            watchdog.close()
        else:
            watchdog.report_failure(code)


def is_alive(process: psutil.Process, stopped: bool = True) -> bool:
    """Return whether a process is running.

    Args:
        process: process to check.
        stopped: whether a process that a signal has stopped counts as running.
    """
    dead_states = {psutil.STATUS_ZOMBIE, *(() if stopped else (psutil.STATUS_STOPPED,))}
    try:
        return process.is_running() and process.status() not in dead_states
    except psutil.NoSuchProcess:
        return False
