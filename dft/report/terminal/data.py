"""What a person is told about the prepared data before training, and a look at the sequences themselves."""

import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dft.data.batches.dataset import Sequences
from dft.data.preparing.prepare import REJECTED
from dft.labels import IGNORE_INDEX

SUPERVISED, OTHER = ">> |", "   |"
FILES = 20
"""Files of a split that are listed; data_report.json has all."""
BAR = 40
"""Characters of the longest bar of a histogram."""
GREEN, PLAIN = "\033[32m", "\033[0m"


def data_summary(report: dict[str, Any], folder: str | None = None) -> list[str]:
    """A few lines on what was read, what is used and what was lost, from `PreparedData.report`.

    Args:
        folder: where the report was written, if it was.
    """
    lines = []
    for split in ("train", "eval"):
        if split in report:
            lines += _split_lines(split, report)
    return lines + _lost_lines(report, folder) + _ending_lines(report)


def data_details(report: dict[str, Any], folder: str | None = None) -> list[str]:
    """All of the report that a person reads, a page: `data_summary`, then how the conversations are made."""
    turns = report["turns_per_conversation"]
    roles = ", ".join(f"{role} {number:,}" for role, number in report["roles"].items())
    lines = [
        *data_summary(report, folder),
        f"turns       {roles}",
        f"            a conversation has {turns['50']:,} (median), {turns['99']:,} (99 %), at most "
        f"{turns['100']:,} of them",
    ]
    for split in ("train", "eval"):
        if split in report:
            lines += _length_lines(split, report[split])
    return lines


def _split_lines(split: str, report: dict[str, Any]) -> list[str]:
    numbers, limit = report[split], report["options"]["max_length"]
    levels = numbers["length_percentiles"]
    lines = [
        f"{split:<12}{_numbers(numbers)}; median {levels['50']:,}, 99 % up to {levels['99']:,}, "
        f"longest {levels['100']:,} tokens"
    ]
    if "packing_density" in numbers:
        rows, full = _count(numbers["rows"], "row"), 100 * numbers["packing_density"]
        lines.append(f"            in {rows} of {limit:,} tokens, {full:.1f} % full")
    if repeated := numbers["conversations"] - numbers["different_conversations"]:
        lines.append(f"            {repeated:,} of the conversations the same as another")
    files = numbers["files"]
    if len(files) > 1:
        for entry in files[:FILES]:
            weight = entry.get("weight", 1)
            times = "" if weight == 1 else f", taken {weight:g} times"
            lines.append(f"            {entry['file']}: {_numbers(entry)}{times}")
        if len(files) > FILES:
            lines.append(f"            ... and {len(files) - FILES:,} more files")
    return lines


def _lost_lines(report: dict[str, Any], folder: str | None) -> list[str]:
    lines = []
    limit = f"--max_length {report['options']['max_length']}"
    if count := report["rejected"]:
        reasons = ", ".join(f"{number:,} x {kind}" for kind, number in report["rejected_by_reason"].items())
        copied = "" if folder is None else f", copied to {Path(folder) / REJECTED}"
        lines.append(f"rejected    {_count(count, 'line')}{copied}: {reasons}")
    if count := report["truncated_conversations"]:
        lines.append(f"truncated   {_count(count, 'conversation')} cut at {limit}")
    if count := report["dropped_without_supervised_tokens"]:
        lines.append(f"dropped     {_count(count, 'conversation')} without a supervised token within {limit}")
    if count := report["dropped_for_their_length"]:
        lines.append(f"dropped     {_count(count, 'conversation')} with a sequence longer than {limit}")
    if count := report["lost_supervised_tokens"]:
        ends = _count(report["lost_end_tokens"], "turn")
        lines.append(f"lost        {_count(count, 'supervised token')} to that limit, and the end of {ends}")
    if count := report["repeated_conversations_dropped"]:
        lines.append(f"dropped     {_count(count, 'conversation')} the same as an earlier one")
    if count := report["eval_conversations_dropped_because_in_train"]:
        lines.append(f"left out    {_count(count, 'eval conversation')} that the training files hold too")
    if count := report["conversations_not_drawn"]:
        lines.append(f"left out    {_count(count, 'conversation')} by --data_weights or limits on samples")
    return lines


