"""Print the sequences that a model would be trained on, prompts and completions, and the data report.

    python scripts/show_data.py --model_name_or_path MODEL --data_files train.jsonl
    python scripts/show_data.py --model_name_or_path MODEL --data_files train.jsonl --count 5 --shuffle True
    python scripts/show_data.py --model_name_or_path MODEL --data_files train.jsonl --lines 12 40
    python scripts/show_data.py --model_name_or_path MODEL --data_files train.jsonl --html d.html --count 99

Takes all data flags of train_dft.py. The prepared data is cached, and train_dft.py reuses it.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import HfArgumentParser

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.arguments.data import (
    DataArguments,
    check_data_arguments,
    prepare_options,
    template_date,
    template_variables,
)
from dft.bounds import check_bounds
from dft.data.batches.dataset import Sequences
from dft.data.preparing.data_report import file_group
from dft.data.preparing.evaluation_sets import parse_evaluation_files
from dft.data.preparing.prepare import PreparedData, check_report_folder, find_sources, prepare
from dft.data.preparing.prompts import conversations_of_rows
from dft.data.reading.data_file import check_not_data
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.tokenizer import load_tokenizer, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors, write_atomically
from dft.report.pages.data import data_page
from dft.report.terminal.data import data_details, show_sequences


@dataclass
class ShowArguments:
    """Flags that select the model and the sequences to show."""

    _argument_group_name: ClassVar[str] = "show"

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of the model and its tokenizer."})
    add_tokens: list[str] = field(
        default_factory=list,
        metadata={"help": "Special tokens to add to the vocabulary, as in train_dft.py."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    split: str = field(
        default="train",
        metadata={"help": "What to show: train, eval, or eval_NAME for an evaluation set with a name."},
    )
    count: int = field(default=3, metadata={"help": "How many sequences to show."})
    shuffle: bool = field(
        default=False, metadata={"help": "Show random sequences instead of the first ones."}
    )
    lines: list[int] = field(
        default_factory=list,
        metadata={"help": "Show the sequences of these lines of the data files instead."},
    )
    html: str | None = field(
        default=None,
        metadata={
            "help": "Write a page with the sequences to this file instead of printing them, and with the "
            "examples of the warnings about the data: each beside its conversation, those with problems "
            "first."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of splits, samples and --shuffle."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for data_report.json and rejected.jsonl."}
    )


def main() -> None:
    report_user_errors()
    parser = HfArgumentParser((DataArguments, ShowArguments), allow_abbrev=False)
    data, show, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise UserError(f"unknown argument {unknown[0]} ({parser.prog} --help lists every flag)")
    if show.count < 1:
        raise UserError(f"--count {show.count}: must be greater than 0")
    show.model_name_or_path = os.path.expanduser(show.model_name_or_path)
    data.chat_template = os.path.expanduser(data.chat_template) if data.chat_template else None
    check_bounds(data)
    check_data_arguments(data)
    check_targets(data, show)
    if show.output_dir is not None:
        # Runs before the data is prepared, so that a wrong path fails early.
        with convert_write_errors(Path(show.output_dir), "--output_dir"):
            Path(show.output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer, notes = load_tokenizer(
        show.model_name_or_path,
        chat_template=data.chat_template,
        trust_remote_code=show.trust_remote_code,
        add_tokens=show.add_tokens,
    )
    stops = stop_token_ids(show.model_name_or_path, show.trust_remote_code)
    encoder = ChatEncoder(
        tokenizer,
        stops,
        template_variables(data),
        template_date(data),
        data.use_generation_tags,
        show.add_tokens,
    )
    prepared = prepare(
        data.data_files,
        data.eval_data_files,
        encoder,
        prepare_options(data, show.seed),
        cache_dir=Path(data.data_cache_dir).expanduser(),
        workers=data.preprocessing_num_workers,
    )
    if show.output_dir is not None:
        prepared.write_report(Path(show.output_dir))
    if show.split not in prepared.datasets:
        if list(prepared.datasets) == ["train"]:
            raise UserError(f"--split {show.split} needs --eval_data_files or --validation_split_percentage")
        raise UserError(f"--split {show.split}: choose one of {', '.join(prepared.datasets)}")
    dataset = prepared.datasets[show.split].unpacked()
    rows = select_rows(dataset, show)
    lines = [*(f"note        {note}" for note in notes), *data_details(prepared.report, show.output_dir)]
    if show.html is not None:
        write_page(Path(show.html), data, show, prepared, encoder, rows, lines)
        print(f"wrote       {show.html}: {len(rows):,} sequences")
    else:
        print(show_sequences(dataset, tokenizer, rows, color=sys.stdout.isatty()))
        print()
    print("\n".join(lines))


def check_targets(data: DataArguments, show: ShowArguments) -> None:
    """Raise `UserError` if a file that is to be written is one of the data files."""
    eval_files = parse_evaluation_files(data.eval_data_files).files
    values = {"train": data.data_files, "eval": eval_files}
    sources = find_sources(values, prepare_options(data, show.seed))
    if show.output_dir is not None:
        check_report_folder(Path(show.output_dir), sources)
    if show.html is not None:
        for members in sources.values():
            check_not_data(Path(show.html), f"--html {show.html}", members)


def write_page(
    path: Path,
    data: DataArguments,
    show: ShowArguments,
    prepared: PreparedData,
    encoder: ChatEncoder,
    rows: list[int],
    lines: list[str],
) -> None:
    """Write the page of some sequences.

    Raises:
        UserError: the file cannot be written.
    """
    dataset = prepared.datasets[show.split].unpacked()
    warnings = [entry for entry in prepared.report["warnings"] if entry["split"] == show.split]
    if not show.lines:
        rows += [row for row in warned_rows(dataset, warnings) if row not in rows]
    files = prepared.sources[file_group(show.split, prepared.names)]
    conversations = conversations_of_rows(dataset, rows, files, encoder)
    page = data_page(dataset, rows, conversations, encoder, warnings, lines, prepared.rejected_rows())
    with convert_write_errors(path, "--html"):
        write_atomically(path, [page])


def warned_rows(dataset: Sequences, warnings: list[dict[str, Any]]) -> list[int]:
    """Return the indices of the sequences of the conversations that warnings of the data report name."""
    places = {place for entry in warnings for place in entry["examples"]}
    lines = {int(place.rpartition(":")[2]) for place in places}
    origins = ((row, dataset.origins(row)[0]) for row in range(len(dataset) if lines else 0))
    return [
        row for row, (file, line) in origins if line in lines and f"{dataset.files[file]}:{line}" in places
    ]


def select_rows(dataset: Sequences, show: ShowArguments) -> list[int]:
    """Return the indices of the sequences to show.

    Raises:
        UserError: the split contains none of the `--lines`.
    """
    if show.lines:
        lines = set(show.lines)
        rows = [row for row in range(len(dataset)) if dataset.origins(row)[0][1] in lines]
        if not rows:
            words = " ".join(map(str, show.lines))
            raise UserError(f"--lines {words}: none of them is among the {show.split} conversations")
        return rows
    rows = np.arange(len(dataset))
    if show.shuffle:
        rows = np.random.default_rng(show.seed).permutation(rows)
    return rows[: show.count].tolist()


if __name__ == "__main__":
    main()
