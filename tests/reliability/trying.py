"""Run train_dft.py with lists of command lines and write the outcome of each: FOLDER RANKS ...

The command lines are in table.json of each folder, and the outcomes on each rank are written to it. The
tables run concurrently, on the given numbers of ranks. Each run is a fork of a process that has imported
everything, so that it starts quickly and leaves no state behind: start this with `tests.forking`. Every rank
is given the same table, and starts the next run when all ranks have finished this one.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import dft.data.sandbox.limits
import dft.errors
import train_dft
from dft.errors import EXIT_USER_ERROR, UserError
from tests.launching import free_port

PATIENCE = 60
"""Seconds after which a run is considered hung."""


def attempt(words: list[str], port: int, log: Path, pipe: Connection, template_seconds: float | None) -> None:
    if template_seconds is not None:
        dft.data.sandbox.limits.MAX_CPU_SECONDS = template_seconds  # the message still says 10 seconds
    os.environ["MASTER_PORT"] = str(port)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["train_dft.py", *words]
    how, message = "went through", ""
    try:
        train_dft.main()
    except UserError as error:
        how, message = "refused", str(error)
    except BaseException:
        how, message = "crashed", traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send((how, message))
    if dft.errors._is_reporter is not None:  # the ranks have agreed which of them reports
        os._exit(EXIT_USER_ERROR)
    time.sleep(2 * PATIENCE)  # wait to be killed: another rank may still be connecting to this one


def outcome(
    words: list[str], port: int, log: Path, ended: list[Path], template_seconds: float | None
) -> dict[str, str]:
    """Return how a run ended on this rank.

    Args:
        ended: files that mark the end of the run on each rank; the first one is written by this rank.
        template_seconds: replaces the limit on the CPU time of a chat template, for templates that never end.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(words, port, log, there, template_seconds))
    process.start()
    there.close()
    try:
        how, message = here.recv() if here.poll(PATIENCE) else ("hung", "")
    except EOFError:  # ranks of a finished run exit without sending a result
        process.join()
        how = {0: "went through", EXIT_USER_ERROR: "followed"}.get(process.exitcode, "died")
        message = ""
    ended[0].touch()
    deadline = time.monotonic() + PATIENCE
    while not all(path.exists() for path in ended) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    return {"how": how, "message": message, "log": log.read_text(errors="replace")}


def agreed_port(file: Path, rank: int) -> int:
    """Return a free port, chosen by rank 0 just before the run."""
    if rank == 0:
        file.with_suffix(".new").write_text(str(free_port()))
        file.with_suffix(".new").replace(file)
    while not file.exists():
        time.sleep(0.01)
    return int(file.read_text())


def run_table(folder: Path, rank: int, ranks: int) -> None:
    """Carry out all runs of a table on one rank and write their outcomes."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.chdir(folder)
    results, outcomes = folder / "outcomes.json", {}
    for row in json.loads((folder / "table.json").read_text()):
        name = row["name"]
        port = agreed_port(results.with_suffix(f".{name}.port"), rank)
        ended = [results.with_suffix(f".{name}.{(rank + other) % ranks}") for other in range(ranks)]
        log = results.with_suffix(f".{rank}.log")
        outcomes[name] = outcome(row["words"], port, log, ended, row["template_seconds"])
    results.with_suffix(f".{rank}.json").write_text(json.dumps(outcomes))


def main() -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=run_table, args=(Path(folder), rank, int(ranks)))
        for folder, ranks in zip(sys.argv[1::2], sys.argv[2::2], strict=True)
        for rank in range(int(ranks))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))


if __name__ == "__main__":
    main()
