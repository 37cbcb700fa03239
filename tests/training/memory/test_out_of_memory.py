"""Out-of-memory messages, and the smaller batch for the next attempt."""

import errno
import json

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from dft.arguments.batch_search import BATCH_FILE, load_batch, smaller_batch, store_smaller_batch
from dft.errors import EXIT_USER_ERROR, UserError
from dft.training.memory.estimate import estimate_activations
from dft.training.memory.out_of_memory import (
    MicroBatch,
    OutOfMemory,
    asked_for,
    convert_memory_errors,
    memory_advice,
    ran_out,
)

CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 33554432 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_WORDS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
)


def model(**sizes: int) -> Qwen3ForCausalLM:
    defaults = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**{**defaults, **heads, **sizes}))


def arguments(tmp_path, batch: int = 8, accumulation: int = 1, **more: object) -> TrainingArguments:
    return TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, **more,
    )  # fmt: skip


def test_errors_of_memory_are_recognized():
    assert ran_out(torch.OutOfMemoryError(CUDA_WORDS)) and ran_out(MemoryError())
    assert ran_out(RuntimeError(CPU_WORDS)) and ran_out(OSError(errno.ENOMEM, "no memory to fork"))
    assert not ran_out(OSError(errno.ENOSPC, "no space"))
    assert not ran_out(RuntimeError("size mismatch")) and not ran_out(ValueError("out of memory"))
    assert asked_for(RuntimeError(CPU_WORDS)) == "asked for 32 MiB"
    assert asked_for(torch.OutOfMemoryError(CUDA_WORDS)) == "asked for 2.50 GiB"


def test_failed_allocation_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)


def advise(model, args, last: MicroBatch, fused: bool = True) -> str:
    return memory_advice(model, args, last, fused, RuntimeError(CPU_WORDS), step=3)


def test_message_lists_parts_and_remedies_in_order_of_effect(tmp_path):
    message = advise(model(), arguments(tmp_path), MicroBatch(8, 8 * 512))
    assert message.startswith(
        "out of memory in step 3, training 8 x 512 tokens (asked for 32 MiB). By size, on"
    )
    for part in ("weights", "gradients", "optimizer", "activations", "loss"):
        assert f"{part} " in message
    checkpointing, batch = (
        message.index("--enable_gradient_checkpointing"),
        message.index("--per_device_train"),
    )
    assert checkpointing < batch and "--gradient_accumulation_steps 2, the same result" in message
    saved = [float(part.split()[1]) for part in message.split("(saves")[1:]]
    assert saved == sorted(saved, reverse=True) and len(saved) == 2
    assert "--fused_head" not in message and "zero3" not in message


def test_logits_come_first_if_they_are_largest(tmp_path):
    message = advise(model(vocab_size=100_000), arguments(tmp_path), MicroBatch(8, 8 * 512), fused=False)
    assert "1. --fused_head auto" in message and "logits" in message


def test_flags_already_set_are_not_advised(tmp_path):
    args = arguments(tmp_path, batch=1, gradient_checkpointing=True)
    message = advise(model(num_hidden_layers=8), args, MicroBatch(1, 4096))
    assert "gradient_checkpointing" not in message and "per_device" not in message
    assert "1. --max_length 2048 (saves" in message


def test_evaluation_is_advised_a_smaller_evaluation_batch(tmp_path):
    message = advise(model(vocab_size=100_000), arguments(tmp_path), MicroBatch(8, 4096, is_training=False))
    assert "evaluating 8 x 512" in message and "1. --per_device_eval_batch_size 4" in message
    assert "activations" not in message and "train_batch" not in message


def test_several_ranks_are_advised_to_shard(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = advise(model(vocab_size=100_000), args, MicroBatch(1, 16))
    assert "1. --deepspeed zero3" in message


@pytest.mark.parametrize("checkpointed", [True, False])
def test_activation_estimate_is_close_to_autograd_memory(tmp_path, checkpointed):
    args, network = arguments(tmp_path, gradient_checkpointing=checkpointed), model(num_hidden_layers=8)
    if checkpointed:
        network.gradient_checkpointing_enable()
    saved_bytes: dict[int, int] = {}

    def record_saved(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    network.train()
    with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
        output = network.model(torch.zeros(4, 256, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    measured = sum(size for address, size in saved_bytes.items() if address not in weights) / 2**30
    estimate = estimate_activations(network, args, 4, 1024)
    if checkpointed:  # the layer that is recomputed in the backward pass is not measured here
        estimate -= estimate_activations(model(num_hidden_layers=1), arguments(tmp_path), 4, 1024)
    assert estimate == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller"),
    [(8, 1, (4, 2)), (4, 2, (2, 4)), (3, 1, (1, 3)), (6, 1, (3, 2)), (2, 5, (1, 10)), (1, 8, None)],
)
def test_smaller_batch_keeps_the_rows_of_an_optimizer_step(tmp_path, batch, accumulation, smaller):
    assert smaller_batch(arguments(tmp_path, batch, accumulation)) == smaller


def test_smaller_batch_is_reused_for_the_same_request(tmp_path, monkeypatch):
    requested = (8, 2)
    assert load_batch(str(tmp_path), requested) is None
    assert store_smaller_batch(arguments(tmp_path, 8, 2), requested) == (4, 4)
    assert load_batch(str(tmp_path), requested) == (4, 4)
    assert store_smaller_batch(arguments(tmp_path, 4, 4), requested) == (2, 8)  # and again
    assert load_batch(str(tmp_path), requested) == (2, 8)
    assert load_batch(str(tmp_path), (8, 4)) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_batch(str(tmp_path), requested) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"found": [4]}',
        '{"asked": [8, 2, 1], "found": [4, 5]}',
        '{"asked": [8, 2, 1], "found": [0, 0]}',
    ],
)
def test_broken_batch_file_is_an_error(tmp_path, content):
    (tmp_path / BATCH_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{BATCH_FILE} .*remove it"):
        load_batch(str(tmp_path), (8, 2))


def test_nothing_is_written_without_a_smaller_batch(tmp_path):
    assert (
        store_smaller_batch(arguments(tmp_path, 1, 8), (1, 8)) is None
        and not (tmp_path / BATCH_FILE).exists()
    )
    assert (
        OutOfMemory("m", smaller=False).code == EXIT_USER_ERROR and OutOfMemory("m", smaller=True).code == 76
    )


def test_out_of_memory_before_training_is_one_error():
    with (
        pytest.raises(UserError, match=r"out of memory: the weights \(asked for 2.50 GiB\); shard"),
        convert_memory_errors("the weights", "shard"),
    ):
        raise torch.OutOfMemoryError(CUDA_WORDS)
    with pytest.raises(RuntimeError, match="else"), convert_memory_errors("the weights", "shard"):
        raise RuntimeError("something else")


def test_batch_file_is_readable_json(tmp_path):
    store_smaller_batch(arguments(tmp_path, 8, 2), (8, 2))
    assert json.loads((tmp_path / BATCH_FILE).read_text()) == {"asked": [8, 2, 1], "found": [4, 4]}
