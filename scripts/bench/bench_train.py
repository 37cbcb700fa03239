"""Measure training throughput end to end: this trainer, TRL's SFTTrainer with its DFT loss, and a bare loop.

    python scripts/bench/bench_train.py --corpus GSM8K/train.chatml.jsonl
    python scripts/bench/bench_train.py --corpus GSM8K/train.chatml.jsonl --vocabularies 4096 --rounds 5

On a CPU: a Qwen3 model with 4 layers and hidden size 256 in float32, with a small and a large vocabulary, and
sequences of up to 512 tokens. On a GPU: one with 24 layers and hidden size 896 (0.5 billion weights) in
bfloat16, with the large vocabulary and larger batches of up to 2,048 tokens per row; its peak memory is
measured as well. Assistant tokens are supervised; AdamW, gradients clipped at norm 1, one micro-batch per
step.

bare: a loop in plain PyTorch on batches built in advance: logits of the supervised rows, one cross-entropy,
      no metrics, no logging. A trainer can hardly be faster.
ours: `DFTTrainer`, logging every step.
off:  the same with --fused_head off.
trl:  `SFTTrainer` with `loss_type="dft"` and assistant_only_loss (pip install trl).

Each runs unpacked (batches padded on the right) and packed (full rows). Each measurement runs in a separate
process, the contenders take turns, and the first steps of each are not measured. Padding does not count as
tokens.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

ON_GPU = torch.cuda.is_available()
CONVERSATIONS = 7000 if ON_GPU else 600
MAX_LENGTH = 2048 if ON_GPU else 512
WARM_UP, STEPS = (5, 15) if ON_GPU else (2, 8)
BATCH = {"unpacked": 128, "packed": 16} if ON_GPU else {"unpacked": 8, "packed": 4}
"""Sequences or packed rows per step, with about the same number of tokens."""
VOCABULARIES = (4096, 151_936)


class Clock:
    """Records the time at which each step ends, and the tokens of each batch in the order of collation."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def counting(self, collator: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collator that also records the tokens of its batches."""

        def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
            self.tokens.append(sum(len(example["input_ids"]) for example in examples))
            return collator(examples)

        return collate

    def rate(self) -> float:
        """Return the tokens per second of the measured steps."""
        seconds = self.ends[-1] - self.ends[WARM_UP - 1]
        return sum(self.tokens[WARM_UP : len(self.ends)]) / seconds


