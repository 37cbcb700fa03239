"""What a person is told about the prepared data before training, and a look at the sequences themselves."""

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dft.constants import IGNORE_INDEX

SUPERVISED, OTHER = ">> |", "   |"
GREEN, PLAIN = "\033[32m", "\033[0m"


def data_summary(report: dict[str, Any]) -> list[str]:
    """A few lines on what was read, what is used and what was lost, from `PreparedData.report`."""
    lines = []
    for split in ("train", "eval"):
        if split in report:
            lines += _split_lines(split, report[split])
    options = report["options"]
    limit = f"--max_length {options['max_length']}"
    if count := report["truncated_conversations"]:
        lines.append(
            f"truncated   {_count(count, 'conversation')} cut at {limit}; all cuts lost "
            f"{_count(report['truncated_supervised_tokens'], 'supervised token')}"
        )
    if count := report["dropped_without_supervised_tokens"]:
        lines.append(f"dropped     {_count(count, 'conversation')} without a supervised token within {limit}")
    if count := report["eval_conversations_dropped_because_in_train"]:
        lines.append(f"left out    {_count(count, 'eval conversation')} that the training files hold too")
    if endings := report["end_of_turn_tokens"]:
        shown = ", ".join(f"{token} x {number:,}" for token, number in endings.items())
        lines.append(f"turns end   with {shown}")
    if count := report["turns_without_stop_token"]:
        lines.append(
            f"warning     {_count(count, 'turn')} without a stop token: the model does not learn to stop "
            "there; check the chat template and the tokenizer's eos token"
        )
    return lines


def _split_lines(split: str, numbers: dict[str, Any]) -> list[str]:
    levels = numbers["length_percentiles"]
    lines = [
        f"{split:<12}{_numbers(numbers)}; median {levels['50']:,}, 99 % up to {levels['99']:,}, "
        f"longest {levels['100']:,} tokens"
    ]
    if repeated := numbers["conversations"] - numbers["different_conversations"]:
        lines.append(f"            {repeated:,} of them the same as another")
    if len(numbers["files"]) > 1:
        lines += [f"            {entry['file']}: {_numbers(entry)}" for entry in numbers["files"]]
    return lines


def _numbers(numbers: dict[str, Any]) -> str:
    share = 100 * numbers["supervised_tokens"] / max(numbers["tokens"], 1)
    return (
        f"{_count(numbers['conversations'], 'conversation')}, {_count(numbers['sequences'], 'sequence')}, "
        f"{_count(numbers['tokens'], 'token')}, {share:.1f} % supervised"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_sequences(
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    count: int = 2,
    *,
    color: bool = False,
) -> str:
    r"""The first sequences as the model sees them, in lines that say whether they are supervised.

    A line ends where the text has a newline (shown as \n) or where supervision begins or ends.

    Args:
        dataset: examples with `input_ids` and `labels`.
        color: supervised lines in green, for a terminal.
    """
    shown = []
    for number, example in enumerate(islice(dataset, count)):
        ids, labels = example["input_ids"], example["labels"]
        supervised = sum(label != IGNORE_INDEX for label in labels)
        shown.append(f"sequence {number}: {len(ids):,} tokens, {supervised:,} supervised (marked >>)")
        pairs = zip(ids, labels, strict=True)
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
