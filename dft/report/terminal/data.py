"""Text summaries of the prepared data, and a view of single sequences."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dft.console import MAX_COLUMNS, wrap
from dft.data.batches.dataset import Sequences
from dft.data.preparing.evaluation_sets import splits_of
from dft.data.preparing.prepare import REJECTED
from dft.labels import IGNORE_INDEX
from dft.report.terminal.base_scores import filter_lines

SUPERVISED, OTHER = ">> |", "   |"
MAX_LISTED_FILES = 20
"""Number of files of a split that are listed; data_report.json lists all."""
MAX_LISTED_COLUMNS = 8
"""Number of columns that are not read that are listed; data_report.json lists all."""
MAX_WARNING_LINES = 10
INDENT = 12
"""Width of the first column, in characters."""
MAX_LISTED_WEIGHTS = 5
"""Number of weights that are listed; data_report.json lists more."""
NOTABLE_MEAN = 5
"""Mean weight from which on, or below its inverse, a warning is printed."""
BAR = 40
"""Width of the longest bar of a histogram, in characters."""
GREEN, PLAIN = "\033[32m", "\033[0m"


def data_summary(report: Mapping[str, Any], folder: str | None = None) -> list[str]:
    """Return a few lines on the conversations that are used, truncated and dropped, and on filtered tokens.

    Args:
        report: `PreparedData.report`.
        folder: the folder the report was written to, or None if it was not written.
    """
    lines = []
    for split in splits_of(report):
        lines += _split_lines(split, report)
    lines += _unread_lines(report) + _lost_lines(report, folder) + _ending_lines(report)
    filtered = filter_lines(report["base_filter"], MAX_LISTED_FILES) if "base_filter" in report else []
    return lines + _mean_weight_lines(report) + filtered + _warning_lines(report)


def data_details(report: Mapping[str, Any], folder: str | None = None) -> list[str]:
    """Return about a page of lines: `data_summary`, then roles, turns and lengths of the conversations."""
    turns = report["turns_per_conversation"]
    roles = ", ".join(f"{role} {number:,}" for role, number in report["roles"].items())
    lines = [
        *data_summary(report, folder),
        f"turns       {roles}",
        f"            per conversation: median {turns['50']:,}, 99 % up to {turns['99']:,}, at most "
        f"{turns['100']:,}",
    ]
    for split in splits_of(report):
        lines += _length_lines(split, report[split])
    return lines


def _split_lines(split: str, report: Mapping[str, Any]) -> list[str]:
    numbers, limit = report[split], report["options"]["max_length"]
    levels = numbers["length_percentiles"]
    head = f"{split:<{INDENT}}"
    lines = [] if len(head) == INDENT and head[-1] == " " else [split]
    lines.append(
        f"{' ' * INDENT if lines else head}{_numbers(numbers)}; median {levels['50']:,}, 99 % up to "
        f"{levels['99']:,}, longest {levels['100']:,} tokens"
    )
    if "packing_density" in numbers:
        rows, full = _count(numbers["rows"], "row"), 100 * numbers["packing_density"]
        lines.append(f"            in {rows} of {limit:,} tokens, {full:.1f} % full")
    if weights := numbers.get("loss_weights"):
        lines.append(f"            {_weights(weights)}")
    if repeated := numbers["conversations"] - numbers["different_conversations"]:
        lines.append(f"            {repeated:,} of the conversations are duplicates")
    files = numbers["files"]
    if len(files) > 1:
        for entry in files[:MAX_LISTED_FILES]:
            weight = entry.get("weight", 1)
            times = "" if weight == 1 else f", taken {weight:g} times"
            lines.append(f"            {entry['file']}: {_numbers(entry)}{times}")
        if len(files) > MAX_LISTED_FILES:
            lines.append(f"            ... and {len(files) - MAX_LISTED_FILES:,} more files")
    return lines


def _warning_lines(report: Mapping[str, Any]) -> list[str]:
    """Return one or two lines for each warning about the data, at most `MAX_WARNING_LINES` in all.

    With more warnings than that, the examples are left to data_report.json.
    """
    warnings = report.get("warnings", [])  # absent from the reports of earlier versions
    heads = [
        f"check       {entry['text']}: {entry['conversations']:,} ({100 * entry['share']:.1f} %)"
        for entry in warnings
    ]
    lines = [
        line
        for head, entry in zip(heads, warnings, strict=True)
        for line in _with_examples(head, entry["examples"])
    ]
    return lines if len(lines) <= MAX_WARNING_LINES else heads[:MAX_WARNING_LINES]


def _with_examples(head: str, examples: list[str]) -> list[str]:
    """Return a line with the examples of a warning, or two if it would be wider than `MAX_COLUMNS`.

    Files whose paths are too long even then are shown by their names, and long names by their ends.
    """
    line = f"{head}, such as {' and '.join(examples)}"
    if len(line) <= MAX_COLUMNS:
        return [line]
    shown, room = f"such as {' and '.join(examples)}", MAX_COLUMNS - INDENT
    if len(shown) > room:
        width = (room - len("such as  and ")) // 2
        names = [_shorten_start(Path(example).name, width) for example in examples]
        shown = f"such as {' and '.join(names)}"
    return [head, " " * INDENT + shown]


def _shorten_start(text: str, width: int) -> str:
    return text if len(text) <= width else f"...{text[3 - width :]}"


def _weights(weights: Mapping[str, Any]) -> str:
    """Describe how many supervised tokens have which weight, the most common weights first."""
    tokens = sorted(weights["tokens"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{count:,} of {weight}" for weight, count in tokens[:MAX_LISTED_WEIGHTS])
    more = weights["different"] - min(len(tokens), MAX_LISTED_WEIGHTS)
    others = f" and {more:,} other weights" if more > 0 else ""
    return f"supervised tokens by weight: {shown}{others}; mean weight {weights['mean']:.3g}"


def _mean_weight_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a line on weights that change the size of the gradient much."""
    mean = report.get("train", {}).get("loss_weights", {"mean": 1.0})["mean"]
    if 1 / NOTABLE_MEAN < mean < NOTABLE_MEAN:
        return []
    return wrap(
        "warning",
        f"the mean weight of the supervised tokens is {mean:.3g}: loss and gradient are about that many "
        "times as large as without weights, which changes what --max_grad_norm does; divide the weights by "
        "their mean",
    )


