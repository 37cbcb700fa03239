"""Command lines for the tests of flags."""

from pathlib import Path

from dft.arguments.conflicts import check_arguments, find_notes
from dft.arguments.parser import Arguments, parse_arguments
from dft.training.checkpoints.resume_point import prepare_output_folder, resolve_resume
from dft.training.optimizer import check_optimizer


def words(folder: Path, *more: str) -> list[str]:
    """Return a command line with the required flags."""
    return [
        "--model_name_or_path", "model", "--data_files", "a.jsonl", "b.jsonl",
        "--output_dir", str(folder / "out"), "--use_cpu", "True", *more,
    ]  # fmt: skip


def checked(folder: Path, *more: str) -> Arguments:
    """Return the arguments of a command line that passes all checks before the data is prepared."""
    arguments = parse_arguments(words(folder, *more))
    check_arguments(arguments)
    prepare_output_folder(arguments)
    arguments.training.resume_from_checkpoint, notes = resolve_resume(arguments)
    arguments.notes.extend([*notes, *find_notes(arguments)])
    if not arguments.data.prepare_only:
        check_optimizer(arguments.training)
    return arguments
