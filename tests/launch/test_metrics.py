"""Metrics of command-line runs against float64, and non-finite steps, on one and two ranks."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.metrics import BINS
from tests.launching import ROOT, eval_records, train_records
from tests.training.measuring.test_meter import tokens_of

ALPHA = 0.6


def prepared_tokens(arrow, model, end: int) -> list[dict]:
    """Return every supervised token of a prepared file with the index of its data file."""
    rows = list(datasets.Dataset.from_file(str(arrow)))
    return [{**token, "file": rows[token["row"]]["source"]} for token in tokens_of(model, rows, end)]


def means(tokens) -> dict[str, float]:
    nll, p = (np.array([token[name] for token in tokens]) for name in ("nll", "p"))
    weight = ALPHA * p + 1 - ALPHA
    return {
        "loss": (weight * nll).mean(),
        "nll": nll.mean(),
        "avg_p_correct": p.mean(),
        "acc": np.mean([token["correct"] for token in tokens]),
        "objective": (ALPHA * (1 - p) + (1 - ALPHA) * nll).mean(),
        "entropy": np.mean([token["entropy"] for token in tokens]),
        "effective_tokens": weight.mean(),
        "p_end_of_turn": np.mean([token["p"] for token in tokens if token["end"]]),
    }


@pytest.fixture(scope="module")
def evaluation_files(example):
    rows = example.eval.read_text().splitlines()
    files = [example.folder / "data" / name for name in ("first.jsonl", "second.jsonl")]
    for file, some in zip(files, (rows[:9], rows[9:]), strict=True):
        file.write_text("\n".join(some) + "\n")
    return files


@pytest.mark.parametrize(("batch", "accumulated"), [pytest.param(8, 1, marks=pytest.mark.slow), (4, 4)])
def test_epoch_metrics_are_means_over_tokens(example, forks, evaluation_files, batch, accumulated):
    """With learning rate 0 the model is constant, so the metrics of an epoch are means over its data."""
    output = example.folder / f"metrics-{accumulated}"
    words = example.words(
        output, data_files=[example.train, example.other], dft_alpha=ALPHA, learning_rate=0,
        num_train_epochs=1, logging_strategy="epoch", eval_strategy="epoch", log_per_file=True,
        eval_data_files=evaluation_files, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated, use_cpu=True,
    )  # fmt: skip
    codes, printed = forks.run(words, ranks=2)
    assert codes == [0, 0], printed
    report = json.loads((output / "data_report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(example.model)
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=torch.float64)
    (record,), evaluation = train_records(output), eval_records(output)[-1]
    prepared = ROOT / report["prepared_path"]
    tokens = prepared_tokens(prepared / "train.arrow", model, tokenizer.eos_token_id)
    assert record["supervised_tokens"] == len(tokens)
    for name, value in means(tokens).items():
        assert record[name] == pytest.approx(value, rel=2e-5), name
    held_out = prepared_tokens(prepared / "eval.arrow", model, tokenizer.eos_token_id)
    for name, value in means(held_out).items():
        assert evaluation[f"eval_{name}"] == pytest.approx(value, rel=2e-5), name
    counts, _ = np.histogram([token["p"] for token in held_out], bins=BINS, range=(0, 1))
    assert evaluation["eval_p_histogram"] == counts.tolist()
    for number, name in enumerate(["first.jsonl", "second.jsonl"]):
        of_file = means([token for token in held_out if token["file"] == number])
        for metric in ("nll", "avg_p_correct"):
            assert evaluation[f"eval_{name}/{metric}"] == pytest.approx(of_file[metric], rel=2e-5)
    assert record["padding_share"] == 0 and record["peak_memory_gib"] > 0.1


def test_an_evaluation_of_fewer_rows_than_ranks_counts_each_token_once(example, forks):
    """The rank without a row takes part, and adds nothing to the means."""
    evaluation, output = example.folder / "one.jsonl", example.folder / "one-row"
    evaluation.write_text(example.eval.read_text().splitlines()[0] + "\n")
    words = example.words(
        output, dft_alpha=ALPHA, learning_rate=0, max_steps=1, eval_strategy="steps", eval_steps=1,
        eval_data_files=evaluation, use_cpu=True,
    )  # fmt: skip
    codes, printed = forks.run(words, ranks=2)
    assert codes == [0, 0], printed
    report = json.loads((output / "data_report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(example.model)
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=torch.float64)
    prepared = forks.folder / report["prepared_path"]
    tokens = prepared_tokens(prepared / "eval.arrow", model, tokenizer.eos_token_id)
    (record,) = eval_records(output)
    for name, value in means(tokens).items():
        assert record[f"eval_{name}"] == pytest.approx(value, rel=2e-5), name
    assert sum(record["eval_p_histogram"]) == len(tokens)


POISONING = """
import math

