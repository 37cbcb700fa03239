"""Sequence parallelism takes the same steps as one process."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.errors import EXIT_USER_ERROR
from dft.training.checkpoints.folder import newest_checkpoint
from tests.combinations import proves, refuses
from tests.examples import weighted_copy
from tests.launching import ROOT, eval_records, train_records

FLAGS = {
    "max_train_samples": 37, "num_train_epochs": 1, "dft_alpha": 0.7, "eval_strategy": "epoch",
    "lr_scheduler_type": "constant", "use_cpu": True, "per_device_eval_batch_size": 5,
}  # fmt: skip
WAYS = {
    "ddp": {},
    "padded": {"attn_implementation": "sdpa"},
    "zero2": {"deepspeed": ROOT / "ds_config/zero2.json"},
    "zero3": {"deepspeed": ROOT / "ds_config/zero3.json"},
    "zero3-whole-logits": {"deepspeed": ROOT / "ds_config/zero3.json", "fused_head": "off"},
    "zero3-checkpointed": {"deepspeed": ROOT / "ds_config/zero3.json", "enable_gradient_checkpointing": True},
    "zero3-lora": {"deepspeed": ROOT / "ds_config/zero3.json", "lora_r": 4},
    "four-ranks": {},
}


@pytest.fixture(scope="module")
def train(example, forks):
    def run(name, ranks, **flags):
        output = example.folder / f"sequence-parallel-{name}"
        data = {"data_files": weighted_copy(example.train), "eval_data_files": weighted_copy(example.eval)}
        codes, printed = forks.run(example.words(output, **{**FLAGS, **data, **flags}), ranks)
        return output, codes, printed

    return run


@pytest.fixture(scope="module")
def whole(train):
    """Reference runs in one process with 8 rows per step, with and without adapters."""
    folders = {}

    def make(**flags):
        key = "-".join(flags) or "plain"
        if key not in folders:
            output, codes, printed = train(f"whole-{key}", 1, per_device_train_batch_size=8, **flags)
            assert codes == [0], printed
            folders[key] = output
        return folders[key]

    return make


def marks_of(way: str) -> list[pytest.MarkDecorator]:
    slow = [] if way in ("ddp", "zero3") else [pytest.mark.slow]
    return [proves({"sequence_parallel_size": 2, **WAYS[way]}, 2), *slow]


@pytest.mark.parametrize("name", [pytest.param(way, marks=marks_of(way)) for way in WAYS])
def test_a_step_does_not_depend_on_sequence_parallelism(train, whole, forks, name):
    ranks = 4 if name == "four-ranks" else 2
    per_device, accumulation = (4, 2) if ranks == 2 else (2, 2)  # four ranks are two groups
    output, codes, printed = train(
        name, ranks, sequence_parallel_size=2, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, **WAYS[name],
    )  # fmt: skip
    assert not any(codes), printed
    assert "2 ranks per sequence" in printed
    # No C++ operator may be compiled: a compiler may be missing, and an interrupted build blocks later runs.
    assert not (forks.folder / "cache/torch_extensions").exists()
    other = whole(**({"lora_r": 4} if "lora" in name else {}))
    got, expected = train_records(output), train_records(other)
    assert len(got) == len(expected) == 5
    for record, reference in zip(got, expected, strict=True):
        for metric in ("loss", "nll", "avg_p_correct", "objective", "grad_norm", "entropy", "p_end_of_turn"):
            assert record[metric] == pytest.approx(reference[metric], rel=1e-5), metric
        assert record["supervised_tokens"] == reference["supervised_tokens"]
    for metric in ("eval_loss", "eval_nll", "eval_objective"):
        value, reference = eval_records(output)[-1][metric], eval_records(other)[-1][metric]
        assert value == pytest.approx(reference, rel=1e-5)
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    weights, reference = load_file(output / file), load_file(other / file)
    for key, weight in reference.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_is_resumed(train, example):
    flags = {
        "sequence_parallel_size": 2, "per_device_train_batch_size": 8, "save_strategy": "steps",
        "save_steps": 2, "deepspeed": ROOT / "ds_config/zero3.json",
    }  # fmt: skip
    left_alone, codes, printed = train("left-alone", 2, **flags)
    assert not any(codes), printed
    halted = example.folder / "sequence-parallel-halted"
    halted.mkdir()
    shutil.copytree(left_alone / "checkpoint-2", halted / "checkpoint-2")
    assert newest_checkpoint(halted)[0] is not None
    output, codes, printed = train("halted", 2, resume_from_checkpoint="auto", **flags)
    assert not any(codes), printed
    weights, other = (load_file(folder / "model.safetensors") for folder in (output, left_alone))
    assert all(torch.equal(weights[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        (
            {"sequence_parallel_size": 3},
            2,
            r"2 rank\(s\) cannot be divided into groups of 3",
        ),
        ({"sequence_parallel_size": 0}, 1, "must be at least 1"),
        (
            {"sequence_parallel_size": 2, "packing": True, "attn_implementation": "sdpa"},
            2,
            "use --attn_implementation varlen or --packing False",
        ),
        pytest.param(
            {"sequence_parallel_size": 2, "attn_implementation": "eager"},
            2,
            "use --attn_implementation sdpa",
            marks=refuses(
                "use sdpa or varlen", {"sequence_parallel_size": 2, "attn_implementation": "eager"}, 2
            ),
        ),
    ],
)
def test_unsupported_settings_are_rejected(train, flags, ranks, message):
    _, codes, printed = train("refused", ranks, **flags)
    assert EXIT_USER_ERROR in codes and 0 not in codes, printed
    assert f"error: --sequence_parallel_size {flags['sequence_parallel_size']}" in printed
    assert re.search(message, printed), printed


@pytest.fixture(scope="module")
def windowed(example):
    """Return the folder of the example's model with a sliding window in its second layer."""
    folder = example.folder / "windowed"
    model = AutoModelForCausalLM.from_pretrained(example.model)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.config.sliding_window, model.config.use_sliding_window = 16, True
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(example.model).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_sliding_windows_are_rejected_with_masks(train, windowed):
    flags = {"sequence_parallel_size": 2, "model_name_or_path": windowed, "attn_implementation": "sdpa"}
    _, codes, printed = train("windowed", 2, **flags)
    assert EXIT_USER_ERROR in codes and 0 not in codes, printed
    assert "sliding_attention" in printed


@pytest.mark.slow
@proves({"sequence_parallel_size": 2, "packing": True}, 2)
def test_sliding_windows_and_packed_rows_are_shared_with_varlen_attention(train, windowed):
    """Each epoch is one step with all conversations, packed for two ranks and unpacked in one process."""
    flags = {"model_name_or_path": windowed, "num_train_epochs": 3, "max_length": 96}
    whole, codes, printed = train(
        "windows-whole", 1, per_device_train_batch_size=37, attn_implementation="sdpa", **flags
    )
    assert codes == [0] and "sdpa attention" in printed, printed
    shared, codes, printed = train(
        "windows-shared", 2, per_device_train_batch_size=32, packing=True, sequence_parallel_size=2, **flags
    )
    assert not any(codes) and "2 ranks per sequence" in printed, printed
    got, expected = train_records(shared), train_records(whole)
    assert len(got) == len(expected) == 3
    for record, reference in zip(got, expected, strict=True):
        for metric in ("loss", "nll", "avg_p_correct", "grad_norm"):
            assert record[metric] == pytest.approx(reference[metric], rel=1e-5), metric
