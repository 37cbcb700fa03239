"""Measure how long packing takes and how full the packed rows are.

python scripts/bench/bench_packing.py [--sequences 1000000]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from dft.data.preparing.packing import density, pack

CAPACITIES = (2048, 131_072)


def lengths(kind: str, count: int, capacity: int) -> np.ndarray:
    """Return the (count,) lengths of random sequences, with a fixed seed.

    Args:
        kind: "uniform", or "log-normal" for many short and few long sequences, as in conversations.
    """
    generator = np.random.default_rng(0)
    if kind == "uniform":
        return generator.integers(1, capacity + 1, count)
    tokens = generator.lognormal(np.log(capacity / 12), 0.8, count)
    return np.clip(tokens, 1, capacity).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print("| tokens per row | lengths | seconds | rows | full |")
    print("|---|---|---|---|---|")
    for capacity in CAPACITIES:
        for kind in ("uniform", "log-normal"):
            tokens = lengths(kind, arguments.sequences, capacity)
            started = time.perf_counter()
            _, offsets = pack(tokens, capacity, seed=0)
            seconds = time.perf_counter() - started
            rows = len(offsets) - 1
            full = 100 * density(tokens, rows, capacity)
            print(f"| {capacity:,} | {kind} | {seconds:.2f} | {rows:,} | {full:.2f} % |")


if __name__ == "__main__":
    main()
