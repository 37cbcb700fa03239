"""Parse the command line into one dataclass per topic."""

import argparse
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from dft.arguments.accelerate_launch import launched_flags, launched_note
from dft.arguments.config_file import SECRETS, expand_config
from dft.arguments.data import DataArguments, resolve_best_metric, resolve_validation_split
from dft.arguments.deepspeed_file import find_deepspeed, zero_stage
from dft.arguments.lora import LoraArguments
from dft.arguments.model import ModelArguments
from dft.arguments.objective import DFTArguments, resolve_alpha
from dft.arguments.training import TrainingArguments
from dft.arguments.watch import WatchArguments
from dft.bounds import check_bounds
from dft.errors import UserError, set_error_reporter
from dft.program import program_name
from dft.ranks import launch_fault, port_fault
from dft.version import __version__

GROUPS = (ModelArguments, DataArguments, DFTArguments, LoraArguments, WatchArguments, TrainingArguments)
"""The dataclasses of flags, in the order of --help."""
PATHS = (
    "model_name_or_path", "chat_template", "output_dir", "data_cache_dir", "logging_dir", "deepspeed",
    "resume_from_checkpoint",
)  # fmt: skip
"""Flags that name a file or folder, apart from data files, which keep the names that the user wrote."""
SECRET_FLAGS = [f"--{flag}" for name in SECRETS for flag in (name, name.replace("_", "-"))]
DEVICE_DEFAULTS = {"deepspeed": None, "tf32": None, "fsdp": None, "bf16": False, "fp16": False}
"""Defaults of the flags that a machine without a GPU may reject and that do not affect the data."""


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run.

    Attributes:
        flags: the value of every flag before anything was derived from it.
        notes: messages for the user about derived values and flags without effect.
        new_tokens: tokens that the vocabulary of the saved model lacks, once the model is loaded.
    """

    model: ModelArguments
    data: DataArguments
    dft: DFTArguments
    lora: LoraArguments
    watch: WatchArguments
    training: TrainingArguments
    flags: dict[str, Any]
    notes: list[str]
    new_tokens: list[str] = field(default_factory=list)

    @property
    def data_seed(self) -> int:
        """Seed for all random choices in the data preparation."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed


def check_names(flags: dict[str, Any]) -> None:
    """Raise `UserError` if the name of a file or folder cannot be encoded, which libraries in Rust need.

    Such a name has bytes that are not characters in the encoding that Python uses for file names.
    """
    for name in PATHS:
        try:
            str(flags[name]).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"--{name} {flags[name]}: the name is not valid {sys.getfilesystemencoding()}, so the "
                "tokenizer could not be read or saved there; rename it, or set PYTHONUTF8=1 if the name is "
                "UTF-8"
            ) from None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append the default to the help text of each flag, unless it is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Parser for all flags. Raises errors as `UserError` and does not print the usage."""

    def __init__(self) -> None:
        super().__init__(GROUPS, allow_abbrev=False, prog=program_name(), formatter_class=HelpFormatter)
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS  # transformers adds a negated duplicate of some flags
        self.add_argument(
            "--config",
            metavar="FILE",
            nargs="+",
            help="Read flags from YAML files, or from recipes by name, such as qwen3/8b-lora-1x24gb. Later "
            "files take precedence over earlier ones, and flags on the command line over all files.",
        )
        self.add_argument(
            "--env",
            action="store_true",
            help="Print versions, devices and settings of this machine, without secrets, for a bug report.",
        )
        self.add_argument(
            "--version",
            action="version",
            version=f"%(prog)s {__version__}",
            help="Show the version and exit.",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists every flag)")

    def parse(self, argv: list[str]) -> Arguments:
        """Parse a command line.

        Raises:
            UserError: a flag is unknown, or a value cannot be parsed or is out of range.
        """
        check_no_secrets(argv)
        choices = {action.dest: action.choices for action in self._actions if action.choices is not None}
        defaults = {
            option.removeprefix("--"): action.default
            for action in self._actions
            for option in action.option_strings
        }
        namespace, unknown = self.parse_known_args(expand_config(argv, choices, defaults))
        if unknown:
            raise UserError(self._unknown_flag_message(unknown))
        flags = vars(namespace)
        del flags["config"], flags["env"]
        # Shells expand ~ only at the beginning of a word, so not in --flag=~/folder.
        flags.update({name: os.path.expanduser(flags[name]) for name in PATHS if flags[name] is not None})
        check_names(flags)
        check_variables(flags)
        # run_args.yaml has the name that the user wrote, which another installation finds as well.
        selected = {**flags, "deepspeed": find_deepspeed(flags["deepspeed"])}
        implied = launched_flags(selected)
        ignored = ignored_flags({**selected, **implied})
        try:
            model, data, dft, lora, watch, training = self.parse_dict(
                {**selected, **implied, **ignored}, allow_extra_keys=False
            )
        except UserError:
            raise
        except torch.distributed.DistNetworkError as error:
            raise UserError(port_fault(error)) from None
        except (ValueError, ImportError, OSError) as error:  # transformers raises it for invalid values
            raise UserError(" ".join(str(error).split())) from None
        for group in (
            model,
            data,
            dft,
            lora,
            watch,
        ):  # TrainingArguments checks its own bounds, before it derives values
            check_bounds(group)
        arguments = Arguments(model, data, dft, lora, watch, training, flags, [])
        arguments.notes.extend(apply_resolved_values(arguments, ignored))
        arguments.notes[:0] = [note for note in (repeated_flags_note(argv), launched_note(implied)) if note]
        return arguments

    def _unknown_flag_message(self, unknown: list[str]) -> str:
        flag = next((word for word in unknown if word.startswith("--")), unknown[0])
        name = flag.split("=")[0]
        similar = difflib.get_close_matches(name, self._option_string_actions, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else f" ({self.prog} --help lists every flag)"
        return f"unknown argument {name}{hint}"


def ignored_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the flags that a run without training ignores.

    --prepare_only ignores the flags of the device, which a machine without GPUs may reject. --preflight
    ignores --deepspeed with ZeRO-1 or 2: DeepSpeed evaluates with ZeRO-3 only, and other models fit without
    it.
    """
    ignored: dict[str, Any] = {}
    if flags["prepare_only"]:
        ignored.update(DEVICE_DEFAULTS)
    elif flags["preflight"] and flags["deepspeed"] and zero_stage(flags["deepspeed"]) != 3:
        ignored["deepspeed"] = None
    return {name: default for name, default in ignored.items() if flags[name] != default}