def _unread_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a line on the columns that are not read."""
    columns = report.get("unread_columns", {})  # absent from the reports of earlier versions
    if not columns:
        return []
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(columns.items())[:MAX_LISTED_COLUMNS])
    more = len(columns) - MAX_LISTED_COLUMNS
    others = f" and {more:,} more, see data_report.json" if more > 0 else ""
    return [f"not read    {_count(len(columns), 'column')}: {shown}{others}"]


def _lost_lines(report: Mapping[str, Any], folder: str | None) -> list[str]:
    """Return lines on rejected, truncated, dropped and unused conversations."""
    lines = []
    if count := report["rejected"]:
        reasons = ", ".join(f"{number:,} x {kind}" for kind, number in report["rejected_by_reason"].items())
        copied = "" if folder is None else f", copied to {Path(folder) / REJECTED}"
        lines.append(f"rejected    {_count(count, 'line')}{copied}: {reasons}")
    for condition, count in report.get("rows_left_out", {}).items():
        lines.append(f"left out    {_count(count, 'row')} by {condition}")
    lines += _length_limit_lines(report)
    if count := report["repeated_conversations_dropped"]:
        lines.append(f"dropped     {_count(count, 'conversation')} as duplicates of earlier ones (--dedup)")
    if count := report["eval_conversations_dropped_because_in_train"]:
        lines.append(f"dropped     {_count(count, 'eval conversation')} also found in the training files")
    if count := report["conversations_not_drawn"]:
        lines.append(f"not drawn   {_count(count, 'conversation')}, by --data_weights or the sample limits")
    return lines


def _length_limit_lines(report: Mapping[str, Any]) -> list[str]:
    """Return lines on truncation losses, with token counts in parentheses or, if shared, below."""
    limit = f"--max_length {report['options']['max_length']}"
    lines = []
    if count := report["truncated_conversations"]:
        lines.append(f"truncated   {_count(count, 'conversation')} at {limit}")
    if count := report["dropped_without_supervised_tokens"]:
        lines.append(f"dropped     {_count(count, 'conversation')} without supervised tokens within {limit}")
    if count := report["dropped_for_their_length"]:
        lines.append(f"dropped     {_count(count, 'conversation')} longer than {limit}")
    if count := report["lost_supervised_tokens"]:
        end_tokens = _count(report["lost_end_tokens"], "end-of-turn token")
        lost = f"{_count(count, 'supervised token')} and {end_tokens} lost"
        if len(lines) == 1:
            lines[0] += f" ({lost})"
        else:
            lines.append(f"            together {lost}")
    return lines


def _ending_lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if endings := report["end_of_turn_tokens"]:
        shown = ", ".join(f"{token} x {number:,}" for token, number in endings.items())
        lines.append(f"turns end   with {shown}")
    if count := report["turns_without_stop_token"]:
        lines.append(
            f"warning     {_count(count, 'turn')} without a stop token, so the model does not learn to stop "
            "there; check the chat template and the eos token of the tokenizer"
        )
    for entry in report.get("remarks", []):  # absent from the reports of earlier versions
        lines.append(
            f"note        {_count(entry['sequences'], 'sequence')}: {entry['remark']}; for example "
            f"{entry['example']}"
        )
    if count := report["unknown_tokens"]:
        lines.append(
            f"warning     {_count(count, 'unknown token')} for text outside the tokenizer's vocabulary"
        )
    return lines


def _length_lines(split: str, numbers: Mapping[str, Any]) -> list[str]:
    """Return lines with the length percentiles, a histogram and the longest sequences."""
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


def _numbers(numbers: Mapping[str, Any]) -> str:
    """Describe counts. A repeated conversation counts once, but its sequences count every time."""
    share = 100 * numbers["supervised_tokens"] / max(numbers["tokens"], 1)
    sequences = _count(numbers["sequences"], "sequence")
    if repeated := numbers["repeated_sequences"]:
        sequences += f" ({repeated:,} of them repeated by --data_weights)"
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
    r"""Return sequences as decoded text, in blocks: prompt, completion, prompt continued, and so on.

    Completions are what is supervised; their lines are marked. A line ends where the text has a newline
    (shown as \n) or where a block ends. Special tokens are shown.

    Args:
        dataset: an unpacked dataset; see `Sequences.unpacked`.
        tokenizer: decodes the tokens.
        which: rows to show; rows past the end are skipped.
        color: whether to print supervised lines in green.
    """
    shown: list[str] = []
    for row in which:
        if row < len(dataset):
            shown += _sequence_lines(dataset, tokenizer, row, color)
    return "\n".join(shown)


def _sequence_lines(
    dataset: Sequences, tokenizer: PreTrainedTokenizerBase, row: int, color: bool
) -> Iterator[str]:
    sequence = dataset[row]
    ids, labels = sequence["input_ids"], sequence["labels"]
    weights = sequence.get("loss_weights", np.ones(len(ids)))
    supervised = int((labels != IGNORE_INDEX).sum())
    ((file, line),) = dataset.origins(row)
    part = dataset.part(row)
    yield (
        f"{dataset.files[file]}:{line}, sequence {part.number} of {part.total} of this conversation: "
        f"{len(ids):,} tokens, {supervised:,} supervised (marked >>)"
    )
    if part.reason:
        yield f"starts a new sequence because {part.reason}"
    completions = 0
    blocks = _blocks(ids, labels, weights)
    for number, (is_supervised, weight, tokens) in enumerate(blocks, 1):
        completions += is_supervised
        if is_supervised:
            yield f"completion {completions}" + (f", weight {weight:g}" if weight != 1 else "")
        elif completions == 0:
            yield "prompt"
        else:
            yield "prompt, continued" if number < len(blocks) else "after the last completion"
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for text_line in text.splitlines(keepends=True):
            yield _line(text_line, is_supervised, color)


def _blocks(ids: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> list[tuple[bool, float, list[int]]]:
    """Return the tokens of a sequence in blocks: whether they are supervised, their weight, and their ids."""
    keys = [(label != IGNORE_INDEX, weight) for label, weight in zip(labels, weights, strict=True)]
    keys = [(is_supervised, weight if is_supervised else 1.0) for is_supervised, weight in keys]
    pairs = zip(keys, ids.tolist(), strict=True)
    return [(*key, [token for _, token in group]) for key, group in groupby(pairs, key=lambda pair: pair[0])]


def _line(text: str, is_supervised: bool, color: bool) -> str:
    # Control characters would move the cursor or break the line.
    visible = "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)
    line = f"{SUPERVISED if is_supervised else OTHER} {visible}"
    return f"{GREEN}{line}{PLAIN}" if color and is_supervised else line


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
