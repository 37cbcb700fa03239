"""Measure training throughput end to end: this trainer, TRL's SFTTrainer with its DFT loss, and bare loops.

    python scripts/bench/bench_train.py --corpus GSM8K/train.chatml.jsonl
    python scripts/bench/bench_train.py --corpus GSM8K/train.chatml.jsonl --vocabularies 4096 --rounds 5

On a CPU: a Qwen3 model with 4 layers and hidden size 256 in float32, with a small and a large vocabulary, and
sequences of up to 512 tokens. On a GPU: one with 24 layers and hidden size 896 (0.5 billion weights) in
bfloat16, with the large vocabulary and larger batches of up to 2,048 tokens per row; its peak memory is
measured as well. Assistant tokens are supervised; AdamW, gradients clipped at norm 1, one micro-batch per
step.

bare:     a loop in plain PyTorch on batches built in advance: logits of the supervised rows, one
          cross-entropy, fused AdamW, no metrics, no logging. Batches are padded, or packed with a mask.
flat:     the same loop on concatenated sequences, with varlen attention.
floor:    the same with compiled layers. A trainer can hardly be faster.
ours:     `DFTTrainer` with varlen attention, logging every step.
compiled: the same with --torch_compile True.
liger:    the same with --use_liger_kernel True, on a GPU where liger-kernel is installed.
off:      the same with --fused_head off.
trl:      `SFTTrainer` with `loss_type="dft"` and assistant_only_loss (pip install trl). Packed with its "bfd"
          strategy; on a GPU with Liger's kernels and without padding, where liger-kernel and flash-attn are.

Each runs unpacked and packed (full rows). Each measurement runs in a separate process, the contenders take
turns, and the first steps of each are not measured. Padding does not count as tokens.

The share of the attainable is the arithmetic of the tokens (`dft.training.measuring.throughput.ModelFlops`)
against the rate of large matrix products in the same dtype, measured in the same round.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from train_contenders import BATCH, CONTENDERS, ON_GPU, make_model, prepare_dataset

CONVERSATIONS = 7000 if ON_GPU else 600
VOCABULARIES = (4096, 151_936)
PRODUCT = 8192 if ON_GPU else 2048
"""Size of the square matrices whose product is timed."""


def measure_in_subprocess(name: str, folder: Path, vocabulary: int, packed: bool) -> tuple[float, float]:
    """Return the (tokens per second, peak GPU memory in GiB) of a contender, measured in a new process."""
    words = ["--measure", name, "--folder", str(folder), "--vocabularies", str(vocabulary)]
    words += ["--sequences", str(BATCH["unpacked"])]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [sys.executable, __file__, *words, *(["--packed"] if packed else [])],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    rate, peak = map(float, done.stdout.splitlines()[-1].split())
    return rate, peak


def flops_per_token(folder: Path, vocabulary: int) -> float:
    """Return the mean operations per token of a training step on the data of a folder."""
    from dft.training.measuring.throughput import model_flops

    dataset = prepare_dataset(folder, packed=False)
    lengths = [len(row["input_ids"]) for row in dataset]
    supervised = sum(label != -100 for row in dataset for label in row["labels"][1:])
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = model_flops(make_model(folder, vocabulary))
    assert flops is not None
    return flops.total(sum(lengths), pairs, supervised) / sum(lengths)


def product_rate() -> float:
    """Return the operations per second of large matrix products in the dtype of the models."""
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    left, right = (torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        left @ right
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * PRODUCT**3 / statistics.median(seconds[2:])


Case = tuple[str, str]
"""Batches ("unpacked" or "packed") and the name of a contender."""


def compare(folder: Path, vocabulary: int, batches: list[str], names: list[str], rounds: int) -> None:
    """Measure the contenders in turns and print their rows of the table."""
    rates: dict[Case, list[float]] = {(kind, name): [] for kind in batches for name in names}
    peaks: dict[Case, float] = {}
    products = []
    for number in range(rounds):
        products.append(product_rate())
        print(f"round {number + 1}: matrix products {products[-1] / 1e9:,.0f} GFLOPS", file=sys.stderr)
        for kind, name in rates:
            rate, peaks[kind, name] = measure_in_subprocess(name, folder, vocabulary, kind == "packed")
            rates[kind, name].append(rate)
            print(f"round {number + 1}: {kind} {name} {rate:,.0f}", file=sys.stderr, flush=True)
    flops = flops_per_token(folder, vocabulary)
    for (kind, name), runs in rates.items():
        cells = [f"{vocabulary:,}", kind, name, f"{statistics.median(runs):,.0f}"]
        cells += [ratio(runs, rates[kind, base]) for base in ("bare", "floor") if base in names]
        cells.append(ratio([flops * rate for rate in runs], products))
        cells += [f"{peaks[kind, name]:.1f}", mfu(flops * statistics.median(runs))] if ON_GPU else []
        print(f"| {' | '.join(cells)} |", flush=True)
    if len(batches) == 2 and "ours" in names:
        value = ratio(rates["unpacked", "ours"], rates["packed", "ours"])
        print(f"ours, unpacked to packed: {value}", file=sys.stderr)


def ratio(values: list[float], bases: list[float]) -> str:
    """Return the median of the ratios of the rounds."""
    return f"{statistics.median(value / base for value, base in zip(values, bases, strict=True)):.2f}"


def mfu(flops: float) -> str:
    """Return the share of the peak that the data sheet of the device states."""
    from dft.training.measuring.throughput import peak_flops

    peak = peak_flops(torch.device("cuda"))
    return "unknown" if peak is None else f"{flops / peak:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="ChatML .jsonl; its first conversations are used")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES[ON_GPU:])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--batches", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--sequences", type=int, default=BATCH["unpacked"], help="of an unpacked batch")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    BATCH["unpacked"] = arguments.sequences
    if arguments.measure:
        (vocabulary,) = arguments.vocabularies
        rate = CONTENDERS[arguments.measure](arguments.folder, vocabulary, arguments.packed)
        print(rate, torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0)
        return
    if arguments.corpus is None:
        parser.error("--corpus is required")

    from make_example import read_conversations, train_tokenizer

    names = list(arguments.contenders)
    if "trl" in names and importlib.util.find_spec("trl") is None:
        print("trl cannot be imported and is skipped", file=sys.stderr)
        names.remove("trl")
    if "liger" in names and not (ON_GPU and importlib.util.find_spec("liger_kernel")):
        print("liger needs a GPU and liger-kernel and is skipped", file=sys.stderr)
        names.remove("liger")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        folder = Path(name)
        train_tokenizer(read_conversations(arguments.corpus), VOCABULARIES[0]).save_pretrained(
            folder / "tokenizer"
        )
        with open(arguments.corpus, "rb") as lines, open(folder / "data.jsonl", "wb") as stream:
            stream.writelines(islice(lines, CONVERSATIONS))
        columns = ["vocabulary", "", "", "tokens per second"]
        columns += [f"to {base}" for base in ("bare", "floor") if base in names]
        columns += ["share of the attainable", *(["peak GiB", "mfu"] if ON_GPU else [])]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for vocabulary in arguments.vocabularies:
            compare(folder, vocabulary, arguments.batches, names, arguments.rounds)


if __name__ == "__main__":
    main()
