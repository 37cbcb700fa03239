"""Command line -> six dataclasses."""

import argparse
import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dft.arguments.config_file import SECRETS, expand_config
from dft.arguments.data import DataArguments
from dft.arguments.deepspeed_file import zero_stage
from dft.arguments.lora import LoraArguments
from dft.arguments.model import ModelArguments
from dft.arguments.objective import DFTArguments
from dft.arguments.training import TrainingArguments
from dft.arguments.watch import WatchArguments
from dft.errors import UserError

SECRET_FLAGS = [f"--{one}" for name in SECRETS for one in (name, name.replace("_", "-"))]
OF_THE_DEVICE = {"deepspeed": None, "tf32": None, "fsdp": None, "bf16": False, "fp16": False}
"""Flags on which no data depends and which a machine without a GPU may refuse, as --prepare_only has them."""


@dataclass(frozen=True)
class Arguments:
    """All of a run's arguments.

    Attributes:
        given: what was asked for, before anything was derived from it.
        notes: what was derived, chosen or left without effect, one line each.
    """

    model: ModelArguments
    data: DataArguments
    dft: DFTArguments
    lora: LoraArguments
    watch: WatchArguments
    training: TrainingArguments
    given: dict[str, Any]
    notes: list[str]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind explanations, but no `None`, which says nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Flags of the six dataclasses; a mistake is a `UserError` instead of a page of usage."""

    def __init__(self) -> None:
        kinds = (
            ModelArguments,
            DataArguments,
            DFTArguments,
            LoraArguments,
            WatchArguments,
            TrainingArguments,
        )
        super().__init__(kinds, allow_abbrev=False, prog="train_dft.py", formatter_class=Help)
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS  # transformers' twin of a flag, under the other's explanation
        self.add_argument(
            "--config",
            metavar="FILE.yaml",
            help="Read flags from a file; flags on the command line override it.",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (train_dft.py --help lists every flag)")

    def parse(self, argv: list[str]) -> Arguments:
        """Raises `UserError` for an unknown flag or a value that cannot be read."""
        refuse_secrets(argv)
        words = expand_config(argv)
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(self._unknown(unknown))
        given = vars(namespace)
        del given["config"]
        wanted = dict(given)
        if given["prepare_only"]:
            wanted.update(OF_THE_DEVICE)
        if given["preflight"] and given["deepspeed"] and zero_stage(given["deepspeed"]) != 3:
            wanted["deepspeed"] = None  # which scores models with ZeRO-3 alone, and others need none to score
        try:
            model, data, dft, lora, watch, training = self.parse_dict(wanted, allow_extra_keys=False)
        except UserError:
            raise
        except (ValueError, ImportError, OSError) as error:  # how transformers refuses a value
            raise UserError(" ".join(str(error).split())) from None
        if model.enable_gradient_checkpointing:
            training.activation_checkpointing = training.gradient_checkpointing = True
        return Arguments(
            model, data, dft, lora, watch, training, given, [*given_again(argv), *training.notes]
        )

    def _unknown(self, unknown: list[str]) -> str:
        flag = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = flag.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else " (train_dft.py --help lists every flag)"
        return f"unknown argument {name}{hint}"


def refuse_secrets(argv: list[str]) -> None:
    """Raises `UserError` for a token on the command line, without repeating it."""
    for word in argv:
        if word.partition("=")[0] in SECRET_FLAGS:
            raise UserError(
                f"{word.partition('=')[0]}: a token on the command line is seen by everyone on this machine, "
                "and launchers and trackers record it; let it be HF_TOKEN in the environment, or stand in a "
                "--config file"
            )


def given_again(argv: list[str]) -> list[str]:
    """A note of the flags that the command line has twice, as scripts/train.sh gives those it is given."""
    found: dict[str, list[str]] = {}
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            values = found.setdefault(name, [])
            values.append(value if equals else "")
        elif found:
            values[-1] = f"{values[-1]} {word}".strip()
    twice = [
        f"{name} {values[-1]}".strip()
        for name, values in found.items()
        if name != "--config" and len(set(values)) > 1
    ]
    return [f"given more than once, so the last one counts: {', '.join(twice)}"] if twice else []


def default_flags() -> dict[str, Any]:
    """What every flag is when it is not given."""
    required = ["--model_name_or_path", "", "--data_files", ""]
    return vars(Parser().parse_known_args(required)[0])


def own_flags() -> set[str]:
    """Names of the flags that are not transformers' own."""
    kinds = (ModelArguments, DataArguments, DFTArguments, LoraArguments, WatchArguments)
    return {one.name for kind in kinds for one in dataclasses.fields(kind)}


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The arguments of this run, readable one by one; `dft.arguments.conflicts.check` looks at them together.

    Raises:
        UserError: an unknown flag or a value that cannot be read.
    """
    return Parser().parse(sys.argv[1:] if argv is None else argv)
