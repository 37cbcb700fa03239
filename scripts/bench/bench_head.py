"""Measure time and memory of the loss head, forward and backward, against other implementations.

    python scripts/bench/bench_head.py    # the shapes and dtypes for this machine's device
    python scripts/bench/bench_head.py --shapes 1024,0.5,896,151936 --dtypes float32 --rounds 5
    python scripts/bench/bench_head.py --curves    # this head against tokens and against the vocabulary
    python scripts/bench/bench_head.py --profile --contenders floor ours    # where the time goes
    python scripts/bench/bench_head.py --cpu_time    # one thread's CPU time, for a machine with other work

A shape is N tokens, the share of them that is supervised, hidden size D, vocabulary V. Contenders:

floor:     only the three products on supervised rows: the logits, and their gradients on the hidden states
           and on the weight.
ours:      `linear_dft_loss`, with gradients on hidden states and weight. The name of another objective (sft,
           power, ...) measures the same with that objective; these run only if named in --contenders.
floor with base: the four products of an objective with a base model, asft; runs only if named.
full:      logits of all positions, cross-entropy, and a second softmax for the weights, as in the code that
           was published with the paper.
compiled:  `full` through torch.compile; skipped if it fails.
trl rows:  TRL's ChunkedLogProbFunction on supervised rows (pip install trl).
trl:       the same function, called as TRL calls it on this device.
liger:     LigerFusedLinearCrossEntropyLoss with use_token_scaling, CUDA only (pip install liger-kernel).

The contenders take turns in one process. Each time is a median, shown with its ratio to that of the floor.
Memory is the peak above the inputs: on CUDA that of the allocator, on a CPU the resident set of a process
that runs one contender.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.bench.head_contenders import CONTENDERS, NOT_COMPARED, Case, Contender, ours

CPU_SHAPES = ("1024,0.5,896,151936", "2048,0.3,896,151936", "4096,0.5,2048,32768")
CUDA_SHAPES = ("8192,0.5,3584,152064", "4096,1.0,4096,128256", "16384,0.3,2048,151936")
CURVE_TOKENS = (256, 512, 1024, 2048, 4096)
CURVE_VOCABULARIES = (16_384, 32_768, 65_536, 131_072, 262_144)
LIMIT = 1e-2
"""Maximum relative difference between a contender's loss and ours. It is large because of bfloat16 logits."""


def available(device: str) -> list[str]:
    """Return the default contenders that can run on this machine."""
    missing = set(NOT_COMPARED)
    if importlib.util.find_spec("trl") is None:
        missing |= {"trl rows", "trl"}
    if device == "cuda":
        missing.add("trl rows")  # the same as trl
    if device == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        missing.add("liger")
    return [name for name in CONTENDERS if name not in missing]


