"""How long packing takes, and how full the rows get.

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
    """(count,) tokens, seeded: evenly spread, or few long and many short ones as conversations are."""
    generator = np.random.default_rng(0)
    if kind == "uniform":
        return generator.integers(1, capacity + 1, count)
    drawn = generator.lognormal(np.log(capacity / 12), 0.8, count)
    return np.clip(drawn, 1, capacity).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print("| tokens per row | lengths | seconds | rows | full |")
    print("|---|---|---|---|---|")
    for capacity in CAPACITIES:
        for kind in ("uniform", "log-normal"):
            some = lengths(kind, arguments.sequences, capacity)
            started = time.perf_counter()
            _, offsets = pack(some, capacity, seed=0)
            seconds = time.perf_counter() - started
            rows = len(offsets) - 1
            full = 100 * density(some, rows, capacity)
            print(f"| {capacity:,} | {kind} | {seconds:.2f} | {rows:,} | {full:.2f} % |")


if __name__ == "__main__":
    main()
