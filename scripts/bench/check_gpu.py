"""Checks of scripts/gpu_check.sh that need more than one command. Without a GPU they run with tiny sizes.

    python scripts/bench/check_gpu.py environment   # versions, devices, and what is installed
    python scripts/bench/check_gpu.py attention     # packed rows against single sequences: loss and gradient
    python scripts/bench/check_gpu.py precision     # bfloat16 and float16 autocast against float32
    python scripts/bench/check_gpu.py qlora         # train, save, verify and merge adapters of a 4-bit model
    python scripts/bench/check_gpu.py gsm8k --model DIR --train FILE --test FILE --folder DIR

gsm8k fine-tunes the model for three epochs with SFT and with DFT, and evaluates both and the untouched model
with four answers to each problem.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import is_flash_attn_2_available

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import dft.training.attention.interface  # registers varlen attention  # noqa: F401
from dft import dft_loss

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "deepspeed", "datasets", "peft", "flash_attn",
    "bitsandbytes", "liger_kernel", "trl", "vllm", "reasoning_gym", "gguf",
)  # fmt: skip
LENGTHS = (700, 37, 1, 512, 230) if ON_GPU else (40, 7, 1, 25)
"""Lengths of the sequences in the packed row."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference of the gradient of a packed row, relative to its norm."""
GSM8K_SIZES = (None, 400, 3, 300) if ON_GPU else (8, 2, 1, 8)
"""Conversations to train on (None: all), problems, epochs, and the limit of an answer in tokens."""


def environment() -> None:
    """Print versions, devices, and what is installed."""
    print(f"python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package:14} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:14} not installed")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        print(f"GPU {index}: {properties.name}, {memory:.0f} GiB, capability {capability}")
    print(f"CUDA {torch.version.cuda}")


def loss_and_gradient(
    model: PreTrainedModel, rows: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> tuple[float, Tensor]:
    """Return the DFT loss, summed over rows of (token ids, position ids, labels), and its gradient."""
    model.zero_grad()
    total = 0.0
    for ids, positions, labels in rows:
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits
        loss = dft_loss(logits, labels[None], num_items=1)[0]
        loss.backward()
        total += loss.item()
    gradients = [parameter.grad.flatten().float() for parameter in model.parameters()]
    return total, torch.cat(gradients)


def attention() -> None:
    """Compare loss and gradient of a packed row with those of its sequences alone.

    Raises:
        SystemExit: the gradients differ by more than rounding.
    """
    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 512, "num_hidden_layers": 4}
        if ON_GPU
        else {"hidden_size": 64, "num_hidden_layers": 2}
    )
    config = Qwen3Config(
        vocab_size=1000, intermediate_size=2 * sizes["hidden_size"], num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.05, **sizes,
    )  # fmt: skip
    weights = Qwen3ForCausalLM(config).state_dict()
    sequences = [torch.randint(1000, (length,), device=DEVICE) for length in LENGTHS]
    parts = [(ids, torch.arange(len(ids), device=DEVICE), ids) for ids in sequences]
    ids, positions, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    # The first token of a sequence has no prediction within it.
    labels = labels.masked_fill(positions == 0, -100)
    cases = [("eager", torch.float32), ("sdpa", torch.float32)]
    if ON_GPU:
        cases += [("sdpa", torch.bfloat16), ("varlen", torch.bfloat16)]
        if is_flash_attn_2_available():
            cases += [("flash_attention_2", torch.bfloat16)]
        else:
            print("flash_attention_2: flash-attn is not installed")
    else:
        cases += [("varlen", torch.float32)]
    different = False
    for implementation, dtype in cases:
        config._attn_implementation = implementation
        model = Qwen3ForCausalLM(config).to(DEVICE, dtype)
        model.load_state_dict(weights)
        alone, expected = loss_and_gradient(model, parts)
        packed, gradient = loss_and_gradient(model, [(ids, positions, labels)])
        error = ((gradient - expected).norm() / expected.norm()).item()
        different |= error > TOLERANCE[dtype]
        name = f"{implementation:18} {str(dtype).removeprefix('torch.'):9}"
        print(f"{name} loss {packed:.6f}, alone {alone:.6f}; gradient differs by {error:.1e}")
    if different:
        raise SystemExit("error: sequences of a packed row are not independent")


def train(folder: Path, output: Path, *flags: object) -> list[float]:
    """Run train_dft.py on the example data, and return the logged losses."""
    run(
        ROOT / "train_dft.py", "--model_name_or_path", folder / "model", "--output_dir", output,
        "--data_files", folder / "data/train.jsonl", "--max_steps", 6, "--logging_steps", 1,
        "--report_to", "none", "--report", False, "--learning_rate", 1e-3, "--save_strategy", "no",
        "--per_device_train_batch_size", 8, "--use_cpu", not ON_GPU, *flags,
    )  # fmt: skip
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in log if "loss" in record]


