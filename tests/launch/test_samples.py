"""--generate_samples in real runs: on several ranks, beside a run without it, and resumed."""

import json
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.errors import EXIT_STOPPED, EXIT_USER_ERROR
from dft.report.samples_file import SAMPLES, append_samples, read_samples
from tests.launching import ROOT, history
from tests.reliability.test_resume import assert_same, logged
from tests.report import test_samples_file

TOKENS = 10
FLAGS = {
    "generate_samples": 3, "generate_samples_max_tokens": TOKENS, "max_steps": 4, "eval_strategy": "steps",
    "eval_steps": 2, "max_eval_samples": 12, "per_device_eval_batch_size": 1, "use_cpu": True,
    "per_device_train_batch_size": 4,
}  # fmt: skip
ZERO3 = {"deepspeed": ROOT / "ds_config/zero3.json"}
WAYS = {
    "ddp": {},
    "zero2-packed": {"deepspeed": ROOT / "ds_config/zero2.json", "packing": True, "max_length": 96},
    "zero3": ZERO3,
    "zero3-shared": {**ZERO3, "sequence_parallel_size": 2},
    "zero3-checkpointed": {**ZERO3, "enable_gradient_checkpointing": True},
    "fsdp": {"fsdp": True},
    "zero3-lora": {**ZERO3, "lora_r": 4},
    "fsdp-lora": {"fsdp": True, "lora_r": 4},
}


@pytest.fixture(scope="module")
def train(example, forks):
    def run(name, ranks=1, env=None, **flags):
        output = example.folder / f"samples-{name}"
        codes, printed = forks.run(example.words(output, **{**FLAGS, **flags}), ranks, **(env or {}))
        return output, codes, printed

    return run


def without_step(rows):
    return [{name: value for name, value in row.items() if name != "step"} for row in rows]


@pytest.fixture(scope="module")
def untouched(example, train):
    """Samples of the untouched model, generated in one process."""
    output, codes, printed = train("untouched", learning_rate=0)
    assert codes == [0], printed
    rows, damaged = read_samples(output / SAMPLES)
    assert [(row["step"], row["sample"]) for row in rows] == [(2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3)]
    assert without_step(rows[:3]) == without_step(rows[3:]) and not damaged
    return rows


def test_samples_are_what_the_model_generates_after_the_prompt_of_its_template(example, untouched):
    model = AutoModelForCausalLM.from_pretrained(example.model)
    tokenizer = AutoTokenizer.from_pretrained(example.model)
    lines = example.eval.read_text().splitlines()
    for row in untouched[:3]:
        messages = json.loads(lines[row["line"] - 1])["messages"]
        ids = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS)[0, ids["input_ids"].shape[1] :]
        answer = output[output != tokenizer.eos_token_id]
        assert row["answer"] == tokenizer.decode(answer)
        assert (row["tokens"], row["ended"]) == (len(answer), len(answer) < len(output))
        assert row["reference"] == messages[-1]["content"] and row["question"] == messages[-2]["content"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(way, marks=() if way in ("zero3", "fsdp-lora") else pytest.mark.slow) for way in WAYS],
)
def test_every_way_to_share_the_work_generates_the_same(train, untouched, name):
    """Rank 0 has two of three prompts, so that rank 1 has none in the second of two batches."""
    output, codes, printed = train(name, 2, learning_rate=0, **WAYS[name])
    assert not any(codes), printed
    rows, _ = read_samples(output / SAMPLES)
    assert rows == untouched


@pytest.mark.parametrize("kind", ["single", pytest.param("zero3", marks=pytest.mark.slow)])
def test_training_is_the_same_without_samples(train, kind):
    """Dropout makes the weights depend on the random numbers that are drawn."""
    flags = {"lora_r": 4, "lora_dropout": 0.5, "eval_on_start": True, **(ZERO3 if kind == "zero3" else {})}
    ranks = 2 if kind == "zero3" else 1
    outputs = []
    for count in (3, 0):
        output, codes, printed = train(f"{kind}-{count}", ranks, **flags, generate_samples=count)
        assert not any(codes), printed
        outputs.append(output)
    weights, other = (load_file(output / "adapter_model.safetensors") for output in outputs)
    assert all(torch.equal(weights[name], other[name]) for name in other)
    assert logged(outputs[0]) == logged(outputs[1]) and len(history(outputs[0])) > 6
    assert [row["step"] for row in read_samples(outputs[0] / SAMPLES)[0]] == [0] * 3 + [2] * 3 + [4] * 3
    assert not (outputs[1] / SAMPLES).exists()


