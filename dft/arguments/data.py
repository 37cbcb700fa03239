"""The flags of data preparation."""

import json
import math
import os
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

from dft.data.conversations.conversation import RESERVED_VARIABLES
from dft.data.preparing.options import PrepareOptions
from dft.data.templates.template import DATE
from dft.errors import UserError
from dft.strict_json import refuse_repeated_keys


def default_cache_dir() -> str:
    """The user's cache folder; the XDG specification wants variables that are empty or relative ignored."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return str((given if given.is_absolute() else Path("~/.cache")) / "dft")


@dataclass
class DataArguments:
    """Which conversations, and how they become training sequences."""

    _argument_group_name: ClassVar[str] = "data"

    data_files: list[str] = field(
        metadata={
            "help": "Conversations: .jsonl or .json files (also .gz, .zst), .parquet, folders of them, "
            "globs, or hub datasets as owner/name[:split]. Several are merged."
        }
    )
    eval_data_files: list[str] = field(
        default_factory=list, metadata={"help": "The same to evaluate on, in place of a validation split."}
    )
    data_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "How often each of --data_files is taken in one epoch, in their order; 0.5 takes half of "
            "its conversations, 2 takes all of them twice."
        },
    )
    dedup: bool = field(
        default=False, metadata={"help": "Drop conversations that are the same as an earlier one."}
    )
    on_bad_data: str = field(
        default="error",
        metadata={
            "help": "error: refuse to start. skip: leave out what cannot be used, copied to rejected.jsonl.",
            "choices": ["error", "skip"],
        },
    )
    validation_split_percentage: float = field(
        default=0.0, metadata={"help": "Percent of the conversations to hold out for evaluation, seeded."}
    )
    max_length: int = field(
        default=2048, metadata={"help": "Longest sequence in tokens; see --truncation for longer ones."}
    )
    truncation: str = field(
        default="right",
        metadata={
            "help": "What becomes of longer sequences: cut on the right or on the left, drop, or error.",
            "choices": ["right", "left", "drop", "error"],
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Fill rows of --max_length with several whole sequences that do not see one another."
        },
    )
    train_on_last_turn_only: bool = field(
        default=False, metadata={"help": "Supervise only the last of the assistant turns that would be."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many sequences, drawn with the data seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many sequences, drawn with the data seed."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file that replaces the tokenizer's chat template."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "JSON object of variables for the chat template, such as '{\"enable_thinking\": false}'. "
            "A row's own chat_template_kwargs win."
        },
    )
    chat_template_date: str = field(
        default=str(DATE),
        metadata={
            "help": "YYYY-MM-DD that templates which write today's date (strftime_now) get for it, on every "
            "day, so that the same data is the same tokens when a run is resumed."
        },
    )
    preprocessing_num_workers: int = field(
        default=min(os.cpu_count() or 1, 8), metadata={"help": "Processes that tokenize."}
    )
    data_cache_dir: str = field(
        default_factory=default_cache_dir,
        metadata={"help": "Where prepared data is kept, keyed by its content."},
    )
    prepare_only: bool = field(
        default=False,
        metadata={"help": "Prepare the data, write data_report.json into the output directory, and end."},
    )
    debug_data_processing: bool = field(
        default=False, metadata={"help": "Print the first sequences with their supervised parts marked."}
    )


MOST = {"max_length": 2**31 - 1, "preprocessing_num_workers": 1024}
SHOWN = 200
"""Characters of a value that a message quotes."""
MOST_EPOCHS = 10_000
"""Within one of the run, of one of the files: the rows of all are held as a list."""


def check_data_arguments(data: DataArguments) -> None:
    """Raises `UserError` for a number out of range, or flags that contradict one another."""
    positive = ("max_length", "preprocessing_num_workers", "max_train_samples", "max_eval_samples")
    for name in positive:
        value = vars(data)[name]
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be greater than 0")
    for name, most in MOST.items():
        if vars(data)[name] > most:
            raise UserError(f"--{name} {vars(data)[name]}: must be at most {most:,}")
    if data.max_length < 2:
        raise UserError(f"--max_length {data.max_length}: a target needs a token before it, so at least 2")
    if not 0 <= data.validation_split_percentage < 100:
        raise UserError(
            f"--validation_split_percentage {data.validation_split_percentage:g}: must be at least 0 and "
            "below 100"
        )
    shown = " ".join(f"{weight:g}" for weight in data.data_weights)
    if data.data_weights and len(data.data_weights) != len(data.data_files):
        raise UserError(
            f"--data_weights {shown}: {len(data.data_weights)} weights for {len(data.data_files)} of "
            "--data_files; give one for each, in their order"
        )
    if not all(weight > 0 and math.isfinite(weight) for weight in data.data_weights):
        raise UserError(f"--data_weights {shown}: each must be a number greater than 0")
    if any(weight > MOST_EPOCHS for weight in data.data_weights):
        raise UserError(f"--data_weights {shown}: each must be at most {MOST_EPOCHS:,}")
    template_variables(data)
    template_date(data)


def template_variables(data: DataArguments) -> dict[str, Any]:
    """What `--chat_template_kwargs` holds. Raises `UserError` if it is not a JSON object."""
    given = data.chat_template_kwargs
    if given is None:
        return {}
    told = f"--chat_template_kwargs {given if len(given) <= SHOWN else given[:SHOWN] + '...'}"
    try:
        variables = json.loads(
            given, object_pairs_hook=refuse_repeated_keys, parse_constant=_finite, parse_float=_finite
        )
    except ValueError as error:
        raise UserError(f"{told}: not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(
            f"--chat_template_kwargs {given[:80]}...: not valid JSON (nested too deeply)"
        ) from None
    if not isinstance(variables, dict):
        raise UserError(f"{told}: expected a JSON object such as '{{\"enable_thinking\": false}}'")
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise UserError(f"{told}: {name!r} is made from each row; remove it")
    return variables


def template_date(data: DataArguments) -> date:
    """What `--chat_template_date` holds. Raises `UserError` if it is no date."""
    try:
        return date.fromisoformat(data.chat_template_date)
    except ValueError:
        raise UserError(
            f"--chat_template_date {data.chat_template_date}: expected a date such as {DATE}"
        ) from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def prepare_options(data: DataArguments, seed: int) -> PrepareOptions:
    """What `dft.data.preparing.prepare.prepare` is to do; `seed` draws splits, samples and rows."""
    return PrepareOptions(
        max_length=data.max_length,
        validation_split_percentage=data.validation_split_percentage,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
        seed=seed,
        truncation=data.truncation,
        train_on_last_turn_only=data.train_on_last_turn_only,
        data_weights=tuple(data.data_weights),
        dedup=data.dedup,
        on_bad_data=data.on_bad_data,
        packing=data.packing,
    )