def run(
    contender: Contender,
    inputs: tuple[Tensor, Tensor, Tensor],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float | None]:
    """Return (seconds, loss) of one forward and backward."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    synchronize(hidden)
    started = clock()
    loss = contender(*inputs)
    synchronize(hidden)
    return clock() - started, None if loss is None else loss.item()


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak(case: Case, name: str) -> float:
    """Return the peak memory of a contender in this process, above that of its inputs, in MiB."""
    inputs = case.inputs()
    if case.device == "cuda":
        run(CONTENDERS[name], inputs)  # allocates the cuBLAS workspaces, which are kept
        inputs[0].grad = inputs[1].grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(CONTENDERS[name], inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before, top, stop = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal top
        while not stop.wait(0.002):
            top = max(top, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(CONTENDERS[name], inputs)
    stop.set()
    watcher.join()
    return (max(top, resident()) - before) / 2**20


def resident() -> int:
    """Return the resident set of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak_in_subprocess(case: Case, name: str) -> float:
    """Return `peak` as a new process measures it."""
    command = [sys.executable, __file__, "--peak", name, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed on {case}:\n{done.stderr}")
    return float(done.stdout)


def compare(case: Case, names: list[str], rounds: int, clock: Callable[[], float]) -> None:
    """Measure the contenders in turns and print the table of one shape and dtype."""
    seconds = time_contenders(case, names, rounds, clock)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peaks = {name: peak_in_subprocess(case, name) for name in seconds}
    shape = f"N={case.tokens:,}, {case.share:.0%} supervised, D={case.width:,}, V={case.vocab:,}"
    print(f"\n{shape}, {case.dtype}, {case.device}, median of {rounds}\n")
    print("| | seconds | of the floor | peak MiB | of the floor |")
    print("|---|---|---|---|---|")
    for name in seconds:
        time_ratio, memory_ratio = medians[name] / medians["floor"], peaks[name] / peaks["floor"]
        print(
            f"| {name} | {medians[name]:.3f} | {time_ratio:.2f} | {peaks[name]:,.0f} | {memory_ratio:.2f} |",
            flush=True,
        )


def time_contenders(
    case: Case, names: list[str], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the seconds of each round, after a warm-up round, of the contenders that work on this machine.

    Exits if a contender's loss differs from ours.
    """
    inputs = case.inputs()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for name in list(seconds):
            try:
                elapsed, loss = run(CONTENDERS[name], inputs, clock)
            except torch._dynamo.exc.TorchDynamoException as error:
                print(f"{name} does not work here: {str(error).splitlines()[0]}")
                del seconds[name]
                continue
            if loss is not None and name not in NOT_COMPARED:
                losses[name] = loss
            if number:  # the first round warms up
                seconds[name].append(elapsed)
    for name, loss in losses.items():
        if abs(loss - losses["ours"]) > LIMIT * abs(losses["ours"]):
            raise SystemExit(f"{name} has loss {loss}, ours {losses['ours']}: they compute different losses")
    return seconds


def profile(case: Case, names: list[str]) -> None:
    """Print the operations, and on a GPU the kernels, in which each contender spends its time."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if case.device == "cuda" else [activity.CPU]
    inputs = case.inputs()
    for name in names:
        run(CONTENDERS[name], inputs)  # compiles kernels
        with torch.profiler.profile(activities=kinds) as profiler:
            seconds, _ = run(CONTENDERS[name], inputs)
        table = profiler.key_averages().table(
            sort_by=f"self_{case.device}_time_total", row_limit=15, max_name_column_width=60
        )
        print(f"\n{name}, {case}: {seconds:.3f} s\n{table}", flush=True)


def curves(device: str, dtype: str, rounds: int) -> None:
    """Print time and memory of this head against the number of tokens and against the vocabulary."""
    width, vocab, tokens = 896, 65_536, 1024
    print(f"\nours, D={width}, all tokens supervised, {dtype}, {device}, median of {rounds}\n")
    print("| N | V | seconds | per N * V, ns | peak MiB | of it the weight's gradient |")
    print("|---|---|---|---|---|---|")
    shapes = [(count, vocab) for count in CURVE_TOKENS] + [(tokens, count) for count in CURVE_VOCABULARIES]
    for n, v in shapes:
        case = Case(n, 1.0, width, v, dtype, device)
        inputs = case.inputs()
        seconds = statistics.median([run(ours, inputs)[0] for _ in range(rounds + 1)][1:])
        del inputs
        memory, gradient = peak_in_subprocess(case, "ours"), v * width * 4 / 2**20
        each = seconds / n / v * 1e9
        print(f"| {n:,} | {v:,} | {seconds:.3f} | {each:.2f} | {memory:,.0f} | {gradient:,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", nargs="+", default=CUDA_SHAPES if device == "cuda" else CPU_SHAPES)
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"] if device == "cuda" else ["float32", "bfloat16"]
    )
    parser.add_argument("--contenders", nargs="+", default=available(device), choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time of one thread, not elapsed time")
    parser.add_argument("--profile", action="store_true", help="print the time per kernel and no comparison")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(Case(*json.loads(arguments.case)), arguments.peak))
        return
    if arguments.cpu_time:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {name}")
    if arguments.curves:
        curves(device, arguments.dtypes[0], arguments.rounds)
        return
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            tokens, share, width, vocab = shape.split(",")
            case = Case(int(tokens), float(share), int(width), int(vocab), dtype, device)
            if arguments.profile:
                profile(case, arguments.contenders)
            else:
                clock = time.process_time if arguments.cpu_time else time.perf_counter
                compare(case, arguments.contenders, arguments.rounds, clock)


if __name__ == "__main__":
    main()
