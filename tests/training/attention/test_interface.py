"""Models with varlen attention have the loss and gradients of single sequences with their own attention."""

import pytest
import torch
import transformers

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.training.attention import interface
from dft.training.attention.choice import attention_of
from dft.training.attention.interface import VARLEN
from dft.training.batching import NON_MODEL_KEYS
from tests.combinations import proves
from tests.training.test_batching import (
    EXPERTS,
    GEMMA,
    MODELS,
    SHAPE,
    VOCAB,
    assert_equal_training,
    build_model,
    conversations,
    loss_and_gradients,
    pack,
)

NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_positions": 64}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
VARIANTS = {
    **MODELS,
    "gemma2, capped scores": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHAPE, **GEMMA, attn_logit_softcapping=2.0)
    ),
    "gpt-oss, sinks": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, **NO_DROPOUT)
    ),
    "deepseek v3, small values": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**SHAPE, "num_key_value_heads": 2, "head_dim": None}, **LATENT, v_head_dim=6,
            n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
            num_experts_per_tok=2, moe_intermediate_size=16,
        )
    ),
    "qwen3 moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS)),
}  # fmt: skip


WITHOUT_FLOAT64 = ("qwen3 moe", "gpt-oss, sinks", "deepseek v3, small values")


def build(name: str) -> transformers.PreTrainedModel:
    """Return a model in training mode with the attention that transformers chooses."""
    torch.manual_seed(0)
    model = VARIANTS[name]().train()
    model.config.use_cache = False
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            torch.nn.init.normal_(parameter)
    return model


def flattened_gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the cross-entropy of the labels of one row."""
    return torch.nn.functional.cross_entropy(
        logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100
    )


def model_inputs(collator, examples) -> dict[str, object]:
    return {name: value for name, value in collator(examples).items() if name not in NON_MODEL_KEYS}


def of_single_sequences(model, rows) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of rows that are neither padded nor packed."""
    loss = torch.zeros(())
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        loss = loss + nll(model(input_ids=ids).logits, labels)
    return loss.item(), flattened_gradient(loss, model)


