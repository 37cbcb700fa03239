"""Number of times that a training step waits for the device: 0 between log lines by default."""

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import find_packed_sequence_indices

from dft.arguments.training import TrainingArguments
from dft.training.measuring import device_skip
from dft.training.patches import masks_without_waiting
from scripts.bench.bench_waits import CASES, ON_GPU, STEPS, HostWaits, count_waits

EXPECTED = {
    "varlen": (0, 1),
    "varlen, packed": (0, 1),
    "varlen, checkpointing": (0, 1),
    "varlen, `--max_grad_norm 0`": (0, 1),
    "varlen, `--optim adamw_torch`": (1, 0),  # the norm, before the update
    "varlen, `--logging_steps 1`": (4, 1),  # loss, norm, metrics and memory
    "sdpa": (4, 1),  # transformers looks for padding twice in each of two micro-batches
    "sdpa, packed": (2, 1),  # and for sequences that restart once
}
"""Waits, and flags read during the next step, of a step of two micro-batches."""

on_cpu = pytest.mark.skipif(ON_GPU, reason="counted by the stand-in for a GPU")
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")


@on_cpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_the_device_as_often_as_documented(monkeypatch, name):
    monkeypatch.setattr(device_skip, "DEVICE_TYPES", frozenset({"cpu"}))
    steps, _ = count_waits(**CASES[name])
    counts = [(places.total(), late) for places, late in steps]
    # A batch whose rows are equally long has no padding, which sdpa notices one wait earlier.
    assert len(counts) == STEPS and max(counts[1:-1]) == EXPECTED[name], steps


@on_gpu
@pytest.mark.parametrize("name", ["varlen", "varlen, packed", "varlen, `--max_grad_norm 0`"])
def test_on_a_gpu_no_step_between_log_lines_synchronizes(name):
    """PyTorch reports each operation that synchronizes, also copies of batches and numbers to the device."""
    steps, _ = count_waits(**CASES[name])
    assert len(steps) == STEPS and all(not places for places, _ in steps[1:-1]), steps


@on_gpu
def test_on_a_gpu_a_synchronization_is_counted_at_its_place():
    waits = HostWaits()
    with waits.counting():
        torch.ones(3, device="cuda").sum().item()
    (place,) = waits.places
    assert waits.places.total() == 1 and place.startswith("training/test_host_waits.py:")


@on_cpu
@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: float(tensor[0]),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.equal(tensor, tensor),
    ],
    ids=["item", "bool", "float", "tolist", "cpu", "nonzero", "mask", "equal"],
)
def test_each_kind_of_wait_is_counted_once_at_its_place(wait):
    waits = HostWaits()
    with waits.counting():
        torch.ones(3) * 2 + torch.zeros(3).sum()
        wait(torch.tensor([0.0, 1.0, 2.0]))
    (place,) = waits.places
    assert waits.places.total() == 1 and place.startswith("training/test_host_waits.py:")


@pytest.mark.parametrize(
    "positions", [[[0, 1, 2, 0, 1]], [[0, 1, 2, 3, 4]] * 2, [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]], ids=str
)
def test_sequences_within_rows_have_the_numbers_that_transformers_gives_them(positions):
    """transformers returns None instead of zeros, for which it looks at them."""
    expected = find_packed_sequence_indices(torch.tensor(positions))
    with masks_without_waiting():
        actual = masking_utils.find_packed_sequence_indices(torch.tensor(positions))
    assert torch.equal(actual, torch.zeros_like(actual) if expected is None else expected)
    assert masking_utils.find_packed_sequence_indices is find_packed_sequence_indices


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"use_cpu": False}, {"non_blocking": True}),
        ({"use_cpu": True}, None),
        ({"use_cpu": False, "dataloader_pin_memory": False}, None),
        ({"use_cpu": False, "accelerator_config": {"non_blocking": False}}, {"non_blocking": False}),
    ],
)
def test_batches_are_copied_to_a_gpu_without_waiting_for_it(tmp_path, flags, expected):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name, value in {"accelerator_config": None, "dataloader_pin_memory": True, **flags}.items():
        setattr(arguments, name, value)
    arguments._copy_without_waiting()
    assert arguments.accelerator_config == expected
