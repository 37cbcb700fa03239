"""Measure start-up: the time of --help, of errors, and from the command to the first training step.

    python scripts/bench/bench_start.py [--rounds 5] [--model MODEL] [--only help --only "1 process"]

Answers, relative to a process that imports TrainingArguments from transformers and nothing else:

help:        --help.
flag:        a flag that does not exist.
value:       a value that is not a number.
file:        a data file that does not exist.

Starts, until the first training step begins (the data is prepared already), relative to a bare script:

1 process:   against a script that imports torch and transformers, and loads the model.
trainer:     against a script that imports torch and transformers, and loads tokenizer, model and a `Trainer`.
ZeRO-3 x N:  with the deepspeed launcher, against a script with the same launcher that imports torch,
             transformers and DeepSpeed, loads the model sharded, and initializes the engine with AdamW.

The contenders take turns; each measurement is a new process. Wall time is that until the step begins, CPU
time is user and system time of all processes. Medians; ratios are those of one round, and their median.
Each process has one thread: on a machine with other work, threads that wait for each other would be measured.
The default model is that of make_example.py, which loads in no time: what is measured are fixed costs.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/bench")]

MARK = "BENCH_START_MARK"
"""Environment variable: the file that the first rank creates when it is ready."""
FLOOR = "from transformers import TrainingArguments"
READY = f"""
def ready():
    import os
    if os.environ.get("RANK", "0") == "0":
        open(os.environ["{MARK}"], "w").close()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)
"""
"""Marks the end of a start and ends the process; part of every script below."""
BARE = f"""
import sys
import torch
import transformers
{READY}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ready()
"""
TRAINER = f"""
import sys
import torch
import transformers
{READY}
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
on_cpu = not torch.cuda.is_available()
arguments = transformers.TrainingArguments(sys.argv[2], use_cpu=on_cpu, report_to="none")
trainer = transformers.Trainer(model, arguments, processing_class=tokenizer)
trainer.create_optimizer()
ready()
"""
SHARDED = f"""
import sys
import deepspeed
import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig
{READY}
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at each start
deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
settings = {{"train_micro_batch_size_per_gpu": 8, "zero_optimization": {{"stage": 3}}}}
sharded = HfDeepSpeedConfig(settings)  # from_pretrained shards the weights while this object exists
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[-1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
ready()
"""
OURS = f"""
import train_dft
from dft.startup import fast_imports
with fast_imports():  # as train_dft.py imports them
    import torch
    from transformers.trainer_callback import DefaultFlowCallback
{READY}
DefaultFlowCallback.on_step_begin = lambda *args, **kwargs: ready()
train_dft.main()
"""


@dataclass(frozen=True)
class Seconds:
    """Wall time and CPU time of a start."""

    wall: float
    cpu: float


def measure(command: list[str], folder: Path, code: int) -> Seconds:
    """Run a command, and return the time until it marks its end, or until it exits if it does not.

    Raises:
        SystemExit: the command exits with another code than expected.
    """
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    on_cpu = {} if has_gpu() else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {
        **os.environ, **on_cpu, MARK: str(mark), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.time()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    end = mark.stat().st_mtime if mark.exists() else time.time()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(end - start, cpu)


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()  # without importing torch in the process that measures


def flags_of(folder: Path, model: Path, **more: object) -> list[str]:
    """Return the flags of a short run."""
    settings = {
        "model_name_or_path": model, "data_files": folder / "data" / "train.jsonl",
        "output_dir": folder / "out", "overwrite_output_dir": True, "max_steps": 1, "save_strategy": "no",
        "use_cpu": not has_gpu(), "data_cache_dir": folder / "cache", "report_to": "none", **more,
    }  # fmt: skip
    return [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]


def answers(folder: Path, model: Path) -> dict[str, Callable[[], Seconds]]:
    """Return what is measured of processes that only answer, the floor first."""
    script = [sys.executable, str(ROOT / "train_dft.py")]
    return {
        "floor": partial(measure, [sys.executable, "-c", FLOOR], folder, 0),
        "help": partial(measure, [*script, "--help"], folder, 0),
        "flag": partial(measure, [*script, *flags_of(folder, model, no_such_flag=1)], folder, 2),
        "value": partial(measure, [*script, *flags_of(folder, model, learning_rate="high")], folder, 2),
        "file": partial(measure, [*script, *flags_of(folder, model, data_files="no.jsonl")], folder, 2),
    }


def starts(folder: Path, model: Path) -> dict[str, tuple[Callable[[], Seconds], Callable[[], Seconds]]]:
    """Return the bare script and ours for each way to start a run."""
    from bench_scaling import launcher_of

    for name, text in (("bare", BARE), ("trainer", TRAINER), ("sharded", SHARDED), ("ours", OURS)):
        (folder / f"{name}.py").write_text(text)

    def start(launcher: list[str], name: str, words: list[str]) -> Callable[[], Seconds]:
        return partial(measure, [*launcher, str(folder / f"{name}.py"), *words], folder, 0)

    ours = start([sys.executable], "ours", flags_of(folder, model))
    model_and_output = [str(model), str(folder / "out")]
    ways = {
        "1 process": (start([sys.executable], "bare", [str(model)]), ours),
        "trainer": (start([sys.executable], "trainer", model_and_output), ours),
    }
    zero = flags_of(folder, model, deepspeed=ROOT / "ds_config/zero3.json")
    for ranks in (1, 2):
        launcher = launcher_of(ranks, is_deepspeed=True)
        bare = start(launcher, "sharded", [str(model)])
        ways[f"ZeRO-3 x {ranks}"] = (bare, start(launcher, "ours", zero))
    return ways


def show(name: str, floor: list[Seconds], ours: list[Seconds]) -> None:
    """Print the medians of a contender, and those of its ratios to the floor in the same round."""
    ratios = {
        kind: statistics.median(
            vars(mine)[kind] / vars(bare)[kind] for mine, bare in zip(ours, floor, strict=True)
        )
        for kind in ("wall", "cpu")
    }
    middle = {
        kind: [statistics.median(vars(seconds)[kind] for seconds in all_) for all_ in (floor, ours)]
        for kind in ("wall", "cpu")
    }
    print(
        f"{name:<12} wall {middle['wall'][1]:5.2f} s, floor {middle['wall'][0]:5.2f} s, "
        f"{ratios['wall']:.2f} x"
        f"     CPU {middle['cpu'][1]:5.2f} s, floor {middle['cpu'][0]:5.2f} s, {ratios['cpu']:.2f} x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="default: the model of make_example.py")
    parser.add_argument("--only", action="append", help="name of a contender; may be repeated")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, str(ROOT / "scripts/make_example.py"), name],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        model = arguments.model.resolve() if arguments.model else folder / "model"

        def is_chosen(name: str) -> bool:
            return not arguments.only or name in arguments.only

        replies = answers(folder, model)
        floor = replies.pop("floor")
        replies = {name: reply for name, reply in replies.items() if is_chosen(name)}
        times: dict[str, list[Seconds]] = {name: [] for name in ("floor", *replies)}
        for number in range(-1, arguments.rounds if replies else -1):  # the first round fills the disk cache
            for name, reply in (("floor", floor), *replies.items()):
                seconds = reply()
                times[name] += [seconds] if number >= 0 else []
        for name in replies:
            show(name, times["floor"], times[name])
        ways = {name: way for name, way in starts(folder, model).items() if is_chosen(name)}
        for name, (bare, ours) in ways.items():
            ours()  # prepares the data, which is cached from now on
            pairs = [(bare(), ours()) for _ in range(arguments.rounds)]
            show(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs])


if __name__ == "__main__":
    main()
