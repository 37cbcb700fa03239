"""Command-line flags for the data."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar

from dft.bounds import Bounds
from dft.data.conversations.conversation import RESERVED_VARIABLES
from dft.data.preparing.evaluation_sets import parse_evaluation_files
from dft.data.preparing.file_rules import column_flags
from dft.data.preparing.options import DataOptions, PrepareOptions
from dft.data.templates.template import DATE
from dft.errors import UserError
from dft.metrics import ACC
from dft.strict_json import refuse_repeated_keys

MAX_QUOTED = 200
"""Maximum number of characters of a value that an error message quotes."""


def default_cache_dir() -> str:
    """Return the user's cache folder. A relative XDG_CACHE_HOME is ignored, as XDG specifies."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return str((folder if folder.is_absolute() else Path("~/.cache")) / "dft")


@dataclass
class DataFiles:
    """Flags that name the data files."""

    data_files: list[str] = field(
        metadata={
            "help": "Conversations to train on: .jsonl, .json, .csv, .tsv files (also .gz, .zst), .parquet, "
            ".arrow or .zip files, folders, globs, hub datasets as owner/name[:split], or entries of a "
            "dataset_info.json as FILE:NAME. Several are merged."
        },
    )
    eval_data_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Conversations to evaluate on, instead of a validation split. NAME=FILE for each of "
            "several evaluation sets, which have metrics of their own: eval_NAME_acc."
        },
    )


@dataclass
class DataArguments(DataOptions, DataFiles):
    """Data flags. Those that affect the prepared data are inherited from `DataOptions`."""

    _argument_group_name: ClassVar[str] = "data"

    chat_template: str | None = field(
        default=None,
        metadata={"help": "Jinja file that replaces the chat template of the tokenizer."},
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Variables for the chat template as a JSON object, such as "
            "'{\"enable_thinking\": false}'. The "
            "chat_template_kwargs of a row take precedence."
        },
    )
    chat_template_date: str = field(
        default=str(DATE),
        metadata={
            "help": "Date (YYYY-MM-DD) for chat templates that write today's date with strftime_now, so "
            "that the same data gives the same tokens on any day."
        },
    )
    use_generation_tags: bool = field(
        default=False,
        metadata={
            "help": "Supervise only what the generation blocks of the chat template mark inside the text "
            "that the model generates. By default all of that text is supervised, whatever the blocks mark."
        },
    )
    preprocessing_num_workers: Annotated[int, Bounds(above=0, maximum=1024)] = field(
        default=min(os.cpu_count() or 1, 8), metadata={"help": "Number of processes that tokenize."}
    )
    data_cache_dir: str = field(
        default_factory=default_cache_dir,
        metadata={"help": "Folder for prepared data, which is reused if nothing that shapes it has changed."},
    )
    prepare_only: bool = field(
        default=False,
        metadata={"help": "Prepare the data, write data_report.json to the output folder, and exit."},
    )
    debug_data_processing: bool = field(
        default=False,
        metadata={"help": "Print the first sequences with their supervised tokens marked."},
    )


def resolve_validation_split(data: DataArguments) -> float:
    """Return the percentage to hold out for evaluation: 0 if there are files to evaluate on."""
    return 0.0 if data.eval_data_files else data.validation_split_percentage


def resolve_best_metric(metric: str | None, data: DataArguments) -> str | None:
    """Return the metric that selects checkpoints: with named evaluation sets, the default of the first."""
    names = parse_evaluation_files(data.eval_data_files).names
    return f"eval_{names[0]}_{ACC.name}" if names and metric == f"eval_{ACC.name}" else metric


def check_data_arguments(data: DataArguments) -> None:
    """Raise `UserError` for data flags that contradict one another or cannot be parsed."""
    if data.data_weights and len(data.data_weights) != len(data.data_files):
        weights = " ".join(f"{weight:g}" for weight in data.data_weights)
        raise UserError(
            f"--data_weights {weights}: {len(data.data_weights)} weights for {len(data.data_files)} entries "
            "of --data_files; pass one weight for each entry, in the same order"
        )
    column_flags(data)
    template_variables(data)
    template_date(data)


def template_variables(data: DataArguments) -> dict[str, Any]:
    """Return the variables of `--chat_template_kwargs`. Raise `UserError` if it is not a JSON object."""
    text = data.chat_template_kwargs
    if text is None:
        return {}
    flag = f"--chat_template_kwargs {text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + '...'}"
    try:
        variables = json.loads(
            text,
            object_pairs_hook=refuse_repeated_keys,
            parse_constant=_finite_number,
            parse_float=_finite_number,
        )
    except ValueError as error:
        raise UserError(f"{flag}: not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(
            f"--chat_template_kwargs {text[:80]}...: not valid JSON (nested too deeply)"
        ) from None
    if not isinstance(variables, dict):
        raise UserError(f"{flag}: expected a JSON object such as '{{\"enable_thinking\": false}}'")
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise UserError(f"{flag}: {name!r} is set from each row; remove it")
    return variables


def template_date(data: DataArguments) -> date:
    """Return the date of `--chat_template_date`. Raise `UserError` if it is not a date."""
    try:
        return date.fromisoformat(data.chat_template_date)
    except ValueError:
        raise UserError(
            f"--chat_template_date {data.chat_template_date}: expected a date such as {DATE}"
        ) from None


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def prepare_options(data: DataArguments, seed: int) -> PrepareOptions:
    """Return the options of the data preparation."""
    return PrepareOptions(
        **{option.name: vars(data)[option.name] for option in fields(DataOptions)}, seed=seed
    )
