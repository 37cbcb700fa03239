"""The contenders of bench_train.py: bare loops, this trainer and TRL's SFTTrainer.

Each takes (folder, vocabulary, packed) and returns tokens per second.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
MAX_LENGTH = 2048 if ON_GPU else 512
WARM_UP, STEPS = (5, 15) if ON_GPU else (3, 15)
BATCH = {"unpacked": 128, "packed": 16} if ON_GPU else {"unpacked": 8, "packed": 4}
"""Sequences or packed rows per step, with about the same number of tokens."""


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


def run_bare(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_loop(make_model(folder, vocabulary), folder, packed)


def run_flat(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_loop(without_padding(make_model(folder, vocabulary)), folder, packed)


def run_floor(folder: Path, vocabulary: int, packed: bool) -> float:
    model = without_padding(make_model(folder, vocabulary))
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    return run_loop(model, folder, packed)


def without_padding(model: Any) -> Any:
    """Let a model compute attention without padding, as `--attn_implementation auto` does."""
    from dft.training.attention.choice import varlen_obstacle

    assert (obstacle := varlen_obstacle(model, model.dtype, model.device)) is None, obstacle
    model.set_attn_implementation("varlen")
    return model


def run_loop(model: Any, folder: Path, packed: bool) -> float:
    import torch.nn.functional as F

    from dft.training.batching import NON_MODEL_KEYS, choose_collator

    model, dataset = model.train(), prepare_dataset(folder, packed)
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
        inputs = {name: value for name, value in batch.items() if name not in NON_MODEL_KEYS}
        hidden = model.model(**inputs).last_hidden_state
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


def run_ours(folder: Path, vocabulary: int, packed: bool, fused_head: str = "on", **more: Any) -> float:
    from transformers import TrainingArguments

    from dft import DFTTrainer

    model, dataset = without_padding(make_model(folder, vocabulary)), prepare_dataset(folder, packed)
    arguments = arguments_for(TrainingArguments, folder, packed, **more)
    clock = Clock()
    trainer = DFTTrainer(
        model, arguments, fused_head=fused_head, train_dataset=dataset, callbacks=[callback(clock)]
    )
    trainer._get_collator_with_removed_columns = lambda collator, description=None: clock.counting(collator)
    trainer.train()
    return clock.rate()


def run_compiled(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_ours(folder, vocabulary, packed, torch_compile=True)


def run_liger(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_ours(folder, vocabulary, packed, use_liger_kernel=True)


def run_off(folder: Path, vocabulary: int, packed: bool) -> float:
    return run_ours(folder, vocabulary, packed, "off")


def run_trl(folder: Path, vocabulary: int, packed: bool) -> float:
    from bench_data import TAGGED_CHATML
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = TAGGED_CHATML
    best = {}
    if ON_GPU and importlib.util.find_spec("liger_kernel"):
        best["use_liger_kernel"] = True
    if ON_GPU and importlib.util.find_spec("flash_attn"):
        best |= {"padding_free": True, "model_init_kwargs": {"attn_implementation": "flash_attention_2"}}
    arguments = arguments_for(
        SFTConfig, folder, packed, max_length=MAX_LENGTH, packing=packed, packing_strategy="bfd",
        assistant_only_loss=True, loss_type="dft", gradient_checkpointing=False, **best,
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
    "flat": run_flat,
    "floor": run_floor,
    "ours": run_ours,
    "compiled": run_compiled,
    "liger": run_liger,
    "off": run_off,
    "trl": run_trl,
}
