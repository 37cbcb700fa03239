"""Embeddings of new tokens: their initial values, and training them next to adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.errors import UserError
from dft.loss.head import FusedHead, inspect_head, score_logits
from dft.loss.objectives import Dft
from dft.loss.options import LossOptions
from dft.training.memory.batch_tokens import full_rows
from dft.training.memory.plan import plan, requested_setting
from dft.training.model.loading import load_base_model, load_meta_model, load_model
from dft.training.model.new_tokens import mean_of_rows
from dft.training.parameters import GIB
from tests.families import make_family
from tests.training.model.loading_helpers import arguments

pytest.importorskip("peft")
TOKENS = ["<|a|>", "<|b|>"]
LORA = ("--lora_r", "4")
KINDS = {"tied": (True, 0), "tied, padded": (True, 64), "untied": (False, 0), "untied, padded": (False, 64)}
"""Kinds of embeddings: whether input and output share a weight, and how many rows no token uses."""


@pytest.fixture(params=KINDS)
def kind(request, folder):
    """A model with random unused embeddings, as its folder. Returns (tied, unused embeddings)."""
    tied, unused = KINDS[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model.resize_token_embeddings(model.config.vocab_size + unused, mean_resizing=False)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    return tied, unused


def larger_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": TOKENS}, replace_extra_special_tokens=False)
    return tokenizer


@pytest.mark.parametrize("flags", [(), LORA])
def test_new_rows_begin_as_the_mean_of_the_used_ones(folder, kind, flags):
    tied, unused = kind
    tokenizer, before = larger_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    used = len(tokenizer) - 2
    run = arguments(folder, *flags)
    model = load_model(run, tokenizer)
    assert run.new_tokens == TOKENS
    for module, other in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert len(module.weight) == used + max(unused, 2)
        mean = other.weight[:used].double().mean(0).float()
        assert torch.equal(module.weight[used : used + 2], mean.expand(2, -1))
        assert torch.equal(module.weight[:used], other.weight[:used])
        assert torch.equal(module.weight[used + 2 :], other.weight[used + 2 :])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_summed_in_parts_and_in_float64(dtype, monkeypatch):
    monkeypatch.setattr("dft.training.model.new_tokens.CHUNK", 7)
    weight = torch.randn(40, 3).to(dtype)
    rows = [*range(3, 20), 39]
    torch.testing.assert_close(mean_of_rows(weight, rows), weight[rows].double().mean(0), rtol=1e-14, atol=0)
    bias = torch.randn(40)
    torch.testing.assert_close(mean_of_rows(bias, rows), bias[rows].double().mean(), rtol=1e-14, atol=0)


def test_adapters_train_the_embeddings_and_the_fused_head_has_their_gradients(folder, kind):
    tied, _ = kind
    tokenizer = larger_tokenizer(folder)
    run = arguments(folder, *LORA)
    model = load_model(run, tokenizer).eval()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    whole = [name for name in trained if "lora" not in name]
    assert len(whole) == (1 if tied else 2) and all("modules_to_save" in name for name in whole)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trained.values():
            weight += 0.05 * torch.randn_like(weight)
    first, second = tokenizer.convert_tokens_to_ids(TOKENS)
    ids = torch.tensor([[first, 5, 6, second, 7], [8, second, first, 9, first]])
    head = inspect_head(model, model, {"input_ids": ids}, torch.float32)
    assert isinstance(head, FusedHead), head
    results = []
    for score in (head.score, score_logits):
        model.zero_grad()
        loss, _, _ = score(model, {"input_ids": ids}, ids, LossOptions(objective=Dft(0.7), num_items=8))
        loss.backward()
        results.append((loss.detach(), {name: weight.grad.clone() for name, weight in trained.items()}))
    (loss, gradients), (expected_loss, expected) = results
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(gradient / scale, expected[name] / scale, rtol=0, atol=1e-6)
    assert all(expected[name][[first, second]].abs().amax(1).min() > 0 for name in whole)


def test_the_plan_counts_the_embeddings_and_their_optimizer_state(folder, kind):
    tied, unused = kind
    tokenizer = larger_tokenizer(folder)
    parts, counts = [], []
    for more in (None, tokenizer):
        run = arguments(folder, *LORA)
        model = load_meta_model(run, more)
        parts.append(
            plan(model, run.training, requested_setting(model, run.training, 1), full_rows(8), True).parts
        )
        counts.append(sum(weight.numel() for weight in model.parameters()))
    rows = len(tokenizer) - 2 + max(unused, 2)
    count = rows * model.config.hidden_size * (1 if tied else 2)
    grown = (rows - (len(tokenizer) - 2 + unused)) * model.config.hidden_size * (1 if tied else 2)
    assert counts[1] - counts[0] == count + grown
    more = {name: (parts[1][name] - parts[0][name]) * GIB for name in ("weights", "gradients", "optimizer")}
    assert more == pytest.approx(
        {"weights": 4 * (count + grown), "gradients": 4 * count, "optimizer": 8 * count}
    )


def test_half_precision_embeddings_keep_their_dtype_in_the_plan(folder):
    """Adapters are float32, and embeddings have the dtype of the model."""
    tokenizer = larger_tokenizer(folder)
    run = arguments(folder, *LORA, "--torch_dtype", "bfloat16")
    model, loaded = load_meta_model(run, tokenizer), load_model(run, tokenizer)
    parts = plan(model, run.training, requested_setting(model, run.training, 1), full_rows(8), True).parts
    trained = [weight for weight in loaded.parameters() if weight.requires_grad]
    size = sum(weight.numel() * weight.element_size() for weight in trained)
    assert {weight.dtype for weight in trained} == {torch.float32, torch.bfloat16}
    assert parts["gradients"] * GIB == pytest.approx(size)
    assert parts["optimizer"] * GIB == pytest.approx(2 * size)


def test_a_tied_head_with_a_bias_is_refused(folder, monkeypatch):
    tokenizer = larger_tokenizer(folder)
    load = AutoModelForCausalLM.from_pretrained

    def with_bias(*args, **options):
        model, loading = load(*args, **options)
        model.lm_head.bias = torch.nn.Parameter(torch.arange(len(model.lm_head.weight), dtype=torch.float32))
        return model, loading

    monkeypatch.setattr("dft.training.model.loading.AutoModelForCausalLM.from_pretrained", with_bias)
    assert load_model(arguments(folder), tokenizer).lm_head.bias[-1] == (len(tokenizer) - 3) / 2
    with pytest.raises(UserError, match="--lora_r: .* peft cannot train an output embedding that has a bias"):
        load_model(arguments(folder, *LORA), tokenizer)


def test_a_tied_embedding_of_another_name_is_refused(tokenizer_folder, tmp_path):
    """peft ties only those that it knows by name."""
    folder = make_family("gpt2", tokenizer_folder, tmp_path / "gpt2")
    with pytest.raises(UserError, match="peft does not train the embeddings of this architecture"):
        load_model(arguments(folder, *LORA), larger_tokenizer(folder))


def test_the_base_model_of_an_objective_has_the_same_unused_rows(folder, kind):
    if not kind[1]:
        pytest.skip("the base model has no embeddings for the tokens")
    tokenizer = larger_tokenizer(folder)
    model = load_model(arguments(folder), tokenizer)
    base = load_base_model(arguments(folder, "--objective", "asft"), tokenizer)
    assert torch.equal(base.lm_head.weight, model.lm_head.weight)
    assert torch.equal(base.get_input_embeddings().weight, model.get_input_embeddings().weight)
