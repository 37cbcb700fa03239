"""Write arithmetic problems as chat, to train a small pretrained model and to test it.

    python scripts/make_problems.py FOLDER [--train 256]

The problems are products and sums of one-digit numbers from reasoning-gym. FOLDER/train.jsonl and
FOLDER/eval.jsonl have none in common.

needs: pip install -r requirements-real.txt
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Write arithmetic problems as chat.")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=256, help="number of conversations to train on")
    arguments = parser.parse_args()
    if arguments.train < 1:
        raise UserError(f"--train {arguments.train}: pass a number of at least 1")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("the package reasoning-gym is missing; run: pip install -r requirements-real.txt")
    from scripts.study.real_tasks import DATA, conversation, held_out, training_rows
    from scripts.study.study_task import write_rows

    train, evaluation = arguments.folder / "train.jsonl", arguments.folder / "eval.jsonl"
    rows = training_rows(DATA["half known"], arguments.train, "quickstart")
    problems = held_out("short arithmetic")
    with convert_write_errors(arguments.folder, "FOLDER"):
        write_rows(train, rows)
        write_rows(
            evaluation, [conversation(problem.question, problem.written_out()) for problem in problems]
        )
    print(f"wrote {len(rows)} conversations to {train}, and {len(problems)} problems to {evaluation}")


if __name__ == "__main__":
    main()
