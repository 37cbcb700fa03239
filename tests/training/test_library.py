"""The examples of docs/library.md run as printed and have the described results."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [{"question": f"Count to {n}.", "answer": " ".join(map(str, range(n)))} for n in range(1, 9)]
"""Rows for one optimizer step of the example."""


@pytest.fixture
def blocks():
    text = (Path(__file__).parents[2] / "docs/library.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def by_hand(model: Path, alpha: float) -> float:
    """Compute the DFT loss of all rows one by one in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        answer = tokenizer(row["answer"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = net(torch.tensor([prompt + answer])).logits[0]
        for place, token in enumerate(answer, start=len(prompt)):
            nll = -log_softmax(logits[place - 1], dim=-1)[token].item()
            total += (alpha * torch.tensor(-nll).exp().item() + 1 - alpha) * nll
            count += 1
    return total / count


def test_the_examples_of_the_library_page_run(blocks, tiny, tmp_path, monkeypatch):
    example, losses = blocks
    assert len(example.splitlines()) <= 25
    expected = by_hand(tiny, alpha=1.0)
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    names: dict[str, object] = {}
    exec(example.replace("Qwen/Qwen2.5-0.5B", str(tiny)), names)

    history = [record for record in names["trainer"].state.log_history if "loss" in record]
    assert len(history) == 3
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert history[-1]["objective"] < history[0]["objective"]
    saved = AutoModelForCausalLM.from_pretrained("runs/library")
    assert not torch.equal(
        saved.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(tiny).get_input_embeddings().weight,
    )

    model = AutoModelForCausalLM.from_pretrained(tiny)
    input_ids = torch.tensor([[5, 6, 7, 8, 9]])
    variables = {"model": model, "input_ids": input_ids, "labels": input_ids, "num_items": 10}
    first, second = losses.split("loss, stats = ")[1:]
    exec(f"{losses.splitlines()[0]}\nloss, stats = {first}\nwhole = loss\nloss, stats = {second}", variables)
    assert variables["loss"].item() == pytest.approx(variables["whole"].item(), rel=1e-5)
    assert variables["whole"].item() == pytest.approx(
        (variables["stats"].weight * variables["stats"].nll).sum().item() / 10, rel=1e-5
    )
