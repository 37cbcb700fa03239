"""Measure speed, peak memory and communication of each parallelism strategy, and estimate them for many GPUs.

    python scripts/bench/bench_scaling.py    # 2 processes on the CPU, about 10 minutes
    python scripts/bench/bench_scaling.py --only ddp zero3
    python scripts/bench/bench_scaling.py --estimate    # only the estimate

Each strategy runs the command of a user twice. The bytes sent per step are the difference between a shorter
and a longer run, which excludes start and end. They are read from the counter of the loopback device; if
`unshare` can create a network namespace, the run uses its own, so that no other traffic is counted. The
strategies take turns within a round; the results are medians over rounds.

The estimate is based on the share of the peak throughput measured on one GPU (docs/benchmarks.md) and on the
bytes that `traffic` computes; the table of the measurement shows them next to the measured bytes. It assumes
that communication overlaps with half of the computation, and that all ranks are equally fast.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from make_example import read_conversations, train_tokenizer, write_conversations

SHORT, LONG = 4, 10
"""Optimizer steps of the shorter and the longer run."""
ROWS = 8
"""Rows per optimizer step, in one micro-batch per rank."""
ZERO = {name: str(ROOT / f"ds_config/{name}.json") for name in ("zero1", "zero2", "zero3", "zero3_offload")}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"per_device_train_batch_size": ROWS}),
    "ddp": (2, {}),
    "zero1": (2, {"deepspeed": ZERO["zero1"]}),
    "zero2": (2, {"deepspeed": ZERO["zero2"]}),
    "zero3": (2, {"deepspeed": ZERO["zero3"]}),
    "zero3_offload": (2, {"deepspeed": ZERO["zero3_offload"]}),
    "zero3, checkpointing": (2, {"deepspeed": ZERO["zero3"], "enable_gradient_checkpointing": True}),
    "zero3, 2 ranks per sequence": (
        2,
        {"deepspeed": ZERO["zero3"], "sequence_parallel_size": 2, "per_device_train_batch_size": ROWS},
    ),
    "fsdp2": (2, {"fsdp": True}),
    "ddp, LoRA": (2, {"lora_r": 16}),
    "zero3, LoRA": (2, {"deepspeed": ZERO["zero3"], "lora_r": 16}),
}


class Measurement(NamedTuple):
    """Results of the longer run of a strategy.

    Attributes:
        tokens: per second, over all ranks.
        memory: peak of the largest rank, in GiB.
        traffic: sent per rank and optimizer step, in MiB.
    """

    tokens: float
    memory: float
    traffic: float


def make_inputs(folder: Path) -> int:
    """Write a model and training data and return the number of the model's parameters."""
    train, _ = write_conversations(folder / "data", 2000)
    tokenizer = train_tokenizer(read_conversations(train))
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model.num_parameters()


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def launcher_of(ranks: int, is_deepspeed: bool) -> list[str]:
    """Return the command that starts a script with a number of ranks on this machine, without the script."""
    if is_deepspeed:
        module, options = "deepspeed.launcher.runner", [f"--num_accelerators={ranks}"]
    elif ranks > 1:
        module = "torch.distributed.run"
        options = [f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1"]
    else:
        return [sys.executable]
    return [sys.executable, "-m", module, *options, f"--master_port={free_port()}"]


def run(folder: Path, name: str, steps: int) -> tuple[list[dict[str, float]], int]:
    """Return the log records of a run and the bytes sent over the loopback device."""
    ranks, flags = WAYS[name]
    output = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        "model_name_or_path": folder / "model", "data_files": folder / "data" / "train.jsonl",
        "output_dir": output, "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report": False,
        "verify_save": False, "per_device_train_batch_size": ROWS // ranks, "use_cpu": True,
        "train_sampling_strategy": "sequential", "data_cache_dir": folder / "cache", **flags,
    }  # fmt: skip
    launcher = launcher_of(ranks, "deepspeed" in flags)
    words = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    counter = "cat /sys/class/net/lo/statistics/tx_bytes"
    if MAY_UNSHARE:
        # With its own /sys, which would otherwise show the devices outside of the namespace.
        setup = f"mount -t sysfs none /sys; ip link set lo up; {counter}"
        inside = [
            "unshare",
            "--net",
            "--mount",
            "bash",
            "-c",
            f'{setup}; "$@" >&2; code=$?; {counter}; exit $code',
        ]
    else:
        inside = ["bash", "-c", f'{counter}; "$@" >&2; code=$?; {counter}; exit $code']
    done = subprocess.run(
        [*inside, "bench", *launcher, str(ROOT / "train_dft.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    before, after = map(int, done.stdout.split())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [record for record in history if "loss" in record], after - before


MAY_UNSHARE = (
    subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-c", "mount -t sysfs none /sys && ip link set lo up"],
        capture_output=True,
    ).returncode
    == 0
)


def measure(folder: Path, name: str) -> Measurement:
    """Measure one strategy with a shorter and a longer run."""
    ranks, _ = WAYS[name]
    _, bytes_short = run(folder, name, SHORT)
    records, bytes_long = run(folder, name, LONG)
    timed = records[2:]
    return Measurement(
        statistics.median(record["tokens_per_second"] for record in timed),
        max(record["peak_memory_gib"] for record in records),
        (bytes_long - bytes_short) / (LONG - SHORT) / ranks / 2**20,
    )


class Machine(NamedTuple):
    """Assumed properties of one of the eight GPUs of a node.

    Attributes:
        flops: peak throughput of dense bfloat16 products, in FLOP per second.
        share: the share of `flops` that a step reaches, measured on one GPU.
        memory: capacity in GiB.
        inside, outside: bandwidth of a GPU within its node and to other nodes, in bytes per second.
    """

    flops: float = 989e12
    share: float = 0.29
    memory: float = 80
    inside: float = 450e9
    outside: float = 50e9


class Way(NamedTuple):
    """Memory and communication of a rank under a strategy, in bytes per parameter.

    Attributes:
        whole: memory that each rank needs, independent of the number of ranks.
        shared: memory that is divided by the number of ranks.
        per_step, per_batch: bytes sent per optimizer step, and per micro-batch.
    """

    whole: float
    shared: float
    per_step: float
    per_batch: float


BFLOAT16 = {
    "ddp": Way(whole=18, shared=0, per_step=8, per_batch=0),
    "zero1": Way(whole=6, shared=12, per_step=6, per_batch=0),
    "zero2": Way(whole=2, shared=16, per_step=2, per_batch=4),
    "zero3": Way(whole=0, shared=18, per_step=0, per_batch=6),
}
"""Strategies of the estimate: bfloat16 weights with float32 master weights, moments and gradient sums, as in
ds_config/. DDP has float32 weights under autocast: 4 bytes of weights + 2 of their copy + 4 of gradients + 8
of moments. The bytes sent are those of ring algorithms on many ranks: gathering weights sends each of them
once, in bfloat16. An all-reduce of gradients sends each twice (DDP in float32, ZeRO-1 and 2 in bfloat16), a
reduce-scatter once (ZeRO-3). ZeRO-3 gathers the weights for forward and backward of each micro-batch."""


def traffic(name: str, parameters: float, ranks: int, itemsize: float, batches: int) -> float:
    """Return the bytes that a rank sends in an optimizer step.

    Args:
        itemsize: number of bytes per transmitted element.
        batches: micro-batches per step.
    """
    way = BFLOAT16[name]
    # BFLOAT16 assumes that DDP sends float32, and the others bfloat16.
    scale = itemsize / (4 if name == "ddp" else 2)
    return parameters * (way.per_step + batches * way.per_batch) * scale * (ranks - 1) / ranks


def estimate(parameters: float, width: int, layers: int, ranks: int, tokens: int) -> list[str]:
    """Return the rows of the table: memory, time and tokens per second of each strategy.

    Args:
        width: hidden size of the model.
        tokens: tokens of the single micro-batch per step on each GPU.
    """
    machine = Machine()
    rows = []
    compute = 6 * parameters * tokens / (machine.flops * machine.share)
    speed = machine.inside if ranks <= 8 else machine.outside
    # Gradient checkpointing keeps the input of each layer. 3 GiB: the layer being recomputed, and the head.
    activations = 2 * tokens * width * layers / 2**30 + 3
    for name, way in BFLOAT16.items():
        memory = parameters * (way.whole + way.shared / ranks) / 2**30 + activations
        sent = traffic(name, parameters, ranks, 4 if name == "ddp" else 2, 1)
        seconds = compute + max(0.0, sent / speed - compute / 2)
        fits = memory < 0.92 * machine.memory
        rate = f"{ranks * tokens / seconds:,.0f}" if fits else "does not fit"
        rows.append(
            f"| {ranks} | {name} | {memory:,.0f} | {sent / 2**30:,.1f} | {compute:.2f} | "
            f"{seconds:.2f} | {rate} |"
        )
    return rows


def print_estimate() -> None:
    """Print the tables for 8, 64 and 512 GPUs."""
    for size, parameters, width, layers in (("7B", 7.6e9, 3584, 28), ("70B", 72.7e9, 8192, 80)):
        print(f"\n{size}: {parameters / 1e9:.1f} G parameters, micro-batches of 8,192 tokens per GPU\n")
        print("| GPUs | | GiB per GPU | GiB sent per step | s computing | s per step | tokens per second |")
        print("|---|---|---|---|---|---|---|")
        for ranks in (8, 64, 512):
            print(*estimate(parameters, width, layers, ranks, 8192), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure parallelism strategies on 2 CPU processes.")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--estimate", action="store_true", help="print only the estimate for many GPUs")
    arguments = parser.parse_args()
    if not arguments.estimate:
        print_measurements(arguments.only, arguments.rounds)
    print_estimate()


def print_measurements(names: list[str], rounds: int) -> None:
    """Measure the strategies in turns and print their table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_inputs(folder)
        print(f"{parameters / 1e6:.1f} M parameters in float32, {ROWS} rows a step, 2 CPU processes")
        print(f"network namespace of its own: {MAY_UNSHARE}\n")
        results: dict[str, list[Measurement]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                results[name].append(measure(folder, name))
                print(f"  {name}: {results[name][-1]}", file=sys.stderr, flush=True)
        print("| | tokens per second | peak memory, GiB | MiB sent per step and rank | estimated |")
        print("|---|---|---|---|---|")
        for name, runs in results.items():
            tokens, memory, sent = (statistics.median(values) for values in zip(*runs, strict=True))
            estimated = f"{traffic(name, parameters, 2, 4, 1) / 2**20:.0f}" if name in BFLOAT16 else ""
            print(f"| {name} | {tokens:,.0f} | {memory:.2f} | {sent:.0f} | {estimated} |")


if __name__ == "__main__":
    main()
