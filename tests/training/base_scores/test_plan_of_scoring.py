"""The planned pass of --base_scores, compared with operations and bytes counted by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from dft.data.batches.dataset import SCHEMA, Sequences
from dft.training.base_scores.plan import plan_scoring
from dft.training.measuring.throughput import model_flops
from dft.training.memory.estimate import MemoryLayout
from dft.training.parameters import GIB
from tests.training.memory.test_plan import arguments, meta_model

LENGTHS = (30, 10, 20)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.arrow"
    columns = {
        "input_ids": [[1] * length for length in LENGTHS],
        "labels": [[-100] * (length // 2) + [1] * (length // 2) for length in LENGTHS],
        "source": [0] * 3, "line": [1, 2, 3], "part": [0] * 3, "reason": [""] * 3,
    }  # fmt: skip
    table = pa.Table.from_pydict(columns, SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table)
    return path


def scoring(path, folder, order=(0, 1), dtype=torch.float32, layout=None, fused=True, **flags):
    model = meta_model(2, 128, 256, 500, 2, 1, dtype=dtype)
    args = arguments(folder, per_device_eval_batch_size=1, **flags)
    datasets = {"train": Sequences(path, np.array(order)), "eval": Sequences(path, np.array([2]))}
    report = {split: {"tokens": 100, "supervised_tokens": 50} for split in datasets}
    layout = layout or MemoryLayout(1, 0, False, False, dtype.itemsize, "cpu")
    return model, plan_scoring(model, args, layout, datasets, report, 30, fused)


def test_operations_equal_those_counted_by_hand(path, tmp_path):
    _, plan = scoring(path, tmp_path)
    assert (plan.tokens, plan.evaluation_tokens, plan.stored) == (60, 20, 4 * 30)
    layers = 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256)
    pairs = sum(length * (length + 1) // 2 for length in LENGTHS)
    expected = 2 * layers * 60 + 2 * 500 * 128 * 30 + 2 * 2 * 128 * 2 * pairs
    assert plan.operations == expected
    trained = sum(length * (length + 1) // 2 for length in LENGTHS[:2])
    epoch = 3 * (2 * layers * 40 + 2 * 500 * 128 * 20 + 2 * 2 * 128 * 2 * trained)
    assert plan.epoch_share == pytest.approx(expected / epoch)
    assert scoring(path, tmp_path, order=(0, 1, 1, 0))[1].epoch_share == pytest.approx(expected / epoch / 2)
    recomputing = scoring(path, tmp_path, gradient_checkpointing=True)[1].epoch_share
    assert recomputing == pytest.approx(expected / (epoch + 2 * layers * 40 + 2 * 2 * 128 * 2 * trained))


def test_a_training_step_is_three_forward_passes_and_adapters_take_two(path, tmp_path):
    model = meta_model(2, 128, 256, 500, 2, 1)
    forward = model_flops(model, forward_only=True)
    for trained, factor in ((True, 3), (False, 2)):
        model.requires_grad_(trained)
        step = model_flops(model)
        assert step.per_token == factor * forward.per_token
        assert step.per_supervised == factor * forward.per_supervised
        assert step.per_pair == 3 * forward.per_pair


def test_memory_equals_that_counted_by_hand(path, tmp_path):
    model, plan = scoring(path, tmp_path)
    count = sum(parameter.numel() for parameter in model.parameters())
    layer = 4 * 30 * (10 * 128 + 5 * 256)
    logits = 4 * 15 * 500
    assert plan.peak * GIB == pytest.approx(4 * count + layer + logits)
    _, whole = scoring(path, tmp_path, fused=False)
    assert whole.peak * GIB == pytest.approx(4 * count + layer + 30 * 500 * (4 + 4))


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 4), (2, 4), (3, 2 / 4)])
def test_only_zero3_shards_the_weights_that_score(path, tmp_path, stage, bytes_each):
    layout = MemoryLayout(4, stage, False, False, 2 if stage else 4, "cpu")
    model, plan = scoring(path, tmp_path, layout=layout)
    count = sum(parameter.numel() for parameter in model.parameters())
    others = 4 * 30 * (10 * 128 + 5 * 256) + 4 * 15 * 500
    assert plan.peak * GIB == pytest.approx(bytes_each * count + others)