def run(script: Path, *words: object) -> str:
    """Run a script and return its output.

    Raises:
        SystemExit: it fails; the message contains the end of its output.
    """
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise SystemExit(
            f"{done.stdout[-4000:]}\nerror: {script.name} ended with exit code {done.returncode}"
        )
    return done.stdout


def precision() -> None:
    """Train a few steps under autocast, and compare the losses with those in float32.

    Raises:
        SystemExit: a loss differs by more than five percent.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(ROOT / "scripts/make_example.py", folder)
        kinds = {"float32": (), "bfloat16": ("--bf16", True)}
        if ON_GPU:
            kinds["float16"] = ("--fp16", True)
        losses = {kind: train(folder, folder / kind, *flags) for kind, flags in kinds.items()}
    different = False
    for kind, values in losses.items():
        pairs = zip(values, losses["float32"], strict=True)
        error = max(abs(value - exact) / exact for value, exact in pairs)
        different |= not error < 0.05
        shown = " ".join(f"{value:.4f}" for value in values)
        print(f"{kind:9} loss {shown}; differs by up to {100 * error:.2f} %")
    if different:
        raise SystemExit("error: autocast changes the loss by more than 5 %")


def qlora() -> None:
    """Train adapters of a model in 4 bits, which verifies what it saves, and merge them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(ROOT / "scripts/make_example.py", folder)
        flags = ("--lora_r", 8, "--load_in_4bit", True, "--bf16", True, "--torch_dtype", "bfloat16")
        losses = train(folder, folder / "adapter", *flags)
        print(f"losses {' '.join(f'{value:.4f}' for value in losses)}")
        run(ROOT / "scripts/merge_lora.py", folder / "adapter", folder / "merged")


def first_lines(source: Path, target: Path, count: int | None) -> Path:
    """Copy the first lines of a file, or all of them."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


def gsm8k(model: Path, train_file: Path, test_file: Path, folder: Path) -> None:
    """Fine-tune a model on GSM8K with SFT and with DFT, and compare what they answer."""
    rows, asked, epochs, limit = GSM8K_SIZES
    folder.mkdir(parents=True, exist_ok=True)
    data = first_lines(train_file, folder / "train.jsonl", rows)
    problems = first_lines(test_file, folder / "test.jsonl", asked)
    # The samples of an earlier call are of other weights of the same names, which evaluate.py refuses.
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    models = [f"base={model}"]
    evaluate(models, problems, folder / "evaluation", limit)
    for name, alpha in (("sft", 0), ("dft", 1)):
        run(
            ROOT / "train_dft.py", "--model_name_or_path", model, "--data_files", data,
            "--output_dir", folder / name, "--overwrite_output_dir", True, "--use_cpu", not ON_GPU,
            "--dft_alpha", alpha, "--end_of_turn_weight", 0.1 if alpha else 0, "--num_train_epochs", epochs,
            "--learning_rate", 3e-5, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.1, "--bf16", True,
            "--per_device_train_batch_size", 32 if ON_GPU else 4, "--max_length", 512,
            "--enable_gradient_checkpointing", False, "--save_strategy", "no", "--verify_save", False,
            "--report_to", "none", "--report", False, "--logging_steps", 20,
        )  # fmt: skip
        models.append(f"{name}={folder / name}")
        evaluate(models, problems, folder / "evaluation", limit)


def evaluate(models: Sequence[str], problems: Path, output: Path, limit: int) -> None:
    """Evaluate models with four answers to each problem, and print the table. Reuses earlier samples."""
    table = run(
        ROOT / "scripts/evaluate.py", "--model", *models, "--data", problems, "--output", output,
        "--samples", 4, "--max_new_tokens", limit, "--batch_size", 400, "--grader", "hash",
        "--dtype", "bfloat16",
    )  # fmt: skip
    print(table, flush=True)


def main() -> None:
    checks = {"environment": environment, "attention": attention, "precision": precision, "qlora": qlora}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=[*checks, "gsm8k"])
    for flag in ("--model", "--train", "--test", "--folder"):
        parser.add_argument(flag, type=Path, help="for gsm8k")
    arguments = parser.parse_args()
    if arguments.check == "gsm8k":
        if None in (arguments.model, arguments.train, arguments.test, arguments.folder):
            parser.error("gsm8k needs --model, --train, --test and --folder")
        gsm8k(arguments.model, arguments.train, arguments.test, arguments.folder)
    else:
        checks[arguments.check]()


if __name__ == "__main__":
    main()
