"""Write docs/flags.md and docs/transformers_flags.md from the dataclasses and tables of dft/arguments.

    python scripts/make_flags_page.py

tests/arguments/test_flags_page.py fails if the pages are not current.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers

from dft.arguments.inherited import TREATMENTS
from dft.arguments.parser import GROUPS, Parser
from dft.arguments.training import TrainingArguments
from dft.bounds import Bounds, declared_bounds

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
INHERITED_PAGE = PAGE.with_name("transformers_flags.md")
DEFAULTS_OF_THE_MACHINE = {
    "preprocessing_num_workers": "number of cores, at most 8",
    "data_cache_dir": "`~/.cache/dft`",
}
"""Defaults that depend on the machine or its environment, as text."""
HEAD = """# Flags of train_dft.py

<!-- Written by scripts/make_flags_page.py from the dataclasses in dft/arguments. Do not edit. -->

`--config A.yaml B.yaml` reads flags from files: those of later files take precedence over those of earlier
ones, and flags on the command line over all files. Switches take a value, as in `--packing True`.
`python train_dft.py --help` also lists the flags of transformers.
"""
TRAINING = """
All flags of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), such as
`--learning_rate` and `--num_train_epochs`, can be used as well. This table lists only those that have another
default or meaning here, or that transformers does not have. [transformers_flags.md](transformers_flags.md)
says of each flag of transformers what is done with it.
"""
INHERITED_HEAD = """# Flags of transformers

<!-- Written by scripts/make_flags_page.py from dft/arguments/inherited.py. Do not edit. -->

What this trainer does with every field of `transformers.TrainingArguments` of the pinned version.
`tests/arguments/test_inherited.py` fails if a field has no row. It tests every row that is refused or has no
effect, and of those passed on the ones that concern the steps on a CPU; the others were not run.

- *handled here*: it has another default, meaning or implementation, or its values are checked.
- *passed on*: transformers, accelerate, torch or a tracker implements it. It has no part in the loss.
- *refused*: another value than the default is one error.
- *no effect*: nothing in a run of train_dft.py uses it, which a note says if it is set.

| flag | what is done | how, or why |
|---|---|---|
"""
COLUMNS = """
| flag | values | default | meaning |
|---|---|---|---|
"""


def main() -> None:
    PAGE.write_text(flags_page(), encoding="utf-8")
    INHERITED_PAGE.write_text(inherited_page(), encoding="utf-8")
    print(PAGE, INHERITED_PAGE)


def inherited_page() -> str:
    """Return the text of docs/transformers_flags.md."""
    rows = "".join(
        f"| `--{name}` | {inherited.treatment.value} | {inherited.text or '–'} |\n"
        for name, inherited in TREATMENTS.items()
    )
    return INHERITED_HEAD + rows


def flags_page() -> str:
    """Return the text of docs/flags.md."""
    actions = {action.dest: action for action in reversed(Parser()._actions)}  # --flag before --no_flag
    sections = []
    for group in GROUPS:
        bounds = declared_bounds(group)
        rows = "".join(row(actions[name], bounds.get(name)) for name in listed_flags(group))
        intro = TRAINING if group is TrainingArguments else ""
        sections.append(f"\n## {group._argument_group_name}\n{intro}{COLUMNS}{rows}")
    return HEAD + "".join(sections)


def listed_flags(group: type) -> list[str]:
    """Return the names of the flags that the page lists: all but those inherited from transformers."""
    names = [field.name for field in fields(group)]
    if group is not TrainingArguments:
        return names
    inherited = {field.name: field for field in fields(transformers.TrainingArguments)}
    return [field.name for field in fields(group) if field is not inherited.get(field.name)]


def row(action: argparse.Action, bounds: Bounds | None) -> str:
    """Return the row of a flag in the table."""
    meaning = (action.help or "") % vars(action)
    for character in "|*<":  # would end the cell, or start emphasis or a tag
        meaning = meaning.replace(character, f"\\{character}")
    return f"| `--{action.dest}` | {values(action, bounds)} | {default(action)} | {meaning} |\n"


def values(action: argparse.Action, bounds: Bounds | None) -> str:
    """Return the choices, or the type and the valid range of a flag."""
    if action.choices:
        text = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        text = {"string_to_bool": "True or False", "str": "text", "int": "integer", "float": "number"}[
            action.type.__name__
        ]
    text = f"{text}, one or more" if action.nargs == "+" else text
    return f"{text}, {bounds}" if bounds else text


def default(action: argparse.Action) -> str:
    """Return the default of a flag."""
    if action.dest in DEFAULTS_OF_THE_MACHINE:
        return DEFAULTS_OF_THE_MACHINE[action.dest]
    if action.required:
        return "required"
    value: Any = action.default
    if value is None or value == []:
        return "–"
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


if __name__ == "__main__":
    main()
