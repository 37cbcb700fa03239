"""Read flags from YAML files (`--config`), and write the flags of a run to `run_args.yaml`."""

import difflib
import enum
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from dft.errors import UserError
from dft.files import convert_write_errors, write_atomically
from dft.program import program_name, shipped_folder

RUN_ARGS = "run_args.yaml"
RECIPES = shipped_folder("recipes")
"""Folder of the files that --config finds by name."""
RUN_SPECIFIC = ("local_rank", "resume_from_checkpoint", "overwrite_output_dir")
"""Flags that are not copied when a run is repeated in another folder."""
SECRETS = ("hub_token", "push_to_hub_token")
SCALARS = (str, int, float, date)
NOTHING: tuple[Any, ...] = (None, False, 0, -1, "", "no", [], ["none"])
"""Defaults that switch a flag off, so that null and [] in a file mean the same."""
SWITCHED_OFF = {
    "max_grad_norm": "max_grad_norm: 0",
    "save_strategy": "save_strategy: no",
    "save_steps": "save_strategy: no",
    "logging_strategy": "logging_strategy: no",
    "logging_steps": "logging_strategy: no",
}
"""Line of a config file that switches a flag off, for flags that False does not switch off."""


class FlagLoader(yaml.SafeLoader):
    """YAML loader that rejects repeated keys, and aliases, which can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not supported; repeat its value", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            names = Counter(str(self.construct_object(key)) for key, _ in node.value)
            raise yaml.constructor.ConstructorError(
                None, None, f"{names.most_common(1)[0][0]} appears twice", node.start_mark
            )
        return mapping


FlagLoader.add_implicit_resolver(
    # As in YAML 1.2. PyYAML follows 1.1, which reads a number without a dot or a sign, 1e-5, as text.
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)[eE][0-9]+"),
    list("-+.0123456789"),
)


class FlagDumper(yaml.SafeDumper):
    """YAML dumper that writes files `FlagLoader` can read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def expand_config(
    argv: list[str],
    choices: Mapping[str, Collection[Any]] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Replace every `--config FILE.yaml ...` with the flags in the files.

    The flags of files are inserted at the front, so that flags on the command line take precedence. Later
    files take precedence over earlier ones, whether one `--config` names them or several.

    Args:
        argv: the words of the command line.
        choices: the allowed values of flags that have only some, by name.
        defaults: the default of each flag, by name.
    """
    from_files: list[str] = []
    words: list[str] = []
    index = 0
    while index < len(argv):
        name, equals, value = argv[index].partition("=")
        index += 1
        if name != "--config":
            words.append(argv[index - 1])
            continue
        files = [value]
        if not equals:
            files = list(takewhile(lambda word: not word.startswith("-"), argv[index:]))
            index += len(files)
        for file in files or [""]:
            from_files += config_flags(file, choices or {}, defaults or {})
    return from_files + words


def config_flags(file: str, choices: Mapping[str, Collection[Any]], defaults: Mapping[str, Any]) -> list[str]:
    """Return the flags of a YAML file as command-line words.

    null and [] stand for a default that is itself nothing, such as none, 0 or False.
    Values are taken as they are written, so that a name like 010 is not read as a number. Only `yes`, `no`,
    `on` and `off` stand for True and False, unless the flag has a choice of that name.

    Args:
        file: path of the file, or name of a recipe.
        choices: see `expand_config`.
        defaults: see `expand_config`.

    Raises:
        UserError: there is no such file, it is not a YAML mapping of flags to values, or null would mean a
            default that is not nothing.
    """
    content, nodes = _read_yaml(file)
    words: list[str] = []
    for name, value in content.items():
        if value is None or value == []:
            if name not in defaults:
                words.append(f"--{name}=")  # reported as an unknown flag
            elif defaults[name] not in NOTHING:
                raise UserError(_null_message(file, name, nodes[name], defaults[name]))
            continue
        node, allowed = nodes[name], choices.get(str(name), ())
        if isinstance(value, list):
            if not all(isinstance(item, SCALARS) for item in value):
                raise UserError(f"--config {file}: {name}: expected a value or a list of values")
            texts = [_text(item, of, allowed) for item, of in zip(value, node.value, strict=True)]
            if any(text.startswith("--") for text in texts):
                raise UserError(f"--config {file}: {name}: a value in a list must not begin with --")
            words += [f"--{name}", *texts]
        else:
            text = json.dumps(value, default=str) if isinstance(value, dict) else _text(value, node, allowed)
            # A single word, so that a value that begins with a dash is not parsed as a flag.
            words.append(f"--{name}={text}")
    if any("\0" in word for word in words):
        raise UserError(f"--config {file}: contains a NUL character")
    return words


def find_config(file: str) -> Path:
    """Return the file that --config selects: a path, or the name of a shipped recipe.

    Args:
        file: the value of the flag. A file of this name has precedence over a recipe.

    Raises:
        UserError: there is neither.
    """
    path, recipe = Path(file).expanduser(), RECIPES / f"{file}.yaml"
    if path.is_file():
        return path
    names = recipe_names()
    if file in names:
        return recipe
    fault = f"--config {file or '(nothing)'}: no such file"
    if not file or path.suffix in (".yaml", ".yml"):
        raise UserError(fault)
    families = sorted({name.partition("/")[0] + "/" for name in names})
    similar = difflib.get_close_matches(file, names, n=3)
    hint = f"similar: {', '.join(similar)}" if similar else f"they begin with {', '.join(families)}"
    raise UserError(f"{fault}, and not the name of a recipe ({hint})")


def recipe_names() -> list[str]:
    """Return the names of the recipes that --config finds, such as qwen3/8b-lora-1x24gb."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))


def _null_message(file: str, name: str, node: yaml.Node, default: Any) -> str:
    written = "[]" if isinstance(node, yaml.SequenceNode) else node.value or "nothing"
    off = SWITCHED_OFF.get(name.replace("-", "_"), f"{name}: False" if default is True else None)
    remedy = f"; '{off}' switches it off" if off else ""
    return (
        f"--config {file}: {name}: {written} is not a value of this flag; leave it out for its default, "
        f"{plain(default)}, or give a value{remedy}"
    )


def _text(value: Any, node: yaml.Node, allowed: Collection[Any]) -> str:
    """Return a value as a word of the command line."""
    if isinstance(value, bool):
        word = str(node.value).lower()
        is_choice = not allowed or str(value) in {str(choice) for choice in allowed}
        return word if word in allowed or not is_choice else str(value)  # an error names what was written
    return str(node.value) if isinstance(value, SCALARS) else str(value)


def _read_yaml(file: str) -> tuple[dict[Any, Any], dict[Any, yaml.Node]]:
    """Return the content of a YAML file, and the node of each of its values."""
    path = find_config(file)
    try:
        loader = FlagLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
        if not isinstance(content, dict):
            raise UserError(f"--config {file}: expected a mapping such as 'learning_rate: 2.0e-6'")
        nodes = dict(zip(content, (value for _, value in root.value), strict=True))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"--config {file}: not valid YAML: nested too deeply") from None
    # Invalid tags raise LookupError and AttributeError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"--config {file}: not valid YAML: {' '.join(str(error).split())}") from None
    for name in ("config", "help"):
        if name in content:
            raise UserError(f"--config {file}: contains {name!r}; pass --{name} on the command line instead")
    return content, nodes


def plain(value: Any) -> Any:
    """Return a value as YAML can represent it, with enumerations replaced by their values."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def write_run_args(
    folder: Path, flags: dict[str, Any], defaults: dict[str, Any], own: set[str], derived: dict[str, Any]
) -> None:
    """Write the flags of a run to `run_args.yaml`, so that `--config` can repeat the run.

    Args:
        folder: the output folder; created if it does not exist.
        flags: the values of all flags. Secrets are not written.
        defaults: the defaults of all flags. Flags with their default value are written only if they are in
            `own`.
        own: names of the flags that are always written.
        derived: values that the run derived from the flags; written as comments.
    """
    written = {
        name: plain(value)
        for name, value in flags.items()
        if value is not None
        and name not in (*SECRETS, *RUN_SPECIFIC)
        and (name in own or value != defaults.get(name))
    }
    text = f"# To repeat the run: {program_name()} --config {RUN_ARGS} --output_dir NEW\n" + yaml.dump(
        written, Dumper=FlagDumper, sort_keys=True
    )
    comments = "".join(f"#   {name}: {value}\n" for name, value in derived.items())
    with convert_write_errors(folder, "--output_dir"):
        write_atomically(folder / RUN_ARGS, [text, "# Derived values:\n", comments])
