"""Measure how training time grows with the length of packed rows, with and without a mask of token pairs.

    python scripts/bench/bench_attention.py

One row of N tokens, packed from sequences of 128 tokens; forward and backward pass of a Qwen3 model with 4
layers and hidden size 256 in float32 on a CPU, of one with 24 layers and hidden size 896 in bfloat16 on a
GPU.
The implementations take turns. The figures are microseconds per token: constant if time is linear in tokens.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from train_contenders import ON_GPU, make_model

from dft.data.batches.collator import FlatCollator, PackedCollator
from dft.training.attention.interface import VARLEN
from dft.training.batching import NON_MODEL_KEYS

SEQUENCE = 128
VOCABULARY = 4096
COLLATORS = {"sdpa": PackedCollator(0), VARLEN: FlatCollator()}


def seconds(model: torch.nn.Module, attention: str, tokens: int) -> float:
    """Return the seconds of a forward and backward pass over one packed row."""
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (tokens,), generator=generator).tolist()
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [SEQUENCE] * (tokens // SEQUENCE)}
    batch = COLLATORS[attention]([row])
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in NON_MODEL_KEYS
    }
    started = time.perf_counter()
    model.model(**inputs).last_hidden_state.square().mean().backward()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--attention", nargs="+", choices=COLLATORS, default=list(COLLATORS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = make_model(Path(), VOCABULARY).train()
    print(f"| tokens per row | {' | '.join(arguments.attention)} |\n|---{'|---' * len(arguments.attention)}|")
    for tokens in arguments.tokens:
        times: dict[str, list[float]] = {name: [] for name in arguments.attention}
        for number in range(arguments.rounds + 1):
            for name, values in times.items():
                value = seconds(model, name, tokens)
                if number:  # the first one allocates memory
                    values.append(value)
        cells = [f"{statistics.median(values) / tokens * 1e6:.0f} µs" for values in times.values()]
        print(f"| {tokens:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
