"""The attention operator against attention written out with a softmax, sequence by sequence."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dft.training.attention import sequences
from dft.training.attention.sequences import sequence_attention

SCALE = 0.3
LENGTHS = [[1], [5, 1, 9], [150, 3, 150], [700]]
"""The longest sequences have several blocks of queries."""


def make_inputs(lengths, dtype, key_heads=2, with_sinks=False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), 4, 8), *[(sum(lengths), key_heads, 8)] * 2]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    tensors += [torch.randn(4, generator=generator, dtype=dtype)] if with_sinks else []
    return [tensor.requires_grad_() for tensor in tensors]


def attend(inputs, lengths, window=0, softcap=0.0) -> Tensor:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    sinks = inputs[3] if len(inputs) == 4 else None
    return sequence_attention(*inputs[:3], sinks, bounds, max(lengths), SCALE, window, softcap)[0]


def written_out(inputs, lengths, window=0, softcap=0.0) -> Tensor:
    outputs = []
    for query, key, value in zip(*(tensor.split(lengths) for tensor in inputs[:3]), strict=True):
        key, value = (tensor.repeat_interleave(4 // tensor.shape[1], 1) for tensor in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(len(query))[:, None] - torch.arange(len(query))
        hidden = (back < 0) | (back >= window) if window else back < 0
        scores = scores.masked_fill(hidden, -torch.inf)
        if len(inputs) == 4:
            scores = torch.cat([scores, inputs[3][:, None, None].expand(-1, len(query), 1)], dim=-1)
        shares = scores.softmax(-1)[..., : len(query)]
        outputs.append(torch.einsum("hqk,khd->qhd", shares, value))
    return torch.cat(outputs)


def relative_errors(inputs, lengths, **settings) -> list[float]:
    """Return the relative errors of the output and of the gradient of each input."""
    actual, expected = attend(inputs, lengths, **settings), written_out(inputs, lengths, **settings)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=actual.dtype)
    pairs = [(actual, expected)]
    gradients = (torch.autograd.grad(result, inputs, grad) for result in (actual, expected))
    pairs += zip(*gradients, strict=True)
    return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", [0, 2, 130])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
def test_output_and_gradients_are_those_of_attention_written_out(lengths, window, softcap, with_sinks):
    inputs = make_inputs(lengths, torch.float64, with_sinks=with_sinks)
    errors = relative_errors(inputs, lengths, window=window, softcap=softcap)
    # The first token of a sequence sees itself alone: its exact gradients are 0.
    assert max(errors if lengths != [1] or with_sinks else errors[:1]) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_other_dtypes_and_numbers_of_key_heads(dtype, bound, key_heads):
    lengths = [40, 3, 150]
    inputs = make_inputs(lengths, dtype, key_heads)
    grad = torch.ones(sum(lengths), 4, 8, dtype=dtype)
    gradients = torch.autograd.grad(attend(inputs, lengths), inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(written_out(exact, lengths), exact, grad.double())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient.double() - reference).norm() < bound * reference.norm()


def test_strided_inputs_and_empty_sequences():
    lengths = [4, 0, 6]
    inputs = make_inputs(lengths, torch.float64)
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    strided = [tensor.requires_grad_() for tensor in strided]
    actual, expected = attend(strided, lengths), attend(inputs, [4, 6])
    assert torch.equal(actual, expected)
    gradients = torch.autograd.grad(actual.sum(), strided)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("window", [0, 128])
def test_the_work_is_linear_in_the_tokens_of_short_sequences_and_of_windows(monkeypatch, window):
    """Counts the pairs of tokens that the kernel computes."""
    pairs = []
    original = sequences.choose_blocks

    def counting(scale, softcap):
        kernel = original(scale, softcap)

        class Counting:
            def forward(self, query, key, value, visible):
                pairs.append(query.shape[2] * key.shape[2])
                return kernel.forward(query, key, value, visible)

        return Counting()

    monkeypatch.setattr(sequences, "choose_blocks", counting)
    counts = []
    for factor in (1, 2, 4):
        lengths = [1024 * factor] if window else [64] * 16 * factor
        with torch.no_grad():
            attend(make_inputs(lengths, torch.float32), lengths, window=window)
        counts.append(sum(pairs))
        pairs.clear()
    assert counts[1] <= 2.2 * counts[0] and counts[2] <= 4.4 * counts[0]
    assert counts[0] <= 1024 * 64 if not window else counts[0] <= 1024 * 2 * window


@pytest.mark.parametrize("window", [0, 4096])
def test_stored_scores_are_of_512_queries_at_most(window):
    blocks = list(sequences._blocks([0, 5000, 5100], window, stores_scores=True))
    assert max(queries.stop - queries.start for queries, _, _ in blocks) == 512
    assert sum(queries.stop - queries.start for queries, _, _ in blocks) == 5100


def test_the_operator_passes_the_checks_of_torch():
    """Schema, autograd registration and the shapes used when tracing."""
    inputs = make_inputs([5, 7], torch.float64, with_sinks=True)
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs[:3]]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    for tensors in (inputs, [*(tensor.requires_grad_() for tensor in strided), None]):
        torch.library.opcheck(sequence_attention, (*tensors, bounds, 7, SCALE, 0, 0.0))


def test_other_lengths_and_numbers_of_sequences_are_not_compiled_again():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(query, key, value, bounds, longest):
        return 2 * sequence_attention(query, key, value, None, bounds, longest, SCALE, 0, 0.0)[0]

    graphs = None
    for lengths in ([5, 7], [3, 9, 4], [20, 2], [6]):
        inputs = make_inputs(lengths, torch.float64)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        actual, expected = compiled(*inputs, bounds, max(lengths)), 2 * written_out(inputs, lengths)
        torch.testing.assert_close(actual, expected)
        gradients = torch.autograd.grad(actual.sum(), inputs)
        for gradient, reference in zip(gradients, torch.autograd.grad(expected.sum(), inputs), strict=True):
            torch.testing.assert_close(gradient, reference)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, lengths
