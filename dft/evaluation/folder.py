"""The output folder of an evaluation: its settings, and the saved samples."""

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
MODEL_FILES = (
    "*.safetensors", "*config.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "additional_chat_templates/*.jinja", "chat_template.json", "*.py",
)  # fmt: skip
"""Model files that affect the answers. The folder may hold other files, such as the training state."""

SampleRecord = dict[str, Any]
"""A line of a file of samples: a problem with its graded samples; see `RECORD_KEYS`.

`line` and `question` name the problem. `reference` is the text that its answers are graded against, and
`has_answer` tells whether that is only the answer. `samples` is a list of objects with `text`, `right`,
`tokens` and `stopped`.
"""
RECORD_KEYS = {"line", "question", "reference", "has_answer", "grader", "samples"}
Manifest = dict[str, dict[str, Any]]
"""The content of `settings.json`: "settings"; by name, the path and fingerprint of each of the "models", and
the path, digest and number of problems of each file of "data"."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        name: its name in tables and in the output folder.
        path: the folder or hub name to load it from.
    """

    name: str
    path: str


def parse_models(words: Sequence[str]) -> list[EvaluatedModel]:
    """Parse the values of --model: `NAME=DIR`, or `DIR`, which is named after its last component.

    A value that is an existing folder is always a `DIR`, because its name may hold `=`.

    Raises:
        UserError: a value is malformed, or two models have the same name.
    """
    models: list[EvaluatedModel] = []
    for word in words:
        folder = Path(word).expanduser()
        name, equals, path = word.partition("=")
        if folder.is_dir():
            name, path = folder.resolve().name, word
        elif not equals:
            path = word
        name = name.replace("/", "--")
        if not name or name in (".", "..") or not path:
            raise UserError(f"--model {word}: expected DIR or NAME=DIR")
        if name in (model.name for model in models):
            raise UserError(f"--model {word}: another model is named {name} too; use NAME={path}")
        models.append(EvaluatedModel(name, str(Path(path).expanduser()) if path.startswith("~") else path))
    return models


def update_manifest(
    folder: Path,
    settings: dict[str, Any],
    models: Sequence[EvaluatedModel],
    problems: Mapping[Path, Sequence[Problem]],
) -> Manifest:
    """Check that the samples in the output folder belong to this evaluation, and record its settings there.

    Models and data files without samples in the folder are not checked, so that a failed command can be
    corrected.

    Args:
        settings: all settings other than models and data that affect the samples.
        problems: the problems of each data file.

    Returns:
        The new manifest, which includes models and data files of earlier calls.

    Raises:
        UserError: two data files have the same name, or the folder holds samples that were made with other
            settings, a different model of the same name or a different data file of the same name.
    """
    stems = [file.stem for file in problems]
    for file in problems:
        if stems.count(file.stem) > 1:
            raise UserError(f"--data {file}: another file is named {file.stem} too; rename one of them")
    manifest: Manifest = {
        "settings": settings,
        "models": {model.name: [model.path, model_fingerprint(model.path)] for model in models},
        "data": {file.stem: [str(file), file_digest(file), len(rows)] for file, rows in problems.items()},
    }
    before = read_manifest(folder)
    if before["models"]:
        for key, value in settings.items():
            if before["settings"].get(key, value) != value:
                raise UserError(
                    f"--output {folder}: holds samples with {key} {before['settings'][key]}, and this call "
                    f"has {value}, which gives other samples; name another folder, or remove this one"
                )
    for section, noun in (("models", "model"), ("data", "data file")):
        for name, (_, digest, *_) in manifest[section].items():
            earlier = before[section].get(name)
            if earlier and earlier[1] != digest:
                raise UserError(
                    f"--output {folder}: holds samples of another {noun} named {name} ({earlier[0]} has "
                    "changed or is another one); name another folder, or remove this one"
                )
        manifest[section] = {**before[section], **manifest[section]}
    write_atomically(folder / SETTINGS, [json.dumps(manifest, indent=1), "\n"])
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder, without the models and data files that have no samples there.

    Raises:
        UserError: it is damaged.
    """
    file = folder / SETTINGS
    sample_files = [path for path in folder.glob("*/*.jsonl") if path.stat().st_size]
    if not file.is_file() or not sample_files:
        return {"settings": {}, "models": {}, "data": {}}
    names, stems = {path.parent.name for path in sample_files}, {path.stem for path in sample_files}
    try:
        manifest = json.loads(file.read_text())
        return {
            "settings": {**manifest["settings"]},
            "models": {
                name: [path, digest] for name, (path, digest) in manifest["models"].items() if name in names
            },
            "data": {
                name: [path, digest, count]
                for name, (path, digest, count) in manifest["data"].items()
                if name in stems
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--output {folder}: {SETTINGS} is damaged, or of another version; remove the folder or "
            "name another"
        ) from None


def read_records(file: Path) -> list[SampleRecord]:
    """Return the records of a file, up to the first truncated or invalid line."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not (isinstance(record, dict) and record.keys() >= RECORD_KEYS):
            break
        records.append(record)
    return records


def file_digest(file: Path) -> str:
    """Return a digest of the content of a file. Raises `UserError` if it cannot be read."""
    try:
        return xxhash.xxh3_64_hexdigest(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def model_fingerprint(path: str) -> str:
    """Return a digest that changes when a model in a folder changes, or the base model of its adapters.

    It covers names, sizes and times of weight files, and the content of the other files. The fingerprint of a
    model that is not a folder is its name.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    parts: list[Any] = []
    for file in sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)}):
        is_weights = file.suffix == ".safetensors"
        state = file.stat()
        parts.append((file.name, (state.st_size, state.st_mtime_ns) if is_weights else file_digest(file)))
    if (base := base_model_of(folder)) is not None:
        parts.append(model_fingerprint(base))
    return xxhash.xxh3_64_hexdigest(repr(parts).encode())


def base_model_of(folder: Path) -> str | None:
    """Return the base model of the adapters in a folder, or None if it holds no adapters."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the model reports a damaged file
    return base if isinstance(base, str) and Path(base).resolve() != folder.resolve() else None
