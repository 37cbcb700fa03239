"""YAML files of flags: `--config FILE.yaml` in, `run_args.yaml` out."""

import enum
import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from dft.errors import UserError
from dft.files import convert_write_errors, write_atomically

RUN_ARGS = "run_args.yaml"
OF_ONE_RUN = ("local_rank", "resume_from_checkpoint", "overwrite_output_dir")
"""Flags that a repetition of the run in another folder must not have."""
SECRETS = ("hub_token", "push_to_hub_token")
SCALARS = (str, int, float, date)


class FlagLoader(yaml.SafeLoader):
    """YAML without aliases, a few lines of which can stand for gigabytes, and without a key given twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor}: write out what it stands for", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made = super().construct_mapping(node, deep)
        if len(made) != len(node.value):
            names = Counter(str(self.construct_object(key)) for key, _ in node.value)
            raise yaml.constructor.ConstructorError(
                None, None, f"{names.most_common(1)[0][0]} is there twice", node.start_mark
            )
        return made


class FlagDumper(yaml.SafeDumper):
    """Writes what `FlagLoader` reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def expand_config(argv: list[str]) -> list[str]:
    """Replaces every `--config FILE.yaml` by the flags it holds.

    They go to the front, whatever the place of `--config`: flags on the command line are the later word. Of
    several files, a later one overrides an earlier one.
    """
    from_files: list[str] = []
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            from_files += config_flags(value if equals else next(rest, ""))
        else:
            words.append(word)
    return from_files + words


def config_flags(file: str) -> list[str]:
    """A YAML mapping of flag names to values, as command-line words; null and [] leave a flag at its default.

    Raises:
        UserError: no such file, no YAML, or no mapping.
    """
    if not Path(file).is_file():
        raise UserError(f"--config {file or '(nothing)'}: no such file")
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), FlagLoader)
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"--config {file}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # the last two of odd tags
        raise UserError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: expected a mapping such as 'learning_rate: 2.0e-6'")
    words: list[str] = []
    for name in ("config", "help"):
        if name in content:
            raise UserError(f"--config {file}: holds {name!r} itself; give --{name} on the command line")
    for name, value in content.items():
        if value is None or value == []:
            continue
        if isinstance(value, list):
            if not all(isinstance(one, SCALARS) for one in value):
                raise UserError(f"--config {file}: {name}: expected a value or a list of values")
            if any(str(one).startswith("--") for one in value):
                raise UserError(f"--config {file}: {name}: a value in a list must not begin with --")
            words += [f"--{name}", *map(str, value)]
        else:
            # One word, so that a value which begins with a dash is not taken for a flag.
            words.append(f"--{name}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    if any("\0" in word for word in words):
        raise UserError(f"--config {file}: holds a NUL character, which no flag can have")
    return words


def plain(value: Any) -> Any:
    """The value as YAML holds it: enumerations as the word they stand for."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value.value if isinstance(value, enum.Enum) else value


def write_run_args(
    folder: Path, given: dict[str, Any], defaults: dict[str, Any], own: set[str], derived: dict[str, Any]
) -> None:
    """Writes `run_args.yaml`, which `--config` replays.

    Args:
        folder: the output directory; made if it is missing.
        given: the flags as the command line and `--config` left them. Secrets are left out.
        defaults: of every flag; the ones at their default are left out, unless they are in `own`.
        own: flags that are always written.
        derived: what the run made of them; written as comments.
    """
    kept = {
        name: plain(value)
        for name, value in given.items()
        if value is not None
        and name not in (*SECRETS, *OF_ONE_RUN)
        and (name in own or value != defaults.get(name))
    }
    text = f"# Replay: train_dft.py --config {RUN_ARGS} --output_dir NEW\n" + yaml.dump(
        kept, Dumper=FlagDumper, sort_keys=True
    )
    comments = "".join(f"#   {name}: {value}\n" for name, value in derived.items())
    with convert_write_errors(folder, "--output_dir"):
        write_atomically(folder / RUN_ARGS, [text, "# What this run derived from them:\n", comments])
