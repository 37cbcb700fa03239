"""The rules for the rows of each data file, from the flags --columns, --ignore_columns and --keep_rows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dft.data.conversations.column_meanings import MEANING_OF
from dft.data.conversations.forms import columns as form_columns
from dft.data.conversations.row_rules import RowRules
from dft.data.preparing.options import DataOptions
from dft.data.reading.data_file import DataFile
from dft.errors import UserError


@dataclass(frozen=True)
class ColumnFlag:
    """A parsed value of --columns, --ignore_columns or --keep_rows.

    Attributes:
        flag: the flag and the value, for error messages.
        file: file that it is for, or None for all files.
        column: column of the file.
        value: name that the column is read under, or accepted value; "" for --ignore_columns.
    """

    flag: str
    file: str | None
    column: str
    value: str = ""

    def applies_to(self, source: DataFile, values: list[str]) -> bool:
        """Return whether this value is for a file, named by itself or by its value of --data_files."""
        names = (source.name, Path(source.name).name, values[source.entry])
        return self.file is None or self.file in names


def column_flags(options: DataOptions) -> dict[str, list[ColumnFlag]]:
    """Return the values of --columns, --ignore_columns and --keep_rows, by the name of the flag.

    Raises:
        UserError: a value is malformed, gives two columns the same name, or a name that nothing reads.
    """
    flags = {
        "columns": [_split_pair("--columns", value, "NAME=COLUMN") for value in options.columns],
        "ignore_columns": [_split_name("--ignore_columns", value) for value in options.ignore_columns],
        "keep_rows": [_split_pair("--keep_rows", value, "COLUMN=VALUE") for value in options.keep_rows],
    }
    # --columns is written NAME=COLUMN, the other way round than --keep_rows.
    flags["columns"] = [replace(flag, column=flag.value, value=flag.column) for flag in flags["columns"]]
    counts = Counter(
        (flag.file, name) for flag in flags["columns"] for name in (f"{flag.value}=", flag.column)
    )
    for (_, name), count in counts.items():
        if count > 1:
            raise UserError(f"--columns {' '.join(options.columns)}: {name.rstrip('=')!r} appears twice")
    names = {*form_columns(), *MEANING_OF}
    for flag in flags["columns"]:
        if flag.value not in names:
            raise UserError(
                f"{flag.flag}: no row form reads {flag.value!r}; the names are {', '.join(form_columns())}"
            )
    return flags


def _split_pair(flag: str, text: str, form: str) -> ColumnFlag:
    left, separator, right = text.partition("=")
    file, _, name = left.rpartition(":")
    if not (separator and name and right):
        raise UserError(f"{flag} {text}: expected {form} or FILE:{form}")
    return ColumnFlag(f"{flag} {text}", file or None, name, right)


def _split_name(flag: str, text: str) -> ColumnFlag:
    file, _, name = text.rpartition(":")
    if not name:
        raise UserError(f"{flag} {text}: expected COLUMN or FILE:COLUMN")
    return ColumnFlag(f"{flag} {text}", file or None, name)


def assign_rules(
    sources: dict[str, list[DataFile]], values: dict[str, list[str]], options: DataOptions
) -> dict[str, list[DataFile]]:
    """Return the files with the rules for their rows.

    Args:
        sources: the "train" and the "eval" files.
        values: the values of --data_files and --eval_data_files, by the same names.
        options: the flags.

    Raises:
        UserError: a flag is malformed or names a file that is not among the data files.
    """
    flags = column_flags(options)
    everything = [(source, values[group]) for group, members in sources.items() for source in members]
    for flag in _all_flags(flags):
        if not any(flag.applies_to(source, names) for source, names in everything):
            raise UserError(f"{flag.flag}: there is no file {flag.file!r} among the data files")
    return {
        group: [
            replace(source, rules=_rules_for(source, values[group], flags, options, group == "eval"))
            for source in members
        ]
        for group, members in sources.items()
    }


def _rules_for(
    source: DataFile,
    values: list[str],
    flags: dict[str, list[ColumnFlag]],
    options: DataOptions,
    evaluation: bool,
) -> RowRules:
    """Return the rules of a file: those it has from its description, and those of the flags."""

    def of(name: str) -> list[ColumnFlag]:
        return [flag for flag in flags[name] if flag.applies_to(source, values)]

    accepted: dict[str, list[str]] = {}
    for flag in of("keep_rows"):
        accepted.setdefault(flag.column, []).append(flag.value)
    own = source.rules
    renamed = {flag.column: flag.value for flag in of("columns")}
    described = [
        (name, column)
        for name, column in own.columns
        if column not in renamed and name not in renamed.values()
    ]
    return replace(
        own,
        columns=(*described, *((name, column) for column, name in renamed.items())),
        ignored=tuple(flag.column for flag in of("ignore_columns")),
        kept=tuple((column, tuple(texts)) for column, texts in accepted.items()),
        use_chosen=options.use_chosen,
        evaluation=evaluation,
    )


def check_columns_used(
    sources: dict[str, list[DataFile]],
    values: dict[str, list[str]],
    options: DataOptions,
    named: dict[str, list[Counter[str]]],
) -> None:
    """Check that every column that a flag names is in a row of the files that the flag is for.

    Args:
        sources, values, options: see `assign_rules`.
        named: how many rows of each file have each column that its rules name.

    Raises:
        UserError: no row has such a column.
    """
    for flag in _all_flags(column_flags(options)):
        counts = [
            count[flag.column]
            for group, members in sources.items()
            for source, count in zip(members, named[group], strict=True)
            if flag.applies_to(source, values[group])
        ]
        if not any(counts):
            raise UserError(f"{flag.flag}: no row that is used has a column {flag.column!r}")


def _all_flags(flags: dict[str, list[ColumnFlag]]) -> Iterable[ColumnFlag]:
    return (flag for members in flags.values() for flag in members)
