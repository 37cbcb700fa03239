"""Generate small stand-ins for the model and the data of the paper's recipe, with the original columns.

    python scripts/paper/stand_ins.py runs/dry

The task is to repeat a number in a box, and the model has half a million weights. They only test that every
step runs.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from make_example import tiny_model, train_tokenizer

from dft.ranks import quiet_libraries


def random_problem(generator: random.Random) -> tuple[str, str, str]:
    """Return a problem, its solution and its answer."""
    number = generator.randint(0, 9)
    return f"Which number is {number}?", f"It is \\boxed{{{number}}}.", str(number)


def training_row(problem: str, solution: str) -> dict[str, Any]:
    """Return a row with the columns of NuminaMath-CoT."""
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": messages}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where sources/ and model/ are written")
    folder = parser.parse_args().folder
    quiet_libraries()
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    rows = [training_row(*random_problem(generator)[:2]) for _ in range(400)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "sources/train.parquet")
    problems = {
        name: [random_problem(generator) for _ in range(6)]
        for name in ("math500", "minerva", "olympiad", "aime24", "amc23")
    }
    benchmarks = {
        "math500": [
            {"problem": p, "solution": s, "answer": a, "level": 1} for p, s, a in problems["math500"]
        ],
        "minerva": [{"question": p, "answer": a} for p, _, a in problems["minerva"]],
        "olympiad": [{"question": p, "final_answer": [a]} for p, _, a in problems["olympiad"]],
        "aime24": [{"id": i, "problem": p, "solution": s} for i, (p, s, _) in enumerate(problems["aime24"])],
        "amc23": [{"question": p, "answer": float(a)} for p, _, a in problems["amc23"]],
    }
    for name, of_benchmark in benchmarks.items():
        write_rows(folder / f"sources/{name}.jsonl", of_benchmark)
    tokenizer = train_tokenizer([row["messages"] for row in rows], vocab_size=300)
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
