"""The folder of an evaluation: what it is of, and the samples that are kept in it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.errors import UserError
from dft.evaluation.problems import Problem
from dft.files import write_atomically

SETTINGS = "settings.json"
OF_MODEL = (
    "*.safetensors", "*config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json", "*.py",
)  # fmt: skip
"""Files of a model that its answers depend on; a folder may hold others, as of its training."""

Record = dict[str, Any]
"""Of a problem: its line, question, reference, whether that is nothing but an answer, the grader, and the
samples, each with text, right, tokens, stopped."""
OF_RECORD = {"line", "question", "reference", "has_answer", "grader", "samples"}
Note = dict[str, dict[str, Any]]
"""What `settings.json` says of a folder: settings; models by name, each with its path and fingerprint; data
by name, each with its path, digest and number of problems."""


@dataclass(frozen=True)
class Model:
    """A model to evaluate: its name in tables and the folder or hub name it is loaded from."""

    name: str
    path: str


def named_models(words: Sequence[str]) -> list[Model]:
    """`NAME=DIR`, or `DIR`, which is named after its last part. A folder that is there is never a NAME=DIR.

    Raises:
        UserError: two have one name.
    """
    models: list[Model] = []
    for word in words:
        folder = Path(word).expanduser()
        name, equals, path = word.partition("=")
        if folder.is_dir():  # its name may hold `=`
            name, path = folder.resolve().name, word
        elif not equals:
            path = word
        name = name.replace("/", "--")
        if not name or name in (".", "..") or not path:
            raise UserError(f"--model {word}: expected DIR or NAME=DIR")
        if name in (one.name for one in models):
            raise UserError(f"--model {word}: another model is named {name} too; give NAME={path}")
        models.append(Model(name, str(Path(path).expanduser()) if path.startswith("~") else path))
    return models


def claim(
    folder: Path,
    settings: dict[str, Any],
    models: Sequence[Model],
    problems: Mapping[Path, Sequence[Problem]],
) -> Note:
    """Notes in the output folder what it is of, together with what it held before.

    What was noted before and has no samples counts for nothing: a command that failed can be corrected.

    Raises:
        UserError: it holds samples of other settings, of another model of that name, or of another file.
    """
    stems = [file.stem for file in problems]
    for file in problems:
        if stems.count(file.stem) > 1:
            raise UserError(f"--data {file}: another file is named {file.stem} too; rename one of them")
    now: Note = {
        "settings": settings,
        "models": {one.name: [one.path, fingerprint(one.path)] for one in models},
        "data": {file.stem: [str(file), digest(file), len(some)] for file, some in problems.items()},
    }
    before = noted(folder)
    if before["models"]:
        for key, value in settings.items():
            if before["settings"].get(key, value) != value:
                raise UserError(
                    f"--output {folder}: holds samples with {key} {before['settings'][key]}, and this is "
                    f"{value}, which draws others; name another folder, or remove it"
                )
    for kind, flag in (("models", "model"), ("data", "data")):
        for name, (_, mark, *_) in now[kind].items():
            known = before[kind].get(name)
            if known and known[1] != mark:
                raise UserError(
                    f"--output {folder}: holds samples of another {flag} named {name} (what {known[0]} was "
                    "then); name another folder, or remove it"
                )
        now[kind] = {**before[kind], **now[kind]}
    write_atomically(folder / SETTINGS, [json.dumps(now, indent=1), "\n"])
    return now


def noted(folder: Path) -> Note:
    """What the folder was of, without the models and files that have no samples there."""
    note = folder / SETTINGS
    sampled = [file for file in folder.glob("*/*.jsonl") if file.stat().st_size]
    if not note.is_file() or not sampled:
        return {"settings": {}, "models": {}, "data": {}}
    models, files = {file.parent.name for file in sampled}, {file.stem for file in sampled}
    try:
        before = json.loads(note.read_text())
        return {
            "settings": {**before["settings"]},
            "models": {
                name: [path, mark] for name, (path, mark) in before["models"].items() if name in models
            },
            "data": {
                name: [path, mark, count]
                for name, (path, mark, count) in before["data"].items()
                if name in files
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--output {folder}: {SETTINGS} is damaged, or of another version; remove the folder or "
            "name another"
        ) from None


def whole_lines(file: Path) -> list[Record]:
    """The records up to the first line that a kill has torn, or that is no record."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not (isinstance(record, dict) and record.keys() >= OF_RECORD):
            break
        found.append(record)
    return found


def digest(file: Path) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def fingerprint(path: str) -> str:
    """What changes with a model in a folder, and with the one its adapters are for. Else the name.

    Of weights the names, sizes and times; of the other files what they hold.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    told: list[Any] = []
    for file in sorted({file for pattern in OF_MODEL for file in folder.glob(pattern)}):
        weights = file.suffix == ".safetensors"
        state = file.stat()
        told.append((file.name, (state.st_size, state.st_mtime_ns) if weights else digest(file)))
    if (base := base_of(folder)) is not None:
        told.append(fingerprint(base))
    return xxhash.xxh3_64_hexdigest(repr(told).encode())


def base_of(folder: Path) -> str | None:
    """The model that the adapters in a folder are for; None where it holds none."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # or what is no JSON, of which loading says so
    return found if isinstance(found, str) and Path(found).resolve() != folder.resolve() else None
