"""The fused head in a model sharded by FSDP2 over two processes, against the unsharded model."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from dft.loss.dft import dft_loss
from dft.loss.head import FusedHead, inspect_head
from dft.loss.objectives import Dft
from dft.loss.options import LossOptions
from dft.ranks import exit_rank
from tests.launching import free_port

RANKS, VOCAB, TOKENS = 2, 61, 31


def make(tied: bool) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (4, 12), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)


def worker(rank: int, port: int, tied: bool, halves: bool, checkpointed: bool, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = make(tied)
    if checkpointed:
        model.gradient_checkpointing_enable()
        model.train()
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharding = {"mesh": init_device_mesh("cpu", (RANKS,)), **({"mp_policy": half} if halves else {})}
    for layer in model.model.layers:
        fully_shard(layer, **sharding)
    if not tied:
        fully_shard(model.lm_head, **sharding)
    fully_shard(model, **sharding)
    head = inspect_head(
        model, model, {"input_ids": torch.arange(16).view(2, 8)}, torch.bfloat16 if halves else torch.float32
    )
    assert isinstance(head, FusedHead), head
    ids, labels = batch()
    mine = slice(rank, None, RANKS)
    for _ in range(2):  # the second step must not depend on the first
        model.zero_grad()
        options = LossOptions(Dft(0.7), num_items=TOKENS)
        loss, _, _ = head.score(model, {"input_ids": ids[mine]}, labels[mine], options)
        (loss * RANKS).backward()  # FSDP averages over the ranks
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        results.put((total.item(), {name: gradient.numpy() for name, gradient in gradients.items()}))
    exit_rank()


@pytest.mark.parametrize(
    "tied, halves, checkpointed",
    [(False, False, False), (True, False, True), (False, True, False)],
    ids=["untied", "tied, checkpointed", "bfloat16"],
)
def test_fsdp2_gives_the_gradients_of_the_unsharded_model(tied, halves, checkpointed):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (free_port(), tied, halves, checkpointed, results)
    processes = mp.spawn(worker, arguments, nprocs=RANKS, join=False)
    deadline = time.monotonic() + 120
    while results.empty() and not processes.join(timeout=1):
        assert time.monotonic() < deadline, [process.kill() for process in processes.processes]
    total, gradients = results.get()  # before joining, or processes could block on a full pipe
    while not processes.join(timeout=1):
        assert time.monotonic() < deadline, [process.kill() for process in processes.processes]
    model, (ids, labels) = make(tied), batch()
    expected, _ = dft_loss(model(input_ids=ids).logits, labels, alpha=0.7, num_items=TOKENS)
    expected.backward()
    close = 3e-2 if halves else 1e-5
    assert total == pytest.approx(expected.item(), rel=close)
    parameters = dict(model.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, parameter in parameters.items():
        difference = torch.from_numpy(gradients[name]) - parameter.grad
        assert difference.norm() < close * parameter.grad.norm(), name
