"""Compare the memory that `--plan True` estimates with the measured peak of the same run.

    python scripts/bench/bench_plan.py

On a CPU: a Qwen3 model with 8 layers, hidden size 1,024 and 123 million weights, and one with 8 experts of
size 512, of which a token passes 4. Measured is the peak memory of the largest process of the run, minus that
of the same run with a model of almost no weights. Freed memory is returned to the system at once
(MALLOC_TRIM_THRESHOLD_), so that the peak is memory in use.

On a GPU: a model with 24 layers, hidden size 896 and a vocabulary of 151,936 (494 million weights), in packed
rows of 2,048 tokens. Measured is the peak that torch had allocated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_scaling import launcher_of
from make_example import read_conversations, train_tokenizer, write_conversations

ENVIRONMENT = {
    **os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
if not torch.cuda.is_available():
    ENVIRONMENT["DS_ACCELERATOR"] = "cpu"
WAYS = {
    "float32": (1, {}),
    "32 rows": (1, {"per_device_train_batch_size": 32}),
    "32 rows, checkpointing": (1, {"per_device_train_batch_size": 32, "enable_gradient_checkpointing": True}),
    "accumulated": (1, {"gradient_accumulation_steps": 2}),
    "bfloat16 weights": (1, {"torch_dtype": "bfloat16"}),
    "bfloat16 weights, 32 rows": (1, {"torch_dtype": "bfloat16", "per_device_train_batch_size": 32}),
    "4 of 8 experts, 32 rows": (1, {"per_device_train_batch_size": 32}),
    "LoRA": (1, {"lora_r": 16}),
    "DDP x 2": (2, {}),
    "ZeRO-1 x 2": (2, {"deepspeed": ROOT / "ds_config/zero1.json"}),
    "ZeRO-2 x 2": (2, {"deepspeed": ROOT / "ds_config/zero2.json"}),
    "ZeRO-3 x 2": (2, {"deepspeed": ROOT / "ds_config/zero3.json"}),
}
ON_GPU = torch.cuda.is_available()
PACKED = {"packing": True, "max_length": 2048, "per_device_train_batch_size": 8}
HALF = {"torch_dtype": "bfloat16", **PACKED}
GPU_WAYS = {
    "bfloat16 weights": (1, HALF),
    "bfloat16 weights, checkpointing": (1, {**HALF, "enable_gradient_checkpointing": True}),
    "float32 weights, autocast": (1, {"bf16": True, **PACKED}),
    "LoRA on bfloat16": (1, {"lora_r": 16, **HALF}),
    "ZeRO-3 x 1": (1, {"deepspeed": ROOT / "ds_config/zero3.json", "bf16": True, **PACKED}),
}
GIB = {"GiB": 1.0, "MiB": 1 / 1024}


def run(folder: Path, ranks: int, flags: dict[str, object], **more: object) -> str:
    """Run train_dft.py for three steps and return its output."""
    settings = {
        "model_name_or_path": folder / "model", "data_files": folder / "data" / "train.jsonl",
        "output_dir": folder / "out", "overwrite_output_dir": True, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "report": False, "verify_save": False, "per_device_train_batch_size": 8,
        "use_cpu": not ON_GPU, "data_cache_dir": folder / "cache", **flags, **more,
    }  # fmt: skip
    launcher = launcher_of(ranks, "deepspeed" in flags)
    words = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    done = subprocess.run(
        [*launcher, str(ROOT / "train_dft.py"), *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def peak(folder: Path, ranks: int, flags: dict[str, object], model: str) -> float:
    """Return the peak memory of the largest process of a run, in GiB."""
    run(folder, ranks, flags, model_name_or_path=folder / model)
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return max(record["peak_memory_gib"] for record in history if "loss" in record)


def make_model(folder: Path, tokenizer: Any, **sizes: int) -> None:
    """Save a Qwen3 model with random weights, a mixture of experts if the sizes name experts."""
    config = (Qwen3MoeConfig if "num_experts" in sizes else Qwen3Config)(
        num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    all_ways = GPU_WAYS if ON_GPU else WAYS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=all_ways, default=list(all_ways), help="rows to measure")
    ways = {name: all_ways[name] for name in parser.parse_args().only}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, _ = write_conversations(folder / "data", 2000)
        tokenizer = train_tokenizer(read_conversations(train))
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "head_dim": 64}
        sizes["vocab_size"] = 32_000
        if ON_GPU:
            sizes |= {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
            sizes["vocab_size"] = 151_936
        # Runs in a separate process, because the peak of a child is at least the memory its parent held when
        # it forked.
        with get_context("spawn").Pool(1) as pool:
            pool.apply(make_model, (folder / "model", tokenizer), sizes)
            experts = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
            pool.apply(make_model, (folder / "experts", tokenizer), {**sizes, **experts})
        tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 4}
        make_model(folder / "tiny", tokenizer, vocab_size=len(tokenizer), **tiny)
        print("| | planned, GiB | measured, GiB | planned / measured |")
        print("|---|---|---|---|")
        for name, (ranks, flags) in ways.items():
            model = "experts" if "experts" in name else "model"
            output = run(folder, ranks, flags, plan=True, model_name_or_path=folder / model)
            value, unit = re.search(r"about ([\d.]+) (\w+) per device at the peak", output).groups()
            planned = float(value) * GIB[unit]
            measured = peak(folder, ranks, flags, model)
            if not ON_GPU:
                measured -= peak(folder, ranks, flags, "tiny")
            print(f"| {name} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
