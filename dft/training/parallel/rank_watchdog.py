"""Whether the other ranks of a run are still there, and get on.

A rank that dies or hangs leaves the others waiting in a collective, for half an hour and without a word of
which rank it was. Here a thread of each rank looks, and ends its own rank with an error that names the other.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.distributed_c10d import _get_default_store

from dft.errors import UserError, set_error_reporter
from dft.training.parallel.stopping import Stopped

PERIOD = 1.0
"""Seconds between two looks."""
SILENCE = 60.0
"""Seconds after which a machine that writes nothing any more is given up."""
LOST = 1
"""Exit code of a rank that cannot go on without another."""


@dataclass(frozen=True)
class RankProcess:
    """One rank."""

    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class RankWatchdog:
    """The ranks of this run. To be made by all of them at once, when training begins.

    Processes on this machine are looked up. Of other machines the first rank of each writes into the store of
    the process group that it is alive, and all learn from there what was found out elsewhere. What a thread
    of this process can hold up, a process that is stopped say, holds up its word as well.

    Args:
        patience: seconds without a micro-batch after which a rank is taken to hang.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.me = RankProcess(dist.get_rank(), socket.gethostname(), os.getpid())
        self.all = [RankProcess(**one) for one in gather_object([asdict(self.me)])]
        here = [one for one in self.all if one.host == self.me.host]
        self._leads = here[0] == self.me
        self._leaders = {one.host: one for one in reversed(self.all)}  # the first rank of each machine
        self._processes = {one: psutil.Process(one.process) for one in here if psutil.pid_exists(one.process)}
        self._store = dist.PrefixStore("peers", _get_default_store().clone())
        self._beats, self._last_beat = 0, time.monotonic()
        self._heard: dict[str, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """This rank has got on: it is about to make another micro-batch, or a save."""
        self._beats += 1
        self._last_beat = time.monotonic()

    def close(self) -> None:
        """This rank is done, and need not wait for others any more."""
        self._ended.set()
        self._thread.join()

    def fail(self, code: int) -> None:
        """This rank ends by an error of its own. The first one to say so reports it, the others follow it
        without a word, with the same exit code. Rank 0 is given the first word where all have the error.
        """
        first = self._processes.get(self.all[0])
        if self.me.rank:
            time.sleep(PERIOD)
        self.close()
        if first is not None and not is_alive(first):  # it has told, and the store is gone with it
            set_error_reporter(False)
            return
        is_first = self._store.add("failing", 1) == 1
        if is_first:
            self._store.set("failed", json.dumps([self.me.rank, code]))
            time.sleep(3 * PERIOD)  # until all have read that
        set_error_reporter(is_first)

    def settle(self) -> None:
        """Gives the watch the time to find out whether an error is but the loss of another rank."""
        self._thread.join(4 * PERIOD)

    # ---- the thread ----

    def _watch(self) -> None:
        asking, tick = ThreadPoolExecutor(1, "peers"), 0
        while not self._ended.wait(PERIOD):
            tick += 1
            gone = [one for one, process in self._processes.items() if not is_alive(process)]
            lost = f"{gone[0]} is gone; what it said last stands above" if gone else None
            if lost is not None and (len(self._leaders) == 1 or gone[0].rank == 0):
                self._end(lost)  # without the store, which is gone with rank 0
            try:
                # A store whose process is stopped never answers.
                asking.submit(self._ask, tick, lost).result(SILENCE)
            except FutureTimeout:
                self._end(f"{self.all[0]} has not answered for {SILENCE:.0f} s")
            except dist.DistError as error:
                self._end(f"{self.all[0]} is gone, or cannot be reached ({type(error).__name__})")
        asking.shutdown(wait=False)

    def _ask(self, tick: int, lost: str | None) -> None:
        """One look into the store; ends this rank if it cannot go on."""
        if self._store.check(["failed"]):
            self._follow(*json.loads(self._store.get("failed")))
        if lost is not None:
            self._report(lost)
        if self._leads and len(self._leaders) > 1:
            self._listen(tick)
        if self._store.check(["lost"]):
            self._end(self._store.get("lost").decode())
        if time.monotonic() - self._last_beat > self.patience:
            self._report(self._who_hangs())

    def _follow(self, rank: int, code: int) -> None:
        """Ends with a rank that reports its error, but not before it: a launcher would cut it short."""
        process = self._processes.get(self.all[rank])
        until = time.monotonic() + SILENCE
        while time.monotonic() < until and process is not None and is_alive(process):
            time.sleep(PERIOD / 4)
        self._end(None, code)

    def _listen(self, tick: int) -> None:
        """Exchanges signs of life with the first ranks of other machines."""
        self._store.set(f"alive/{self.me.host}", str(tick))
        now = time.monotonic()
        for host, leader in self._leaders.items():
            key = f"alive/{host}"
            said = int(self._store.get(key)) if self._store.check([key]) else 0
            before, since = self._heard.get(host, (-1, now))
            self._heard[host] = (said, now if said != before else since)
            if now - self._heard[host][1] > SILENCE:
                self._report(f"{leader} has not been heard of for {SILENCE:.0f} s")

    def _report(self, line: str) -> None:
        self._store.set("lost", line)
        self._end(line)

    def _who_hangs(self) -> str:
        """Asks the others how far they got. All of them come here at about the same time, or never."""
        self._store.set(f"stalled/{self.me.rank}", json.dumps(self._beats))
        time.sleep(3 * PERIOD)
        reached = {}
        for one in self.all:
            key = f"stalled/{one.rank}"
            if self._store.check([key]):
                reached[one] = json.loads(self._store.get(key))
        furthest = max(reached.values())
        silent = [one for one in self.all if one not in reached]
        behind = silent or [one for one, beats in reached.items() if beats < furthest] or self.all
        return f"{', '.join(map(str, behind))} did not get on for {self.patience:.0f} s (--ddp_timeout)"

    def _end(self, line: str | None, code: int = LOST) -> None:
        """Ends this rank, whose main thread may be waiting for ever. One rank of each machine tells."""
        if self._ended.is_set():
            return
        able = (one for one, process in self._processes.items() if is_alive(process, stopped=False))
        tells = next(able, self.me)
        if line is not None and tells == self.me:
            print(
                f"error: {line}. A run cannot go on without a rank; the same command with "
                "--resume_from_checkpoint auto goes on from the newest complete checkpoint",
                file=sys.stderr,
                flush=True,
            )
        sys.stdout.flush()
        os._exit(code)


@contextmanager
def watch_ranks(patience: float) -> Iterator[RankWatchdog | None]:
    """Watches the other ranks, if there are any, as long as the context lasts.

    An error of this rank ends the others as well. If it comes of the loss of another one, as errors of
    collectives do, that is said in its place.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    peers, code = RankWatchdog(patience), LOST
    try:
        yield peers
        code = None
    except Stopped:
        code = None
        raise
    except UserError as error:
        code = error.code
        raise
    except RuntimeError:
        peers.settle()
        raise
    finally:
        if code is None:
            peers.close()
        else:
            peers.fail(code)


def is_alive(process: psutil.Process, stopped: bool = True) -> bool:
    """Whether a process runs; `stopped`: one that a signal has stopped counts as well."""
    without = {psutil.STATUS_ZOMBIE, *(() if stopped else (psutil.STATUS_STOPPED,))}
    try:
        return process.is_running() and process.status() not in without
    except psutil.NoSuchProcess:
        return False