def apply_resolved_values(arguments: Arguments, ignored: dict[str, Any]) -> list[str]:
    """Set the values that depend on several flags and return a note for each.

    Args:
        ignored: flags that this kind of run ignores, see `ignored_flags`.
    """
    data, dft, training = arguments.data, arguments.dft, arguments.training
    notes = list(training.notes)
    kind = "--prepare_only" if data.prepare_only else "--preflight"
    if ignored:
        names = ", ".join(f"--{name} {arguments.flags[name] or ''}".strip() for name in ignored)
        reason = (
            "it only prepares the data"
            if data.prepare_only
            else "DeepSpeed evaluates with ZeRO-3 only, so the model is scored without it"
        )
        notes.append(f"{kind} True ignores {names}: {reason}")
    if arguments.model.enable_gradient_checkpointing:
        training.activation_checkpointing = training.gradient_checkpointing = True
    split = resolve_validation_split(data)
    if split != data.validation_split_percentage:
        notes.append(
            f"--validation_split_percentage {data.validation_split_percentage:g} has no effect: the run "
            "evaluates on --eval_data_files"
        )
        data.validation_split_percentage = split
    metric = resolve_best_metric(training.metric_for_best_model, data)
    if metric != training.metric_for_best_model:
        notes.append(
            f"--metric_for_best_model is {metric}, of the first evaluation set, as there are several"
        )
        training.metric_for_best_model = metric
    alpha = resolve_alpha(dft)
    if alpha != dft.dft_alpha:
        notes.append(f"--use_simple_dft False: alpha is {alpha:g}, plain SFT")
        dft.dft_alpha = alpha
    return notes


def check_no_secrets(argv: list[str]) -> None:
    """Raise `UserError` for a token on the command line, without printing it."""
    for word in argv:
        flag = word.partition("=")[0]
        if flag in SECRET_FLAGS:
            raise UserError(
                f"{flag}: every user of this machine can read a token on the command line, and launchers and "
                "trackers record it; set HF_TOKEN in the environment, or put the token into a --config file"
            )


def check_variables(flags: dict[str, Any]) -> None:
    """Raise `UserError` for a path that contains a variable of the shell, such as $HOME."""
    for name in (*PATHS, "data_files", "eval_data_files"):
        for path in flags[name] if isinstance(flags[name], list) else [flags[name]]:
            if not path or path.startswith("{") or os.path.exists(path):  # JSON, and names with a $
                continue
            if os.path.expandvars(path) != path:
                raise UserError(
                    f"--{name} {path}: contains a variable, which only the shell replaces, and not in single "
                    f"quotes or a --config file; write {os.path.expandvars(path)}"
                )


def repeated_flags_note(argv: list[str]) -> str | None:
    """Return a note about flags given twice with different values."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            name = "--" + flag[2:].replace("-", "_")  # --max-length is --max_length
            values.setdefault(name, []).append(value)
        elif name:
            values[name][-1] = f"{values[name][-1]} {word}".strip()
    repeated = [
        f"{name} {texts[-1]}".strip()
        for name, texts in values.items()
        if name != "--config" and len(set(texts)) > 1
    ]
    return f"given more than once, so the last one counts: {', '.join(repeated)}" if repeated else None


def default_flags() -> dict[str, Any]:
    """Return the default of every flag."""
    required = ["--model_name_or_path", "", "--data_files", ""]
    return vars(Parser().parse_known_args(required)[0])


def own_flags() -> set[str]:
    """Return the names of the flags that are not part of transformers."""
    return {
        field.name
        for group in GROUPS
        if group is not TrainingArguments
        for field in dataclasses.fields(group)
    }


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Parse this process's command line; `dft.arguments.conflicts` checks it for contradictions.

    Args:
        argv: another command line, for which the environment of this process is not checked.

    Raises:
        UserError: a flag is unknown, a value cannot be parsed or is out of range, or the environment is that
            of half a launcher.
    """
    fault = launch_fault() if argv is None else None
    if fault is not None:
        set_error_reporter(True)  # no other process reports it, whatever LOCAL_RANK says
        raise UserError(fault)
    return Parser().parse(sys.argv[1:] if argv is None else argv)
