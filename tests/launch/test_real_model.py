"""Training, saving, resuming and evaluating a pretrained model of 135 million weights on the command line.

`python scripts/get_model.py smollm2-135m real_models/smollm2-135m` makes it; without it these tests are
skipped.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.get_model import is_made
from tests.launching import ROOT, launch, train_records

pytest.importorskip("reasoning_gym", reason="pip install -r requirements-real.txt")
pytestmark = [pytest.mark.real, pytest.mark.slow]
MODEL = ROOT / "real_models/smollm2-135m"
if not is_made("smollm2-135m", MODEL):
    pytest.skip(
        f"make the model with python scripts/get_model.py smollm2-135m {MODEL}", allow_module_level=True
    )

STEPS = 4
ROWS = 16
TIMEOUT = 900
"""Seconds after which a run is considered hung. On two busy cores a step takes a minute."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 16 conversations to train on and the 100 problems of the quickstart."""
    folder = tmp_path_factory.mktemp("real")
    made = launch(
        [str(folder), "--train", str(ROWS)], folder=folder, script=ROOT / "scripts/make_problems.py"
    )
    assert made.code == 0, made.output
    return folder


def words(folder, output, **flags):
    settings = {
        "model_name_or_path": MODEL, "data_files": folder / "train.jsonl", "output_dir": folder / output,
        "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-4, "report_to": "none", "max_length": 128,
        "torch_dtype": "float32", "use_cpu": True, "save_strategy": "no", "preprocessing_num_workers": 1,
        "per_device_train_batch_size": 4, "enable_gradient_checkpointing": False, "report": False, **flags,
    }  # fmt: skip
    return [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]


def train(folder, output, launcher="python", **flags):
    finished = launch(words(folder, output, **flags), folder=folder, launcher=launcher, timeout=TIMEOUT)
    assert finished.code == 0, finished.output
    return train_records(folder / output)


@pytest.fixture(scope="module")
def whole(folder):
    """The records of four steps in one process; the model is saved and verified."""
    return train(folder, "whole")


def answer(model_folder, question):
    """Return what a saved model answers, by greedy decoding with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def rows(file):
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_preflight_agrees_with_transformers_alone(folder):
    flags = {"preflight": True, "preflight_samples": ROWS, "data_files": folder / "train.jsonl"}
    finished = launch(words(folder, "preflight", **flags), folder=folder)
    assert finished.code == 0, finished.output
    whole = json.loads((folder / "preflight/preflight.json").read_text())["whole"]
    tokenizer, p, ends = AutoTokenizer.from_pretrained(MODEL), [], []
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for messages in rows(folder / "train.jsonl"):
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt + messages[1]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, :-1].softmax(-1)
        targets = torch.tensor(ids[1:])
        p += probabilities.gather(1, targets[:, None])[start - 1 :, 0].tolist()
        ends.append(p[-1])
    assert whole["tokens"] == len(p)
    assert whole["avg_p_correct"] == pytest.approx(sum(p) / len(p), rel=1e-4)
    assert whole["p_end_of_turn"] == pytest.approx(sum(ends) / len(ends), rel=1e-3)
    assert "the prior is strong" in finished.output


def test_zero3_on_two_ranks_takes_the_same_steps(folder, whole):
    zero3 = train(
        folder, "zero3", "deepspeed", deepspeed=ROOT / "ds_config/zero3.json", per_device_train_batch_size=2
    )
    assert len(zero3) == len(whole) == STEPS
    for name in ("loss", "nll", "avg_p_correct", "grad_norm"):
        expected = [record[name] for record in whole]
        assert [record[name] for record in zero3] == pytest.approx(expected, rel=2e-4), name
    first, second = (load_file(folder / name / "model.safetensors") for name in ("whole", "zero3"))
    assert first.keys() == second.keys() == load_file(MODEL / "model.safetensors").keys()
    before = load_file(MODEL / "model.safetensors")
    moved = sum((first[name].float() - before[name]).norm() ** 2 for name in before) ** 0.5
    apart = sum((first[name].float() - second[name].float()).norm() ** 2 for name in before) ** 0.5
    assert moved > 0 and apart < 0.1 * moved, (apart, moved)


def test_saved_model_has_learned(folder, whole):
    question = rows(folder / "train.jsonl")[0][0]["content"]
    assert whole[-1]["nll"] < whole[0]["nll"]
    assert answer(folder / "whole", question) != answer(MODEL, question)


def test_adapters_are_trained_saved_and_merged(folder):
    records = train(folder, "lora", lora_r=8, learning_rate=1e-3)
    assert records[-1]["nll"] < records[0]["nll"]
    merge = [str(folder / "lora"), str(folder / "merged")]
    finished = launch(merge, folder=folder, script=ROOT / "scripts/merge_lora.py")
    assert finished.code == 0, finished.output
    names = load_file(MODEL / "model.safetensors").keys()
    assert load_file(folder / "merged/model.safetensors").keys() == names


def test_resumed_run_continues_exactly(folder):
    flags = {
        "deepspeed": ROOT / "ds_config/zero3.json", "per_device_train_batch_size": 2, "save_steps": 2,
        "save_strategy": "steps", "save_only_model": False, "save_total_limit": 2,
    }  # fmt: skip
    straight = train(folder, "straight", "deepspeed", **flags)
    resumed = folder / "resumed"
    resumed.mkdir()
    shutil.move(folder / "straight/checkpoint-2", resumed / "checkpoint-2")
    records = train(folder, "resumed", "deepspeed", resume_from_checkpoint="auto", **flags)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        expected = [record[name] for record in straight]
        assert [record[name] for record in records] == pytest.approx(expected, rel=1e-6), name
    first, second = (load_file(folder / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluation_samples_what_transformers_generates(folder):
    problems = folder / "few.jsonl"
    lines = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
    problems.write_text("".join(lines[:4] + lines[-4:]))
    flags = ["--samples", "1", "--temperature", "0", "--max_new_tokens", "48", "--grader", "number"]
    where = ["--model", f"base={MODEL}", "--data", str(problems), "--output", str(folder / "evaluation")]
    finished = launch([*where, *flags], folder=folder, script=ROOT / "scripts/evaluate.py")
    assert finished.code == 0, finished.output
    records = [json.loads(line) for line in (folder / "evaluation/base/few.jsonl").read_text().splitlines()]
    assert len(records) == 8
    questions = [messages[0]["content"] for messages in rows(problems)]
    texts = {record["question"]: record["samples"][0]["text"].strip() for record in records}
    alone = [answer(MODEL, question).strip() for question in questions]
    # Batches are padded, which may change a late token of a text.
    assert sum(texts[question] == text for question, text in zip(questions, alone, strict=True)) >= 6