def test_a_resumed_run_ends_with_the_samples_of_one_that_was_not_interrupted(train, example):
    flags = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto", "max_steps": 6}
    whole, codes, printed = train("whole", **flags)
    assert codes == [0], printed
    killed, codes, printed = train("killed", env={"DIE_AT": "evaluated 4"}, **flags)
    assert codes != [0] and [row["step"] for row in read_samples(killed / SAMPLES)[0]] == [2] * 3 + [4] * 3
    with open(killed / SAMPLES, "ab") as stream:
        stream.write(b'{"step": 6, "samp')  # the process may be killed while it writes
    killed, codes, printed = train("killed", **flags)
    assert codes == [0] and "removed 1 damaged lines" in printed, printed
    assert (killed / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    assert_same(killed, whole)


def test_a_new_run_does_not_show_the_samples_of_an_earlier_one(train, example):
    output = example.folder / "samples-anew"
    output.mkdir()
    append_samples(output / SAMPLES, [test_samples_file.row(1)])
    output, codes, printed = train("anew", generate_samples=0, max_steps=1, eval_strategy="no")
    assert codes == [0], printed
    assert not (output / SAMPLES).exists()


def test_a_signal_ends_generation_on_all_ranks(example, forks):
    """Only rank 1 gets it, in the middle of answers that take many seconds."""
    output = example.folder / "samples-stopped"
    flags = {
        **FLAGS,
        **ZERO3,
        "eval_strategy": "no",
        "eval_on_start": True,
        "generate_samples_max_tokens": 400,
    }
    run = forks.start(example.words(output, **flags), 2)
    deadline = time.monotonic() + 60
    while "eval  step 0/4" not in run.output and time.monotonic() < deadline:
        time.sleep(0.02)
    run.kill(signal.SIGTERM, rank=1)
    assert run.codes() == [EXIT_STOPPED] * 2, run.output
    assert "note        no samples of step 0: the run was asked to stop" in run.output
    assert "stopped by SIGTERM after step 1: saved" in run.output and not (output / SAMPLES).exists()


def test_evaluation_data_without_prompts_is_an_error(train, example):
    """No conversation ends with an answer."""
    rows = [json.loads(line) for line in example.eval.read_text().splitlines()]
    for row in rows:
        row["messages"].append({"role": "user", "content": "And?"})
    file = example.folder / "asking.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, codes, printed = train("refused", eval_data_files=file)
    assert codes == [EXIT_USER_ERROR], printed
    assert (
        "error: --generate_samples 3: none of the 12 conversations of the evaluation data can be used (12 do "
        "not end with an answer that is trained); use other evaluation data, or remove --generate_samples"
    ) in printed


def test_lines_on_the_console_are_short_and_name_prompts_references_and_answers(train, untouched, example):
    output, codes, printed = train("printed", max_steps=2)
    assert codes == [0], printed
    lines = printed.splitlines()
    start = lines.index(f"samples     3 prompts are continued at each evaluation, by at most {TOKENS} tokens")
    first = untouched[0]
    assert (
        lines[start + 1].startswith("  1 prompt  ")
        and lines[start + 2] == f"    answer  {first['reference']}"
    )
    (after,) = [number for number, line in enumerate(lines) if line.startswith("samples step 2/2")]
    assert re.fullmatch(r"samples step 2/2  \d of 3 answers ended, \d+ tokens on average", lines[after])
    assert [line[:11] for line in lines[after + 1 : after + 4]] == [f"  {n} answer " for n in (1, 2, 3)]
    assert all(len(line) <= 100 for line in (*lines[start : start + 7], *lines[after : after + 4]))
