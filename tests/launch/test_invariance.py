"""Loss, gradient norm and weights do not depend on micro-batches, accumulation, ranks, padding or packing.

The rows of the data, and some of their answers, have weights.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.combinations import proves
from tests.examples import weighted_copy
from tests.launching import ROOT, eval_records, launch, train_records

STEPS = 5
SAMPLES = 37
"""A number of conversations for which the last step of an epoch has five instead of eight."""
SINGLE = ("python", "fork")
"""Launchers of one process; the others start two. "fork" and "forks" stand for `tests.forking`."""
WAYS = {
    "2x4": ("fork", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "ddp": (
        "torchrun",
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "attn_implementation": "sdpa",
        },
    ),
    "zero1": ("deepspeed", {"per_device_train_batch_size": 4, "deepspeed": ROOT / "ds_config/zero1.json"}),
    "zero2": (
        "deepspeed",
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "deepspeed": ROOT / "ds_config/zero2.json",
        },
    ),
    "zero3": (
        "forks",
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "deepspeed": ROOT / "ds_config/zero3.json",
            "enable_gradient_checkpointing": True,
        },
    ),
    "zero3_offload": (
        "deepspeed",
        {"per_device_train_batch_size": 4, "deepspeed": ROOT / "ds_config/zero3_offload.json"},
    ),
    "fsdp2": (
        "forks",
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "fsdp": True,
            "enable_gradient_checkpointing": True,
        },
    ),
    "fused": ("fork", {"per_device_train_batch_size": 8}),
    "padded": ("fork", {"per_device_train_batch_size": 8, "attn_implementation": "sdpa"}),
    "compiled": ("python", {"per_device_train_batch_size": 8, "torch_compile": True}),
    "compiled-checkpointing": (
        "python",
        {"per_device_train_batch_size": 8, "torch_compile": True, "enable_gradient_checkpointing": True},
    ),
    "compiled-ddp": ("torchrun", {"per_device_train_batch_size": 4, "torch_compile": True}),
    "compiled-fsdp2": (
        "torchrun",
        {"per_device_train_batch_size": 4, "torch_compile": True, "fsdp": True},
    ),
    "compiled-zero2": (
        "deepspeed",
        {"per_device_train_batch_size": 4, "torch_compile": True, "deepspeed": ROOT / "ds_config/zero2.json"},
    ),
    "compiled-zero3": (
        "deepspeed",
        {"per_device_train_batch_size": 4, "torch_compile": True, "deepspeed": ROOT / "ds_config/zero3.json"},
    ),
}

LEFT_OUT = {*(name for name in WAYS if "compiled" in name), "zero3_offload", "zero1", "zero2"}
"""Excluded from the default run. torch compiles the layers of the first ones. DeepSpeed compiles an
optimizer for zero3_offload, which takes minutes. ZeRO-1 and 2 differ from ZeRO-3 in what they shard; the
default run has ZeRO-3 here, and ZeRO-2 in test_lora.py."""


@pytest.fixture(scope="module")
def run(example, forks):
    """Train with some flags, and return the records of training and evaluation."""

    def trained(name, launcher, flags):
        output = example.folder / f"invariance-{name}"
        words = example.words(
            output, dft_alpha=0.7, num_train_epochs=1, max_train_samples=SAMPLES, eval_strategy="epoch",
            per_device_eval_batch_size=5, lr_scheduler_type="constant", use_cpu=True,
            data_files=weighted_copy(example.train), eval_data_files=weighted_copy(example.eval),
            **{"fused_head": "on", **flags},
        )  # fmt: skip
        if launcher in ("fork", "forks"):
            codes, printed = forks.run(words, 1 if launcher in SINGLE else 2)
            assert not any(codes), printed
        else:
            finished = launch(words, folder=example.folder, launcher=launcher)
            assert finished.code == 0, finished.output
        return train_records(output), eval_records(output)

    return trained


@pytest.fixture(scope="module")
def whole(run):
    """The reference run: padded batches of 8 in one process, no accumulation, full logits."""
    flags = {"per_device_train_batch_size": 8, "fused_head": "off", "attn_implementation": "sdpa"}
    return run("8x1", "fork", flags)


@pytest.fixture(scope="module")
def bare_model(example):
    """The example model with a tokenizer that has no ChatML tokens."""
    folder = example.folder / "bare"
    shutil.copytree(example.model, folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        text = (folder / name).read_text()
        text = text.replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
        text = text.replace('"eos_token_id": 2', '"eos_token_id": 0')
        text = text.replace("<|im_start|>", "<|unused1|>").replace("<|im_end|>", "<|unused2|>")
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def untied_model(example):
    """The example model with an untied output embedding."""
    folder = example.folder / "untied"
    model = AutoModelForCausalLM.from_pretrained(example.model, tie_word_embeddings=False)
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.copy_(model.model.embed_tokens.weight + 0.01 * noise)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(example.model).save_pretrained(folder)
    return folder


def marks_of(way: str) -> list[pytest.MarkDecorator]:
    launcher, flags = WAYS[way]
    slow = [pytest.mark.slow] if way in LEFT_OUT else []
    return [proves(flags, 1 if launcher in SINGLE else 2), *slow]


@pytest.mark.parametrize("name", [pytest.param(way, marks=marks_of(way)) for way in WAYS])
def test_a_step_does_not_depend_on_how_it_is_split(run, whole, name):
    assert_same(run(name, *WAYS[name]), whole)


def test_a_step_does_not_depend_on_how_it_is_split_with_an_untied_head(example, run, untied_model):
    """Compare ZeRO-3 with the fused head to one process with full logits."""
    plain = {"per_device_train_batch_size": 8, "fused_head": "off", "model_name_or_path": untied_model}
    sharded = run("untied-zero3", "forks", {**WAYS["zero3"][1], "model_name_or_path": untied_model})
    assert_same(sharded, run("untied-8x1", "fork", plain))
    saved = load_file(example.folder / "invariance-untied-zero3" / "model.safetensors")
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


def assert_same(got, expected):
    (train, evaluation), (expected_train, expected_eval) = got, expected
    assert len(train) == len(expected_train) == STEPS
    for step, (record, other) in enumerate(zip(train, expected_train, strict=True), start=1):
        for metric in ("loss", "nll", "avg_p_correct", "objective", "effective_tokens", "grad_norm"):
            assert record[metric] == pytest.approx(other[metric], rel=1e-5), f"{metric} at step {step}"
        # Ties in the argmax may be broken differently.
        assert record["acc"] == pytest.approx(other["acc"], abs=0.02)
    for metric in ("eval_loss", "eval_nll", "eval_avg_p_correct", "eval_objective"):
        assert evaluation[-1][metric] == pytest.approx(expected_eval[-1][metric], rel=1e-5)


@pytest.fixture(scope="module")
def whole_grown(run, bare_model):
    """The reference run with two randomly initialized embedding rows for missing ChatML tokens."""
    flags = {"per_device_train_batch_size": 8, "model_name_or_path": bare_model}
    return run("grown-8x1", "fork", flags)[0]


@pytest.mark.parametrize("name", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_new_tokens_are_initialized_equally_on_all_ranks(example, run, bare_model, whole_grown, name):
    train, _ = run(f"grown-{name}", "forks", {**WAYS[name][1], "model_name_or_path": bare_model})
    losses = [record["loss"] for record in train]
    assert losses == pytest.approx([record["loss"] for record in whole_grown], rel=1e-4)
    output = example.folder / f"invariance-grown-{name}"
    tokenizer = AutoTokenizer.from_pretrained(output)
    weights = load_file(output / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == len(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_reference_run_learns(whole):
    """Make sure that the compared metrics change; equal constants would pass the comparison."""
    train, evaluation = whole
    # Without weights in the data, the differences would be 0.
    shares = [record["effective_tokens"] - 0.7 * record["avg_p_correct"] - 0.3 for record in train]
    assert max(map(abs, shares)) > 0.01 and evaluation
    assert train[-1]["nll"] < 0.9 * train[0]["nll"]
    assert len({record["grad_norm"] for record in train}) == STEPS
