"""Small local stand-ins for the model and the data of the paper's recipe, with the columns of the real ones.

    python scripts/paper/stand_ins.py runs/dry

Numbers to repeat in a box, and a model of half a million weights: they show that every step works, no more.
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


def number_to_repeat(generator: random.Random) -> tuple[str, str, str]:
    """A problem, its solution and its answer."""
    number = generator.randint(0, 9)
    return f"Which number is {number}?", f"It is \\boxed{{{number}}}.", str(number)


def training_row(problem: str, solution: str) -> dict[str, Any]:
    """With the columns of NuminaMath-CoT."""
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": messages}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    quiet_libraries()
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    rows = [training_row(*number_to_repeat(generator)[:2]) for _ in range(400)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "sources/train.parquet")
    asked = {
        name: [number_to_repeat(generator) for _ in range(6)]
        for name in ("math500", "minerva", "olympiad", "aime24", "amc23")
    }
    made = {
        "math500": [{"problem": p, "solution": s, "answer": a, "level": 1} for p, s, a in asked["math500"]],
        "minerva": [{"question": p, "answer": a} for p, _, a in asked["minerva"]],
        "olympiad": [{"question": p, "final_answer": [a]} for p, _, a in asked["olympiad"]],
        "aime24": [{"id": i, "problem": p, "solution": s} for i, (p, s, _) in enumerate(asked["aime24"])],
        "amc23": [{"question": p, "answer": float(a)} for p, _, a in asked["amc23"]],
    }
    for name, some in made.items():
        write_lines(folder / f"sources/{name}.jsonl", some)
    tokenizer = train_tokenizer([row["messages"] for row in rows], vocab_size=300)
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