import deepspeed

import dft.training.run
import train_dft

load = dft.training.run.load_model


def load_poisoned(arguments, tokenizer):
    # Models with non-finite weights are refused, so the weight is changed after loading.
    model = load(arguments, tokenizer)
    weight = model.get_input_embeddings().weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.data[tokenizer.convert_tokens_to_ids("xyzzy")] = math.nan
    return model


dft.training.run.load_model = load_poisoned
train_dft.main()
"""


@pytest.fixture(scope="module")
def poisoned(example):
    """A model in which `POISONING` sets the embedding of a word of one conversation to NaN."""
    folder = example.folder / "poisoned"
    model = AutoModelForCausalLM.from_pretrained(example.model, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(example.model)
    tokenizer.add_tokens(["xyzzy"])
    model.resize_token_embeddings(len(tokenizer))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    script = folder / "poisoning.py"
    script.write_text(POISONING)
    rows = example.train.read_text().splitlines()[:24]
    rows[19] = json.dumps(
        {"messages": [{"role": "user", "content": "xyzzy?"}, {"role": "assistant", "content": "no"}]}
    )
    data = folder / "data.jsonl"
    data.write_text("\n".join(rows) + "\n")
    return folder, data, script


def words_of(example, poisoned, output, **flags):
    model, data, _ = poisoned
    return example.words(
        output, model_name_or_path=model, data_files=data, eval_data_files=None, max_steps=6,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, train_sampling_strategy="sequential",
        **flags,
    )  # fmt: skip


def test_zero3_stops_before_the_update_and_keeps_the_last_checkpoint(example, forks, poisoned):
    """Two ranks take two conversations each per step, so line 20 is in step 5 on the second rank."""
    output = example.folder / "nonfinite-stop"
    words = words_of(
        example,
        poisoned,
        output,
        deepspeed=ROOT / "ds_config/zero3.json",
        save_strategy="steps",
        save_steps=2,
        report=True,
        verify_save=False,  # verification would find the NaN
    )
    codes, printed = forks.run(words, 2, poisoned[2])
    assert all(codes), printed
    (line,) = [line for line in printed.splitlines() if "error: step" in line]
    assert "step 5: the loss of " in line and "on rank 1 is not finite" in line and "rank 0" not in line
    assert f"{poisoned[1]}:20" in line and "checkpoint-4" in line and "--on_nonfinite skip" in line
    assert not (output / "model.safetensors").exists() and (output / "checkpoint-4").is_dir()
    report = json.loads((output / "report.json").read_text())
    assert report["status"].startswith("stopped: step 5") and len(report["log"]) == 4
    assert "Traceback" not in printed


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_skip_the_same_step_and_continue(example, forks, poisoned, kind):
    output = example.folder / f"nonfinite-skip-{kind}"
    config = ROOT / "ds_config/zero3.json" if kind == "zero3" else None
    words = words_of(example, poisoned, output, on_nonfinite="skip", deepspeed=config)
    flags = ["--verify_save", "False"]  # verification would find the NaN
    codes, printed = forks.run([*words, *flags], 2, poisoned[2])
    assert codes == [0, 0], printed
    (line,) = [line for line in printed.splitlines() if line.startswith("warning     step")]
    assert "step 5 is skipped" in line and f"{poisoned[1]}:20" in line
    records = train_records(output)
    assert [math.isfinite(record["grad_norm"]) for record in records] == [True] * 4 + [False, True]
    assert all(math.isfinite(record["nll"]) for record in records if "nll" in record)
    # The learning-rate schedule does not count the skipped step, with and without DeepSpeed.
    assert records[4]["learning_rate"] == records[5]["learning_rate"] < records[3]["learning_rate"]
    weights = load_file(output / "model.safetensors")
    assert weights["lm_head.weight"].isfinite().all() and weights["model.norm.weight"].isfinite().all()