def make_model(folder: Path, vocabulary: int) -> Any:
    """Create the model with random weights, always the same."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    if ON_GPU:
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        sizes["num_attention_heads"] = 14
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, head_dim=64, num_key_value_heads=2, max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=ON_GPU, use_cache=False, pad_token_id=0, **sizes,
        )
    )  # fmt: skip
    return model.to("cuda", torch.bfloat16) if ON_GPU else model


def arguments_for(kind: type, folder: Path, packed: bool, **more: Any) -> Any:
    """Create the training arguments that ours and TRL share."""
    return kind(
        output_dir=str(folder / "out"), use_cpu=not ON_GPU,
        per_device_train_batch_size=BATCH[batch_name(packed)], max_steps=WARM_UP + STEPS, learning_rate=1e-4,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, **more,
    )  # fmt: skip


def batch_name(packed: bool) -> str:
    return "packed" if packed else "unpacked"


def callback(clock: Clock) -> Any:
    """Create a callback that records the end of each step in `clock`."""
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.ends.append(time.perf_counter())

    return StepEnds()


def prepare_dataset(folder: Path, packed: bool) -> Any:
    """Prepare the training data of the folder."""
    from transformers import AutoTokenizer

    from dft.data.preparing.options import PrepareOptions
    from dft.data.preparing.prepare import prepare
    from dft.data.templates.encoder import ChatEncoder

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    options = PrepareOptions(MAX_LENGTH, packing=packed)
    data = prepare([str(folder / "data.jsonl")], [], encoder, options, cache_dir=folder / "cache", workers=1)
    return data.datasets["train"]


# Contenders take (folder, vocabulary, packed) and return tokens per second.


def run_bare(folder: Path, vocabulary: int, packed: bool) -> float:
    import torch.nn.functional as F

    from dft.training.batching import choose_collator

    model, dataset = make_model(folder, vocabulary).train(), prepare_dataset(folder, packed)
    clock, collator = Clock(), choose_collator(model, 0, packed)
    order, size = torch.randperm(len(dataset)).tolist(), BATCH[batch_name(packed)]
    collate = clock.counting(collator)
    batches = [
        collate([dataset[row] for row in order[size * step : size * (step + 1)]])
        for step in range(WARM_UP + STEPS)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for batch in batches:
        batch = {
            name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()
        }
        inputs = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        hidden = model.model(input_ids=batch["input_ids"], **inputs).last_hidden_state
        following = batch["labels"][:, 1:]
        keep = following != -100
        nll = F.cross_entropy(model.lm_head(hidden[:, :-1][keep]), following[keep], reduction="none")
        (nll.detach().neg().exp() * nll).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ON_GPU:
            torch.cuda.synchronize()
        clock.ends.append(time.perf_counter())
    return clock.rate()


def run_ours(folder: Path, vocabulary: int, packed: bool, fused_head: str = "on") -> float:
    from transformers import TrainingArguments

    from dft import DFTTrainer

    model, dataset = make_model(folder, vocabulary), prepare_dataset(folder, packed)
    arguments = arguments_for(TrainingArguments, folder, packed)
    clock = Clock()
    trainer = DFTTrainer(
        model, arguments, fused_head=fused_head, train_dataset=dataset, callbacks=[callback(clock)]
    )
    trainer._get_collator_with_removed_columns = lambda collator, description=None: clock.counting(collator)
    trainer.train()
    return clock.rate()


def run_off(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_ours(folder, vocabulary, packed, "off")


def run_trl(folder: Path, vocabulary: int, packed: bool) -> float:
    from bench_data import TAGGED_CHATML
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = TAGGED_CHATML
    arguments = arguments_for(
        SFTConfig, folder, packed, max_length=MAX_LENGTH, packing=packed, assistant_only_loss=True,
        loss_type="dft", gradient_checkpointing=False,
    )  # fmt: skip
    dataset = load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
    clock = Clock()
    trainer = SFTTrainer(
        make_model(folder, vocabulary), arguments, train_dataset=dataset, processing_class=tokenizer,
        callbacks=[callback(clock)],
    )  # fmt: skip
    trainer.data_collator = clock.counting(trainer.data_collator)
    trainer.train()
    return clock.rate()


CONTENDERS: dict[str, Callable[[Path, int, bool], float]] = {
    "bare": run_bare,
    "ours": run_ours,
    "off": run_off,
    "trl": run_trl,
}


def measure_in_subprocess(name: str, folder: Path, vocabulary: int, packed: bool) -> tuple[float, float]:
    """Return the (tokens per second, peak GPU memory in GiB) of a contender, measured in a new process."""
    words = ["--measure", name, "--folder", str(folder), "--vocabularies", str(vocabulary)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [sys.executable, __file__, *words, *(["--packed"] if packed else [])],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    rate, peak = map(float, done.stdout.splitlines()[-1].split())
    return rate, peak


def compare(folder: Path, vocabulary: int, packed: bool, names: list[str], rounds: int) -> None:
    """Measure the contenders in turns and print their rows of the table."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, float] = {}
    for number in range(rounds):
        for name in names:
            rate, peaks[name] = measure_in_subprocess(name, folder, vocabulary, packed)
            rates[name].append(rate)
            print(f"round {number + 1}: {name} {rate:,.0f}", file=sys.stderr, flush=True)
    for name, runs in rates.items():
        ratios = [rate / bare for rate, bare in zip(runs, rates["bare"], strict=True)]
        memory = f" {peaks[name]:.1f} |" if ON_GPU else ""
        print(
            f"| {vocabulary:,} | {batch_name(packed)} | {name} | {statistics.median(runs):,.0f} "
            f"| {statistics.median(ratios):.2f} |{memory}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="ChatML .jsonl; its first conversations are used")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES[ON_GPU:])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each contender")
    parser.add_argument("--batches", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        (vocabulary,) = arguments.vocabularies
        rate = CONTENDERS[arguments.measure](arguments.folder, vocabulary, arguments.packed)
        print(rate, torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0)
        return
    if arguments.corpus is None:
        parser.error("--corpus is required")

    from make_example import read_conversations, train_tokenizer

    names = ["bare", *(name for name in arguments.contenders if name != "bare")]
    if "trl" in names and importlib.util.find_spec("trl") is None:
        print("trl cannot be imported and is skipped", file=sys.stderr)
        names.remove("trl")
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        folder = Path(name)
        train_tokenizer(read_conversations(arguments.corpus), VOCABULARIES[0]).save_pretrained(
            folder / "tokenizer"
        )
        with open(arguments.corpus, "rb") as lines, open(folder / "data.jsonl", "wb") as stream:
            stream.writelines(islice(lines, CONVERSATIONS))
        more = (" peak GiB |", "---|") if ON_GPU else ("", "")
        print(f"| vocabulary | | | tokens per second, median | to the bare loop, median of rounds |{more[0]}")
        print(f"|---|---|---|---|---|{more[1]}")
        for vocabulary in arguments.vocabularies:
            for batches in arguments.batches:
                compare(folder, vocabulary, batches == "packed", names, arguments.rounds)


if __name__ == "__main__":
    main()
