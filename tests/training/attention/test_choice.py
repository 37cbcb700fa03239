"""Which models run with varlen attention, and what a model that does not fit is answered."""

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.errors import UserError
from dft.training.attention import choice
from dft.training.attention.choice import largest_head, operator_error, varlen_obstacle
from dft.training.attention.interface import VARLEN
from dft.training.batching import check_isolation, choose_collator
from dft.training.model.attention import use_varlen_attention
from tests.training.model.loading_helpers import arguments, load
from tests.training.test_batching import (
    EXPERTS,
    MODELS,
    SHAPE,
    VOCAB,
    bloom,
    build_model,
    lfm2,
    llama4,
    mamba2,
)

CPU = torch.device("cpu")


def obstacle(model, dtype=torch.float32, device=CPU):
    return varlen_obstacle(model, dtype, device)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_plain_attention_fit(name):
    assert obstacle(build_model(name)) is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (bloom, "its attention cannot be replaced"),
        (mamba2, "layers that are not plain attention (linear_attention)"),
        (lfm2, "layers that are not plain attention (conv)"),
        (llama4, "its attention is chunked"),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)),
         "it has a dropout of 0.1 in its attention"),
        (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, attention_dropout=0.2)),
         "it has a dropout of 0.2 in its attention"),
    ],
)  # fmt: skip
def test_other_models_do_not(build, reason):
    assert reason in obstacle(build())


@pytest.mark.parametrize(
    ("dtype", "device", "settings", "reason"),
    [
        (torch.float32, "mps", {}, "no kernel for the device mps"),
        (torch.float32, "cuda", {}, "in bfloat16 or float16 only"),
        (torch.bfloat16, "cuda", {"head_dim": 320}, "its heads have 320 entries"),
        (torch.bfloat16, "cuda", {"attn_logit_softcapping": 50.0}, "caps the scores"),
    ],
)  # fmt: skip
def test_devices_without_a_kernel(dtype, device, settings, reason):
    model = build_model("qwen3")
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert reason in obstacle(model, dtype, torch.device(device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_is_exact_in_every_dtype_of_the_cpu(dtype):
    state = torch.get_rng_state()
    assert operator_error(4, 2, 8, dtype, CPU) < 10 * torch.finfo(dtype).eps
    assert torch.equal(torch.get_rng_state(), state)


def test_a_kernel_that_is_wrong_or_fails_is_an_obstacle(monkeypatch):
    original = choice.sequence_attention

    def without_boundaries(query, key, value, sinks, bounds, *settings):
        return original(query, key, value, sinks, bounds[[0, -1]], *settings)

    monkeypatch.setattr(choice, "sequence_attention", without_boundaries)
    assert "torch's kernel is not exact here: relative error" in obstacle(build_model("qwen3"))

    def failing(*tensors):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(choice, "sequence_attention", failing)
    reason = "torch's kernel does not run here: no kernel image is available"
    assert obstacle(build_model("qwen3")) == reason


def test_auto_selects_varlen_and_says_why_not(folder, monkeypatch):
    model = load(folder)
    assert model.config._attn_implementation == VARLEN
    assert isinstance(choose_collator(model, 0, packed=False), FlatCollator)
    monkeypatch.setattr("dft.training.model.attention.varlen_obstacle", lambda *args: "a reason")
    parsed = arguments(folder)
    model = build_model("qwen3")
    use_varlen_attention(model, parsed)
    use_varlen_attention(build_model("qwen3"), parsed)  # as for the base model of an objective
    assert parsed.notes == ["batches are padded, with sdpa attention: a reason"]
    assert isinstance(choose_collator(model, 0, packed=False), PaddedCollator)
    with pytest.raises(
        UserError, match="--attn_implementation varlen: Qwen3ForCausalLM: a reason; use --attn_"
    ):
        use_varlen_attention(build_model("qwen3"), arguments(folder, "--attn_implementation", VARLEN))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_other_attention_is_used_as_requested(folder, name):
    assert load(folder, "--attn_implementation", name).config._attn_implementation == name


def test_the_check_before_training_compares_with_the_attention_of_transformers(monkeypatch):
    """An operator that is wrong alike for one and for several sequences."""
    model = build_model("qwen3", VARLEN).eval()
    check_isolation(model, model, FlatCollator(), CPU, torch.float32)
    assert model.config._attn_implementation == VARLEN
    original = transformers.AttentionInterface._global_mapping[VARLEN]

    def unscaled(*tensors, scaling=None, **kwargs):
        return original(*tensors, scaling=1.0, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, VARLEN, unscaled)
    with pytest.raises(UserError, match="varlen attention .* use --attn_implementation sdpa"):
        check_isolation(model, model, FlatCollator(), CPU, torch.float32)


def roberta():
    """Return a causal model whose first position is `pad_token_id + 1`."""
    return transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, is_decoder=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).eval()  # fmt: skip


def recurrent_gemma():
    shape = {**SHAPE, "num_hidden_layers": 1}
    return transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(**shape, lru_width=16, block_types=["attention"])
    )


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (roberta, "its positions do not begin at 0"),
        (recurrent_gemma, "it carries a state from token to token"),
    ],
)
def test_models_that_cannot_keep_sequences_separate_are_padded_with_a_note(folder, build, reason):
    parsed, model = arguments(folder), build()
    use_varlen_attention(model, parsed)
    assert model.config._attn_implementation == "sdpa"
    assert parsed.notes[-1].startswith(f"batches are padded, with sdpa attention: {reason}")
    assert isinstance(choose_collator(model, 0, packed=False), PaddedCollator)
    with pytest.raises(UserError, match=f"cannot train on packed conversations: {reason}"):
        choose_collator(model, 0, packed=True)
    with pytest.raises(UserError, match=f"--attn_implementation varlen: {type(model).__name__}: {reason}"):
        use_varlen_attention(build(), arguments(folder, "--attn_implementation", VARLEN))


