"""--freeze: which weights a pattern selects, and the gradients, memory and checkpoints of what is left."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from dft.errors import UserError
from dft.loss import linear
from dft.training.checkpoints.run_settings import FROZEN
from dft.training.memory.estimate import estimate_memory
from dft.training.model.freezing import describe_frozen, freeze_matching
from dft.training.model.loading import load_meta_model, load_model
from tests.training.model.loading_helpers import arguments, load
from tests.training.test_trainer import VOCAB, conversations, trainer


def deep(layers: int = 12, tied: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def frozen_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def test_a_pattern_selects_layers_by_whole_numbers():
    """As a regular expression, [0-7].* would select layers 10 and 11 as well."""
    model = deep()
    note = freeze_matching(model, ["model.layers.[0-7].*", "model.embed_tokens.weight"])
    layers = {int(found[1]) for name in frozen_names(model) if (found := re.search(r"layers\.(\d+)\.", name))}
    assert layers == set(range(8)) and "model.embed_tokens.weight" in frozen_names(model)
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    count = 8 * per_layer + VOCAB * 16
    total = sum(parameter.numel() for parameter in model.parameters())
    assert note == (
        "--freeze model.layers.[0-7].* model.embed_tokens.weight: "
        f"{count / 1e6:.2f} M parameters are frozen, {(total - count) / 1e6:.2f} M trained"
    )


@pytest.mark.parametrize("pattern", ["lm_head.*", "model.embed_tokens.*"])
def test_either_name_of_tied_embeddings_freezes_them(pattern):
    model = deep(1, tied=True)
    other = "model.embed_tokens.weight" if pattern == "lm_head.*" else "lm_head.weight"
    note = freeze_matching(model, [pattern])
    assert frozen_names(model) == {"model.embed_tokens.weight"}
    assert f"(including {other}, which shares its weight with a match)" in note


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layers.0"], "--freeze model.layers.0: matches no weight of the model; names are compared as "
         "a whole; did you mean 'model.layers.0.*'?"),
        (["lm_head.*", "model.norn.weight"], "--freeze model.norn.weight: matches no weight of the model; "
         "similar names: model.norm.weight, "),
        (["*"], "--freeze *: matches every weight of the model, so there is nothing to train"),
    ],
)  # fmt: skip
def test_a_pattern_that_selects_nothing_or_everything_is_an_error(patterns, message):
    with pytest.raises(UserError) as caught:
        freeze_matching(deep(1), patterns)
    assert message in str(caught.value)


def test_embeddings_of_added_tokens_cannot_be_frozen(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings, layers = (
        arguments(folder, "--freeze", name) for name in ("*embed_tokens*", "model.layers.*")
    )
    load_model(embeddings, tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|new|>"]}, replace_extra_special_tokens=False)
    load_model(layers, tokenizer)
    for load_or_plan in (load_model, load_meta_model):  # the plan of a run is refused like the run
        with pytest.raises(UserError) as caught:
            load_or_plan(embeddings, tokenizer)
        assert str(caught.value) == (
            "--freeze *embed_tokens*: <|new|> had to be added to the vocabulary, and frozen embeddings would "
            "leave theirs untrained; do not freeze the input and output embedding, or train without new "
            "tokens (--add_tokens, --chat_template)"
        )


@pytest.mark.parametrize(
    ("pattern", "flags", "needs_head"),
    [
        ("lm_head.*", {}, False),
        ("model.layers.0.*", {}, True),
        ("model.*", {}, True),
        ("model.embed_tokens.*", {"activation_checkpointing": True}, True),
        (
            "model.[el]*[s0].*",  # embeddings and layer 0
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            True,
        ),
    ],
)
def test_the_trained_weights_have_the_gradients_of_a_run_that_trains_all(
    tmp_path, monkeypatch, pattern, flags, needs_head
):
    needed, run_tiles = [], linear.run_tiles

    def watched(rows, head, targets, scale, options, needs, extras):
        needed.append(needs.weight)
        return run_tiles(rows, head, targets, scale, options, needs, extras)

    monkeypatch.setattr(linear, "run_tiles", watched)
    gradients = []
    for patterns in ([], [pattern]):
        model = deep(2)
        if patterns:
            freeze_matching(model, patterns)
        run = trainer(tmp_path, conversations(8), model=model, max_steps=1, **flags)
        seen = {}
        run._get_grad_norm = lambda model, grad_norm=None, seen=seen: seen.update(
            {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
        )
        needed.clear()
        run.train()
        gradients.append(seen)
    assert needed[-1] == needs_head
    everything, trained = gradients
    assert trained.keys() == everything.keys() - frozen_names(model) and trained
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_no_optimizer_changes_frozen_weights(tmp_path, optimizer):
    model = deep(2)
    freeze_matching(model, ["model.layers.0.*", "lm_head.*"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(tmp_path, conversations(8), model=model, max_steps=2, optim=optimizer, weight_decay=0.1)
    run.train()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == frozen_names(model)
    held = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert held == len(before) - len(unchanged)


def test_the_plan_counts_gradients_and_optimizer_states_of_trained_weights(folder):
    flags = arguments(folder, "--freeze", "model.layers.*")
    model = load_meta_model(flags)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained < sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(model, flags.training, tokens=8)
    assert estimate.gradients * 2**30 == pytest.approx(4 * trained)
    assert estimate.optimizer * 2**30 == pytest.approx(8 * trained)
    assert any("--freeze model.layers.*: " in note for note in flags.notes)
    assert frozen_names(load(folder, "--freeze", "model.layers.*")) == frozen_names(model)


def test_a_run_resumes_exactly_and_only_with_the_same_frozen_weights(tmp_path):
    def run(place, *patterns, **flags):
        model = deep(2)
        if patterns:
            freeze_matching(model, patterns)
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return trainer(tmp_path / place, conversations(16), model=model, **saving, **flags)

    whole = run("whole", "model.layers.0.*", "lm_head.*")
    whole.train()
    checkpoint = str(tmp_path / "whole/checkpoint-2")
    resumed = run("resumed", "lm_head.*", "model.layers.[0].*")
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
    for patterns, now in ((), "none"), (["lm_head.*"], "1 of 25 (lm_head.weight, ...; "):
        with pytest.raises(UserError) as caught:
            run("other", *patterns).train(resume_from_checkpoint=checkpoint)
        assert f"saved with {FROZEN} 12 of 25 (lm_head.weight, ...; " in str(caught.value)
        assert f"and this run has {FROZEN} {now}" in str(caught.value)
        assert "the state of the optimizer would not fit" in str(caught.value)


def test_the_saved_model_has_the_frozen_weights(tmp_path):
    model = deep(1)
    freeze_matching(model, ["model.layers.*"])
    run = trainer(tmp_path, conversations(8), model=model, max_steps=1)
    run.train()
    run.save_model()
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_different_frozen_sets_of_the_same_size_are_described_differently():
    descriptions = set()
    for layer in "01":
        model = deep(2)
        freeze_matching(model, [f"model.layers.{layer}.mlp.*"])
        descriptions.add(describe_frozen(model))
    assert len(descriptions) == 2 and describe_frozen(deep(1)) == "none"
