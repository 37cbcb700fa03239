"""Cases with one invalid input each: how to create it and which message is expected."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

GOOD = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
LINE = json.dumps(GOOD).encode() + b"\n"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
EMBEDDING = "model.embed_tokens.weight"
TOKENIZER = "tokenizer.json", "tokenizer_config.json"
ASKED = ("user", "q")
NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Ground:
    """The folder of a case, with a valid model and a valid run that must not be changed.

    Attributes:
        run: an output directory with two checkpoints.
    """

    folder: Path
    model: Path
    run: Path | None = None

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self) -> Path:
        """Copy the valid model into the folder of the case, to be damaged."""
        return Path(shutil.copytree(self.model, self.folder / "model"))

    def copy_run(self) -> Path:
        """Copy the newest checkpoint of the valid run into the output directory, to be damaged."""
        return Path(shutil.copytree(self.run, self.folder / "out")) / "checkpoint-2"


Flags = dict[str, Any]
"""Flags that override those of the valid run; None removes a flag, a list gives several values."""


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: the id of its test.
    spoil: creates its files and returns its flags.
    message: a regular expression that the one message must match.
    more: words to append unchanged.
    """

    name: str
    spoil: Callable[[Ground], Flags]
    message: str
    more: tuple[str, ...] = ()


def flags(name: str, words: str, message: str) -> Case:
    return Case(name, lambda _: {}, message, tuple(words.split()))


def data(name: str, file: str, content: bytes | Callable[[], bytes], message: str) -> Case:
    def spoil(ground: Ground) -> Flags:
        return {"data_files": ground.file(file, content() if callable(content) else content)}

    return Case(name, spoil, message)


def template(name: str, source: str, message: str) -> Case:
    return Case(name, lambda ground: {"chat_template": ground.file("t.jinja", source)}, message)


def config(name: str, content: bytes | str, message: str) -> Case:
    return Case(name, lambda ground: {"config": ground.file("flags.yaml", content)}, message)


def deepspeed(name: str, content: Any, message: str, **more: object) -> Case:
    def spoil(ground: Ground) -> Flags:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        return {"deepspeed": ground.file("ds.json", text), **more}

    return Case(name, spoil, message)


def model(name: str, change: Callable[[Path], object], message: str, **more: object) -> Case:
    def spoil(ground: Ground) -> Flags:
        folder = ground.copy()
        change(folder)
        return {"model_name_or_path": folder, **more}

    return Case(name, spoil, message)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return a function that changes the weights of a model folder."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def settings(file: str, **values: object) -> Callable[[Path], object]:
    """Return a function that changes a JSON file of a model folder; None removes a key."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | values
        remaining = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(remaining))

    return spoil


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def filled(name: str, value: float, at: int = 1) -> Callable[[Path], object]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[at] = value

    return tensors(change)


def reshaped(name: str, *shape: int) -> Callable[[Path], object]:
    return tensors(lambda weights: weights.update({name: torch.zeros(*shape)}))


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def parquet(table: dict[str, list[object]], cut: int | None = None) -> Callable[[], bytes]:
    def serialize() -> bytes:
        stream = io.BytesIO()
        pq.write_table(pa.table(table), stream)
        return stream.getvalue()[:cut]

    return serialize


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def pickled(folder: Path) -> None:
    """Replace the weights by a pickle that runs code when it is loaded."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(folder.parent / "unpickled")))


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    bert = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()
    BertForMaskedLM(bert).save_pretrained(folder)


def chat(*turns: tuple[str, object]) -> bytes:
    rows = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": rows}).encode() + b"\n"


def long_line() -> bytes:
    return b'{"messages": "' + b"a" * 300_000_000 + b'"}\n'


def checkpoint(name: str, change: Callable[[Path], object], message: str, **more: object) -> Case:
    """Resume from a checkpoint that `change` has damaged."""

    def spoil(ground: Ground) -> Flags:
        folder = ground.copy_run()
        change(folder)
        return {"resume_from_checkpoint": folder, "max_steps": 3, **more}

    return Case(name, spoil, message)


def swapped(name: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Return a function that overwrites a file of a checkpoint with other content of the same length."""

    def spoil(folder: Path) -> None:
        before = (folder / name).read_bytes()
        after = content(before) if callable(content) else content
        (folder / name).write_bytes(after[: len(before)].ljust(len(before)))

    return spoil


def evil_optimizer(folder: Path) -> None:
    """Replace the optimizer by a pickle that runs code, with a matching manifest."""
    content = pickle.dumps(Malicious(folder.parent / "unpickled"))
    (folder / "optimizer.pt").write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    said(files={**files, "optimizer.pt": len(content)})(folder)


def said(**facts: object) -> Callable[[Path], object]:
    """Return a function that replaces the manifest of a checkpoint."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**content, **facts}))

    return spoil