def test_the_check_before_training_compares_with_the_positions_that_the_model_gives_itself():
    model = roberta()
    for collator in FlatCollator(), PackedCollator(0):
        model.set_attn_implementation(VARLEN if isinstance(collator, FlatCollator) else "sdpa")
        with pytest.raises(UserError, match="does not keep packed conversations separate"):
            check_isolation(model, model, collator, CPU, torch.float32)


def qwen2_moe(window: int):
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SHAPE, **EXPERTS, shared_expert_intermediate_size=16, max_window_layers=2,
            use_sliding_window=bool(window), sliding_window=window,
        )
    ).eval()  # fmt: skip


def phimoe(window: int):
    return transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(**SHAPE, num_local_experts=2, sliding_window=window or None)
    ).eval()


@pytest.mark.parametrize("build", [qwen2_moe, phimoe])
def test_a_window_that_only_the_mask_implements_is_an_obstacle(build):
    assert obstacle(build(0)) is None
    model = build(100)
    assert obstacle(model) == "only its mask implements its sliding window"
    model.set_attn_implementation(VARLEN)
    with pytest.raises(
        UserError, match="do not pass their sliding window of 100 tokens to varlen attention; use --attn_imp"
    ):
        check_isolation(model, model, FlatCollator(), CPU, torch.float32)


def test_windows_that_layers_pass_on_or_do_not_use_are_no_error():
    full = transformers.Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["full_attention"] * 2)
    for model in build_model("gemma3, window of 4"), transformers.Gemma3ForCausalLM(full), qwen2_moe(0):
        model.eval().set_attn_implementation(VARLEN)
        before = [registry[VARLEN] for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
        check_isolation(model, model, FlatCollator(), CPU, torch.float32)
        after = [registry[VARLEN] for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
        assert before == after


def test_the_largest_head_of_all_layers_counts():
    gemma = transformers.Gemma4TextConfig(num_hidden_layers=2, head_dim=8, global_head_dim=320)
    assert largest_head(gemma) == 320
    assert largest_head(transformers.DeepseekV3Config()) == 192
    assert largest_head(transformers.GPT2Config(n_embd=32, n_head=4)) == 8
