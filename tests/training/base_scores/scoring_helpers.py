"""Score data with `--base_scores` in this process."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.arguments.parser import Arguments, parse_arguments
from dft.data.batches.dataset import Sequences
from dft.data.preparing.prepare import PreparedData
from dft.fine_tune import prepare_data
from dft.training.base_scores.run import add_base_scores
from dft.training.model.loading import load_model
from dft.training.run import load_encoder

WORDS = ("two", "four", "a fox", "lazy dog", "10 100", "the answer is this")


def write_rows(path: Path, count: int = 24) -> Path:
    """Write conversations of different lengths, some with two turns, some with weights."""
    rows = []
    for number in range(count):
        messages = []
        for turn in range(1 + number % 2):
            messages.append({"role": "user", "content": f"What is {number} and {turn}?"})
            answer = {"role": "assistant", "content": " ".join(WORDS[: 1 + (number + turn) % 6])}
            messages.append({**answer, "weight": number % 3} if number % 4 == 1 and turn == 0 else answer)
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments_of(model: Path, data: Path, folder: Path, *more: str) -> Arguments:
    words = ["--model_name_or_path", str(model), "--data_files", str(data), "--use_cpu", "True"]
    words += ["--output_dir", str(folder / "out"), "--data_cache_dir", str(folder / "cache")]
    words += ["--preprocessing_num_workers", "1", "--max_length", "256", "--base_scores", "True"]
    return parse_arguments([*words, "--per_device_eval_batch_size", "2", *more])


def score(model: Path, data: Path, folder: Path, *more: str) -> PreparedData:
    """Return prepared data with base scores."""
    arguments = arguments_of(model, data, folder, *more)
    tokenizer, encoder = load_encoder(arguments)
    prepared = prepare_data(arguments, encoder)
    return add_base_scores(arguments, load_model(arguments, tokenizer), tokenizer, prepared)


def expected_scores(model: Path, dataset: Sequences) -> list[tuple[float, float]]:
    """Return (score, log-probability in the float32 logits of the model) of every supervised token."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pairs = []
    for row in dataset:
        start = 0
        for length in row.get("seq_lengths", [len(row["labels"])]):
            ids, labels, scores, weights = (
                row[name][start : start + length] if name in row else [1.0] * length
                for name in ("input_ids", "labels", "base_logp", "loss_weights")
            )
            with torch.no_grad():
                logp = net(input_ids=torch.tensor(ids[None].astype("int64"))).logits[0].log_softmax(-1)
            for place in range(1, length):
                if labels[place] != -100 and weights[place]:
                    pairs.append((float(scores[place]), logp[place - 1, labels[place]].item()))
            start += length
    return pairs


def end_id(model: Path) -> int:
    return AutoTokenizer.from_pretrained(model).eos_token_id
