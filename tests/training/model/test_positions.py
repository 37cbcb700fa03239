"""Sequences longer than a model's position range, and rotary positions that depend on the batch."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from dft.data.batches.collator import PackedCollator, PaddedCollator
from dft.errors import UserError
from dft.training.model.positions import check_positions, position_notes, rope_types
from tests.training.test_batching import loss_and_gradients, pack

LIMIT = 16
VOCAB = 40


def rotary_model(rope_type: str) -> Qwen3ForCausalLM:
    """Return a tiny model whose rotary frequencies change beyond LIMIT tokens, except for type default."""
    parameters = {"rope_type": rope_type, "rope_theta": 1e4}
    if rope_type == "dynamic":
        parameters |= {"factor": 4.0}
    if rope_type == "longrope":
        parameters |= {
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0,
            "original_max_position_embeddings": LIMIT,
        }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2, rope_parameters=parameters, use_cache=False,
        max_position_embeddings=4 * LIMIT if rope_type == "longrope" else LIMIT, pad_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def conversations(*lengths: int) -> list[dict[str, list[int]]]:
    """Return conversations of the given lengths, all but the first tokens supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def nll_sums(model: Qwen3ForCausalLM, batches: list[dict]) -> list[float]:
    """Return the summed nll of each sequence of the batches, in order."""
    sums = []
    for batch in batches:
        inputs = {
            name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
        }
        logits = model.eval()(**inputs).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        numbers = batch["sequence_ids"][:, 1:].flatten()
        sums += [nll[numbers == number].sum().item() for number in range(int(numbers.max()) + 1)]
    return sums


def test_sequences_beyond_learned_positions_are_an_error():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    check_positions(model, 32, 64)
    with pytest.raises(
        UserError, match="--max_length 64: the longest sequence has 33 tokens.*use --max_length 32 or less"
    ):
        check_positions(model, 33, 64)


def test_sequences_beyond_rotary_positions_are_noted():
    model = rotary_model("default")
    check_positions(model, LIMIT + 1, 64)
    assert position_notes(model, LIMIT) == []
    (note,) = position_notes(model, LIMIT + 1)
    assert note == "the longest sequence has 17 tokens, more than the 16 of the model's config"


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_batch_dependent_rotary_positions_are_noted_if_a_sequence_crosses_the_limit(rope_type):
    model = rotary_model(rope_type)
    assert position_notes(model, LIMIT) == []
    note = position_notes(model, LIMIT + 1)[-1]
    assert f"rotary positions ({rope_type}) change for a whole micro-batch" in note
    assert "more than 16 tokens, and the longest has 17" in note and "--max_length 16 avoids this" in note


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("packed", [False, True])
def test_long_neighbors_change_a_short_sequence_exactly_when_it_is_noted(rope_type, packed):
    model = rotary_model(rope_type)
    for longest in (LIMIT, LIMIT + 8):
        rows = conversations(9, longest)
        collator = PackedCollator(0) if packed else PaddedCollator(0)
        alone, _ = nll_sums(model, [collator([row]) for row in rows])
        together, _ = nll_sums(model, [collator(pack(rows, [2]) if packed else rows)])
        is_noted = any("micro-batch" in note for note in position_notes(model, longest))
        assert (abs(together - alone) > 1e-3) == is_noted, (longest, alone, together)


def test_padding_of_packed_rows_does_not_count_as_a_long_sequence(tmp_path):
    rows = conversations(10, 10, 10, 10, 5)
    expected = loss_and_gradients(tmp_path, rotary_model("longrope"), rows)
    packed_rows = pack(rows, [4, 1])  # the second one gets 35 tokens of padding
    packed = loss_and_gradients(tmp_path, rotary_model("longrope"), packed_rows)
    assert packed[0] == pytest.approx(expected[0], rel=1e-5)


def test_layer_types_may_have_rotary_positions_of_their_own():
    parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    assert rope_types({"rope_parameters": parameters}) == {"dynamic", "default"}
    assert rope_types({}) == rope_types({"rope_parameters": None}) == set()
