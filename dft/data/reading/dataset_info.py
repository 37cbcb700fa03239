"""Entries of `dataset_info.json`, in which LLaMA-Factory describes its datasets."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from dft.data.conversations.row_rules import RowRules, TurnNames
from dft.errors import UserError
from dft.strict_json import json_type_name

FILE_NAME = "dataset_info.json"
TEXT_KEYS = ("file_name", "file_sha1", "hf_hub_url", "subset", "split", "formatting")
READ_KEYS = (*TEXT_KEYS, "ranking", "columns", "tags")
OTHER_HUBS = ("ms_hub_url", "om_hub_url")
"""Keys that name the same dataset on another hub, which is not needed where there is `hf_hub_url`."""
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
SHAREGPT_COLUMNS = {"messages": "conversations"}
COMMON_COLUMNS = {
    **{name: name for name in ("system", "tools", "images", "videos", "audios", "chosen", "rejected")},
    "kto_tag": "label",
}
"""Name that a row form uses for a column, by its name in the description."""
TAGS = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation"} | {
    "function_tag": "function_call",
    "system_tag": "system",
}
"""ShareGPT's name of a role, by the name in the description under which a file's own name for it stands."""
KEY_TAGS = {"role_tag": {"alpaca": "from", "sharegpt": "from", "openai": "role"}} | {
    "content_tag": {"alpaca": "value", "sharegpt": "value", "openai": "content"}
}
"""Default of the key of the role and of the text, by the formatting."""


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset that an entry describes.

    Attributes:
        path: its file or folder; empty if it is on the hub.
        hub: its name, configuration and split on the hub, or None.
        rules: how its rows are read.
        sha1: SHA-1 digest that its file must have, or None.
    """

    path: str
    hub: tuple[str, str | None, str] | None
    rules: RowRules
    sha1: str | None = None

    def check_digest(self, label: str) -> None:
        """Raise `UserError` if the file is not the one that was described."""
        if self.sha1 is None:
            return
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha1").hexdigest()
        if digest != self.sha1.lower():
            raise UserError(
                f"{label}: {self.path} has the SHA-1 digest {digest}, but its entry says {self.sha1}; the "
                "file was changed or is incomplete. Fetch it again, or remove 'file_sha1' from the entry"
            )


def named_entry(value: str) -> tuple[str, str] | None:
    """Split `folder/dataset_info.json:name` into the file and the name; None if a value is something else."""
    path, separator, name = value.rpartition(":")
    is_entry = separator and os.path.basename(path) == FILE_NAME and os.path.isfile(path)
    return (path, name) if is_entry else None


def first_entry(path: str, label: str) -> str:
    """Return the value that names the first entry of a description. Raises `UserError` if it is invalid."""
    return f"{path}:{next(iter(_read_object(path, label)), 'NAME')}"


def dataset_entry(path: str, name: str, label: str) -> DatasetEntry:
    """Read one entry of a description.

    Raises:
        UserError: the file is invalid, has no such entry, or the entry cannot be used.
    """
    entries = _read_object(path, label)
    if name not in entries:
        raise UserError(f"{label}: there is no {name!r} in it; its entries are {', '.join(entries)}")
    entry = entries[name]
    if not isinstance(entry, dict):
        raise UserError(f"{label}: the entry must be an object, got {json_type_name(entry)}")
    unknown = [key for key in entry if key not in (*READ_KEYS, *OTHER_HUBS)]
    if unknown:
        raise UserError(
            f"{label}: {unknown[0]!r} of this entry is not supported; pass the file itself, with --columns "
            "for its columns"
        )
    entry = {key: value for key, value in entry.items() if value is not None}
    for key in TEXT_KEYS:
        if not isinstance(entry.get(key, ""), str):
            raise UserError(f"{label}: {key!r} must be a string, got {json_type_name(entry[key])}")
    rules = _rules_of(entry, label)
    if "hf_hub_url" in entry:
        return DatasetEntry(
            "", (entry["hf_hub_url"], entry.get("subset"), entry.get("split", "train")), rules
        )
    if "file_name" not in entry:
        raise UserError(
            f"{label}: the entry names neither a file (file_name) nor a dataset of the hub (hf_hub_url)"
        )
    file = os.path.join(os.path.dirname(path), entry["file_name"])
    return DatasetEntry(file, None, rules, entry.get("file_sha1"))


def _read_object(path: str, label: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{label}: is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{label}: must be a JSON object of entries, got {json_type_name(entries)}")
    return entries


def _rules_of(entry: dict[str, Any], label: str) -> RowRules:
    """Return the rules of an entry. Without `columns` and `tags`, rows are read as without a description."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{label}: formatting {formatting!r} must be alpaca, sharegpt or openai")
    names = COMMON_COLUMNS | (ALPACA_COLUMNS if formatting == "alpaca" else SHAREGPT_COLUMNS)
    columns = entry.get("columns", {})
    tags = entry.get("tags", {})
    for key, value, known in (("columns", columns, names), ("tags", tags, {**TAGS, **KEY_TAGS})):
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise UserError(f"{label}: {key!r} must be an object of strings")
        unknown = [name for name in value if name not in known]
        if unknown:
            raise UserError(
                f"{label}: {key!r} has {unknown[0]!r}; for {formatting} data it may have {', '.join(known)}"
            )
    if formatting == "alpaca" and tags:
        raise UserError(f"{label}: 'tags' are for turns, which alpaca data does not have; check 'formatting'")
    if entry.get("ranking") and columns and "chosen" not in columns:
        raise UserError(
            f"{label}: 'ranking' says that the rows are preference pairs, but 'columns' names no 'chosen'"
        )
    if formatting == "alpaca" and columns and not {"response", "chosen"} & columns.keys():
        raise UserError(
            f"{label}: describes text for pretraining (no response column), but this trainer fine-tunes on "
            "conversations"
        )
    if formatting != "alpaca" and columns and "messages" not in columns:
        columns = {"messages": "conversations", **columns}
    turns = None
    if formatting != "alpaca" and (tags or formatting == "openai"):
        role_key, text_key = (tags.get(key, defaults[formatting]) for key, defaults in KEY_TAGS.items())
        turns = TurnNames(
            role_key, text_key, tuple((tags[tag], role) for tag, role in TAGS.items() if tag in tags)
        )
    mapped = tuple((names[name], column) for name, column in columns.items())
    if turns is not None and not mapped:
        mapped = (("conversations", "messages" if formatting == "openai" else "conversations"),)
    return RowRules(columns=mapped, mapped_only=bool(columns), turns=turns)