def _ending_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    if endings := report["end_of_turn_tokens"]:
        shown = ", ".join(f"{token} x {number:,}" for token, number in endings.items())
        lines.append(f"turns end   with {shown}")
    if count := report["turns_without_stop_token"]:
        lines.append(
            f"warning     {_count(count, 'turn')} without a stop token: the model does not learn to stop "
            "there; check the chat template and the tokenizer's eos token"
        )
    if count := report["unknown_tokens"]:
        lines.append(
            f"warning     {_count(count, 'token')} for text that the tokenizer's vocabulary does not have"
        )
    return lines


def _length_lines(split: str, numbers: dict[str, Any]) -> list[str]:
    """Percentiles, a histogram of bars, and the longest sequences."""
    levels = ", ".join(f"{level:,} ({at} %)" for at, level in numbers["length_percentiles"].items())
    lines = [f"lengths     of {split} sequences in tokens: {levels}"]
    edges, counts = numbers["length_histogram"]["edges"], numbers["length_histogram"]["counts"]
    most = max(counts)
    first = next(index for index, count in enumerate(counts) if count)
    for start, end, count in list(zip(edges, edges[1:], counts, strict=False))[first:]:
        bar = "#" * math.ceil(BAR * count / most)
        lines.append(f"            {start:>7,} to {end:>7,}  {bar:<{BAR}} {count:,}")
    lines += [
        f"{'longest' if number == 0 else '':<12}{entry['tokens']:,} tokens  {entry['file']}:{entry['line']}"
        for number, entry in enumerate(numbers["longest"])
    ]
    return lines


def _numbers(numbers: dict[str, Any]) -> str:
    """A conversation that is taken several times is one conversation, and its sequences count each time."""
    share = 100 * numbers["supervised_tokens"] / max(numbers["tokens"], 1)
    sequences = _count(numbers["sequences"], "sequence")
    if repeated := numbers["repeated_sequences"]:
        sequences += f" ({repeated:,} of them again, by --data_weights)"
    return (
        f"{_count(numbers['conversations'], 'conversation')}, {sequences}, "
        f"{_count(numbers['tokens'], 'token')}, {share:.1f} % supervised"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_sequences(
    dataset: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    which: Iterable[int] = (0, 1),
    *,
    color: bool = False,
) -> str:
    r"""Sequences as the model sees them, in lines that say whether they are supervised.

    A line ends where the text has a newline (shown as \n) or where supervision begins or ends.

    Args:
        dataset: not packed; `Sequences.unpacked` is.
        which: rows to show; those past the end are left out.
        color: supervised lines in green, for a terminal.
    """
    shown = []
    for row in which:
        if row >= len(dataset):
            continue
        ids, labels = dataset[row]["input_ids"], dataset[row]["labels"]
        supervised = int((labels != IGNORE_INDEX).sum())
        ((file, line),) = dataset.origins(row)
        counts = f"{len(ids):,} tokens, {supervised:,} supervised (marked >>)"
        shown.append(f"{dataset.files[file]}:{line}, sequence {row}: {counts}")
        pairs = zip(ids.tolist(), labels.tolist(), strict=True)
        for taught, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
            text = tokenizer.decode(
                [index for index, _ in group], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            shown += [_line(part, taught, color) for part in text.splitlines(keepends=True)]
    return "\n".join(shown)


def _line(text: str, taught: bool, color: bool) -> str:
    # Control characters would act on the terminal or tear the line apart.
    visible = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)
    line = f"{SUPERVISED if taught else OTHER} {visible}"
    return f"{GREEN}{line}{PLAIN}" if color and taught else line


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
