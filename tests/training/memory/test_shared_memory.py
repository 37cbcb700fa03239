"""Batches of worker processes fit in shared memory, or the run is refused."""

import numpy as np
import pytest
import transformers
from torch import Tensor

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.errors import UserError
from dft.training.memory import shared_memory
from dft.training.memory.shared_memory import batch_bytes, check_shared_memory


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator(0), FlatCollator()])
def test_the_estimate_of_a_batch_is_no_less_than_its_size(collator):
    example = {
        "input_ids": np.zeros(500, dtype=np.int32),
        "labels": np.zeros(500, dtype=np.int32),
        "loss_weights": np.full(500, 0.5, dtype=np.float32),
        "origins": np.zeros((1, 2), dtype=np.int64),
    }
    batch = collator([example] * 4)
    size = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
    assert 0.7 * batch_bytes(4, 500) < size <= batch_bytes(4, 500)


def training(tmp_path, **options: int) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4, per_device_eval_batch_size=2, **options
    )


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun, DeepSpeed
def test_workers_without_enough_shared_memory_are_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setattr(shared_memory, "free_bytes", lambda folder: 2**20)
    monkeypatch.setenv(variable, "2")
    # 5 batches in advance for each of 2 ranks, of 4 rows of 44 bytes per token.
    check_shared_memory(training(tmp_path, dataloader_num_workers=2), 400)
    check_shared_memory(training(tmp_path), 10**6)
    with pytest.raises(UserError) as caught:
        check_shared_memory(training(tmp_path, dataloader_num_workers=2), 500)
    assert str(caught.value) == (
        "--dataloader_num_workers 2: up to 1.2 MiB of batches are loaded in advance (2 x 5 batches of 4 x "
        "500 tokens), but /dev/shm has 1.0 MiB free, and the run would wait for ever; start the container "
        "with --shm-size 8g or --ipc host, or pass --dataloader_num_workers 0"
    )
    with pytest.raises(UserError, match=r"\(2 x 9 batches of 4 x 400 tokens\)"):
        check_shared_memory(training(tmp_path, dataloader_num_workers=2, dataloader_prefetch_factor=4), 400)


def test_workers_without_any_shared_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "shm")
    with pytest.raises(UserError, match="has 0.0 MiB free"):
        check_shared_memory(training(tmp_path, dataloader_num_workers=1), 10)