def of_one_batch(model, rows, has_bounds: bool) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of rows that are concatenated, with varlen attention."""
    batch = FlatCollator()(rows)
    inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
    if not has_bounds:
        inputs = {key: inputs[key] for key in ("input_ids", "position_ids")}
    with attention_of(model, VARLEN):
        loss = nll(model(**inputs).logits, batch["labels"])
    return loss.item(), flattened_gradient(loss, model)


@pytest.mark.parametrize("has_bounds", [True, False], ids=["boundaries", "positions alone"])
@pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(WITHOUT_FLOAT64)))
def test_loss_and_gradients_equal_those_of_single_sequences(name, has_bounds):
    """In float32 to 1e-6, or to about the rounding of single sequences themselves; in float64 to 1e-12.

    Gemma computes parts in float32 in any case, which limits the comparison.
    """
    rows, model = conversations(8), build(name)
    single, flat = of_single_sequences(model, rows), of_one_batch(model, rows, has_bounds)
    model.double()
    exact, exact_flat = of_single_sequences(model, rows), of_one_batch(model, rows, has_bounds)
    bound = 1e-6 if "gemma" in name else 1e-12
    assert exact_flat[0] == pytest.approx(exact[0], rel=bound)
    assert (exact_flat[1] - exact[1]).norm() < bound * exact[1].norm()
    assert flat[0] == pytest.approx(exact[0], rel=1e-6)
    rounding = (single[1] - exact[1]).norm() / exact[1].norm()
    assert (flat[1] - exact[1]).norm() < max(1e-6, 1.5 * rounding) * exact[1].norm()


@pytest.mark.parametrize("has_bounds", [True, False], ids=["boundaries", "positions alone"])
@pytest.mark.parametrize("name", WITHOUT_FLOAT64)
def test_mixtures_of_experts_have_the_loss_and_gradients_of_single_sequences(name, has_bounds):
    """In float32 only, because torch cannot compute them in float64."""
    rows, model = conversations(8), build(name)
    single, flat = of_single_sequences(model, rows), of_one_batch(model, rows, has_bounds)
    assert flat[0] == pytest.approx(single[0], rel=1e-6)
    assert (flat[1] - single[1]).norm() < 1e-6 * single[1].norm()


@pytest.mark.parametrize("name", ["qwen3", "gemma3, window of 4"])
def test_no_mask_is_built_for_packed_and_unpacked_batches(monkeypatch, name):
    built = []
    monkeypatch.setattr(interface, "sdpa_mask", lambda *args, **kwargs: built.append(kwargs))
    model, rows = build(name), conversations(8)
    with attention_of(model, VARLEN):
        for examples in (rows, pack(rows, [3, 1, 2, 2])):
            assert model(**model_inputs(FlatCollator(), examples)).logits.shape[0] == 1
    assert not built


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator(0)], ids=["padded", "packed rows"])
@pytest.mark.parametrize("name", ["mistral, window of 4", "gemma2, capped scores", "gpt-oss, sinks"])
def test_batches_of_other_collators_have_the_logits_of_single_sequences(collator, name):
    model, rows = build(name).eval(), conversations(6)
    packed = isinstance(collator, PackedCollator)
    inputs = model_inputs(collator, pack(rows, [2, 1, 3]) if packed else rows)
    expected = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    with attention_of(model, VARLEN):
        actual = model(**inputs).logits
    real = inputs["input_ids"] > 0  # 0 is padding
    torch.testing.assert_close(actual[real], torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "mistral, window of 4", "gemma2, capped scores", "gpt-oss, sinks"])
def test_left_padded_prompts_generate_the_same_tokens(name):
    model = build(name).eval()
    ids = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :7] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "use_cache": True}
    expected = model.generate(ids, **settings)
    with attention_of(model, VARLEN):
        assert torch.equal(model.generate(ids, **settings), expected)


PACKED = [3, 1, 2, 2]
"""Numbers of conversations in a packed row."""


@pytest.mark.parametrize(
    ("packing", "checkpointing"),
    [
        pytest.param(
            packing,
            checkpointing,
            marks=proves({"packing": packing, "enable_gradient_checkpointing": checkpointing}),
        )
        for packing in (False, True)
        for checkpointing in (False, True)
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "gemma3, window of 4", "qwen3 moe"])
def test_the_trainer_takes_the_same_loss_and_gradients_as_with_padding(
    tmp_path, name, packing, checkpointing
):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, build_model(name), rows)
    model = build_model(name, VARLEN)
    if checkpointing:
        model.gradient_checkpointing_enable()
    actual = loss_and_gradients(tmp_path, model, pack(rows, PACKED) if packing else rows)
    assert (expected[2], actual[2]) == ("padded on the right", "padding-free")
    assert_equal_training(actual, expected)


OTHER = [
    {"attn_implementation": name, "packing": packing, "enable_gradient_checkpointing": checkpointing}
    for name in ("eager", "sdpa")
    for packing, checkpointing in ((False, False), (True, False), (True, True))
]


@pytest.mark.parametrize("flags", [pytest.param(flags, marks=proves(flags)) for flags in OTHER], ids=str)
def test_other_attention_takes_the_same_loss_and_gradients_of_packed_rows(tmp_path, flags):
    rows = conversations(8)
    expected = loss_and_gradients(tmp_path, build_model("qwen3", VARLEN), rows)
    model = build_model("qwen3", flags["attn_implementation"])
    if flags["enable_gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    actual = loss_and_gradients(tmp_path, model, pack(rows, PACKED) if flags["packing"] else rows)
    assert_equal_training(actual, expected)


def test_autocast_computes_attention_in_its_dtype():
    model, seen = build("qwen3"), []
    inputs = model_inputs(FlatCollator(), conversations(3))
    original = interface.sequence_attention
    with attention_of(model, VARLEN), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interface, "sequence_attention", lambda *args: seen.append(args[0].dtype) or original(*args)
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    assert seen == [torch.bfloat16] * 2


def test_dropout_and_position_biases_are_errors():
    query = torch.zeros(1, 2, 3, 4)
    module = torch.nn.Module()
    for arguments, words in ({"dropout": 0.1}, "dropout"), ({"position_bias": query}, "a position bias"):
        with pytest.raises(ValueError, match=f"does not support {words}.*; use attn_implementation='sdpa'"):
            interface.varlen_attention_forward(module, query, query, query, None, **arguments)


@pytest.mark.parametrize("value_size", [4, 8, 12])
def test_values_may_have_another_size_than_queries(value_size):
    query, key = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    value = torch.randn(1, 2, 5, value_size, dtype=torch.float64)
    actual, _ = interface.varlen_attention_forward(torch.nn.Module(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_a_saved_model_loads_without_this_package(tmp_path):
    model = build("qwen3")
    model.set_attn_implementation(VARLEN)
    model.save_pretrained(tmp_path)
    assert all(VARLEN not in file.read_text() for file in tmp_path.glob("*.json"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
