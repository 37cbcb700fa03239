"""The fused head inside real model classes: loss and gradients are those of the model's own logits."""

import re

import pytest
import torch
import transformers
from torch import nn

from dft.loss.dft import dft_loss
from dft.loss.head import FusedHead, inspect_head
from dft.loss.objectives import Dft
from dft.loss.options import LossOptions

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "decoder_sparse_step": 1, "output_router_logits": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
# Name -> model type, settings, and (scale, softcap).
FAMILIES = {
    "llama": ("llama", {}, (1.0, None)),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, (1.0, None)),
    "qwen3": ("qwen3", {}, (1.0, None)),
    "gemma2 soft cap": ("gemma2", {"final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "gemma3": ("gemma3_text", {}, (1.0, None)),
    "cohere scale": ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
    "cohere2 scale": ("cohere2", {"logit_scale": 3.0}, (3.0, None)),
    "granite scaling": ("granite", {"logits_scaling": 6.0}, (1 / 6, None)),
    "granite moe": ("granitemoe", {**EXPERTS, "logits_scaling": 3.0}, (1 / 3, None)),
    "falcon-h1 multiplier": ("falcon_h1", {**MAMBA, "lm_head_multiplier": 0.0390625}, (0.0390625, None)),
    "minicpm3 scaling of hidden states": (
        "minicpm3", {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
                     "v_head_dim": 8, "dim_model_base": 8, "num_key_value_heads": 2}, (1.0, None),
    ),
    "phi with bias": ("phi", {"num_key_value_heads": 2}, (1.0, None)),
    "gpt2": ("gpt2", GPT2, (1.0, None)),
    "gpt-neox": ("gpt_neox", {}, (1.0, None)),
    "mamba": ("mamba", {"state_size": 4}, (1.0, None)),
    "mixtral": ("mixtral", EXPERTS, (1.0, None)),
    "qwen3 moe": ("qwen3_moe", EXPERTS, (1.0, None)),
}  # fmt: skip


def make(model_type: str, settings: dict, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    given = settings if model_type == "gpt2" else {**SMALL, **settings}
    config = transformers.AutoConfig.for_model(model_type, **given)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of three rows, the last one with padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0
    labels = ids.masked_fill((torch.rand(ids.shape, generator=generator) < 0.4) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def inspected(model: nn.Module, dtype=torch.float32) -> FusedHead | str:
    ids = torch.arange(3, 19).view(2, 8)
    return inspect_head(model, model, {"input_ids": ids}, dtype)


def compare(model: nn.Module, head: FusedHead, close: float = 1e-5) -> None:
    inputs, labels = batch()
    how = {"objective": Dft(0.7), "num_items": 29}
    own = model(**inputs)
    expected, expected_stats = dft_loss(own.logits, labels, **how)
    wanted = gradients(model, expected)
    loss, stats, outputs = head.score(model, inputs, labels, LossOptions(**how))
    assert outputs.logits.shape == (3, 12, 1) and not outputs.logits.any()
    found = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    torch.testing.assert_close(stats.nll, expected_stats.nll.to(stats.nll.dtype), rtol=close, atol=close)
    assert torch.equal(stats.correct, expected_stats.correct)
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= close * one.norm() + 1e-9, name
    assert "forward" not in vars(head.module)
    assert torch.equal(model(**inputs).logits, own.logits), "the model is as it was"


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name):
    model_type, settings, (scale, softcap) = FAMILIES[name]
    model = make(model_type, settings)
    head = inspected(model)
    assert isinstance(head, FusedHead), head
    assert head.transform.scale == pytest.approx(scale, rel=1e-7)
    assert head.transform.softcap == (softcap and pytest.approx(softcap, rel=1e-7))
    compare(model, head)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.bfloat16, None)])
def test_other_precisions(dtype, close):
    model = make("qwen3", {}, dtype)
    head = inspected(model, dtype)
    assert isinstance(head, FusedHead)
    if close:
        compare(model, head, close)
        return
    # Logits in bfloat16 are what is coarse here: the fused loss is nearer to that of a wide model.
    inputs, labels = batch()
    _, stats, _ = head.score(model, inputs, labels, LossOptions())
    _, rounded = dft_loss(model(**inputs).logits, labels)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state
        _, exact = dft_loss(hidden.double() @ model.lm_head.weight.double().t(), labels)
    assert (stats.nll - exact.nll).abs().max() < (rounded.nll - exact.nll).abs().max() / 50


def test_gradient_checkpointing_and_frozen_weights():
    model = make("qwen3", {})
    model.gradient_checkpointing_enable()
    model.train()
    head = inspected(model.eval())
    compare(model.train(), head)
    model.lm_head.weight.requires_grad_(False)
    compare(model, head)


class Odd(transformers.Qwen3ForCausalLM):
    """A model that does to its logits what no setting tells of."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change = change

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def odd(change) -> Odd:
    torch.manual_seed(0)
    return Odd(transformers.Qwen3Config(**SMALL), change).eval()


UNKNOWN = "it transforms its logits in another way than by a scale and a soft cap"
CHANGES = {
    "bias": (lambda z: z + torch.linspace(0, 1, z.shape[-1]), UNKNOWN),
    "power": (lambda z: z * z.abs(), UNKNOWN),
    "leaky": (lambda z: torch.nn.functional.leaky_relu(z, 0.1), UNKNOWN),
    "clamp": (lambda z: z.clamp(-20, 20), UNKNOWN),
    "normalized": (lambda z: z.log_softmax(-1) * 2, UNKNOWN),
    "masked": (lambda z: z.masked_fill(torch.arange(z.shape[-1]) > 50, -torch.inf), UNKNOWN),
    "cut": (lambda z: z[..., :50], r"its logits are \(2, 8, 50\) for \(2, 8\) tokens, but its output "),
    "shifted": (lambda z: z.roll(1, 1), UNKNOWN),
    "one token": (lambda z: z + 5.0 * (torch.arange(z.shape[-1]) == 5), UNKNOWN),
    "constant": (lambda z: torch.zeros_like(z), UNKNOWN),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_known_to_be_the_same_is_not_fused(name):
    change, reason = CHANGES[name]
    told = inspected(odd(change))
    assert isinstance(told, str)
    assert re.match(reason, told), told


def test_a_scale_and_a_cap_are_seen_wherever_they_come_from():
    head = inspected(odd(lambda z: 7 * torch.tanh(z * 0.3 / 7)))
    assert head.transform.scale == pytest.approx(0.3, rel=1e-6)
    assert head.transform.softcap == pytest.approx(7)
    model = odd(lambda z: 7 * torch.tanh(z * 0.3 / 7))
    compare(model, inspected(model))


@pytest.mark.parametrize("kind", ["bias", "scale"])
def test_a_parameter_behind_the_head_is_not_taken_for_a_constant(kind):
    """A bias of zeros, and a scale of one, change nothing when the model is looked at."""
    behind = nn.Parameter(torch.zeros(VOCAB) if kind == "bias" else torch.ones(()))
    model = odd(lambda z: z + behind if kind == "bias" else z * behind)
    assert inspected(model) == "it has trainable parameters after its output embedding"
    assert torch.is_grad_enabled()
    behind.requires_grad_(False)
    frozen = inspected(model)
    if kind == "bias":
        assert frozen == "its logits do not have the shape of the output of its output embedding"
    else:
        assert isinstance(frozen, FusedHead)


class Twice(transformers.Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.lm_head(torch.zeros(2, 8, 16))
        return output


class Slow(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden)


def test_heads_that_are_not_plain_are_not_fused():
    torch.manual_seed(0)
    assert "but its output embedding returned" in inspected(Twice(transformers.Qwen3Config(**SMALL)).eval())
    model = make("qwen3", {})
    model.lm_head = Slow(16, VOCAB)
    assert inspected(model).endswith("test_head.Slow that does more than a single plain nn.Linear")
    model = make("qwen3", {})
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())  # hands the output on: not a head of its own
    compare(model, inspected(model))
    model.lm_head = nn.Sequential(model.lm_head[0], nn.Dropout(0.0), nn.Hardtanh(-1e9, 1e9))
    assert inspected(model).endswith("Sequential that does more than a single plain nn.Linear")
    model = make("qwen3", {})
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    assert inspected(model) == "the forward of its output embedding has been replaced"
    model.get_output_embeddings = lambda: None
    assert inspected(model) == "Qwen3ForCausalLM has no output embedding"
    assert inspected(nn.Linear(2, 2)) == "Linear has no output embedding"


def test_an_error_in_the_model_leaves_it_as_it_was():
    model = make("qwen3", {})
    head = inspected(model)
    inputs, labels = batch()
    with pytest.raises(ValueError, match="hidden must be"):
        head.score(model, inputs, labels[:, :-1], LossOptions())
    assert "forward" not in vars(model.lm_head)
    compare(model, head)


def test_large_logits_are_rounded_more_and_fused_all_the_same():
    """In bfloat16 the own logits of this model are the coarse ones: steps of 1 at 200."""
    model = make("phi", {"num_key_value_heads": 2}, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.bias -= 200
        model.lm_head.weight *= 4
    assert isinstance(inspected(model, torch.bfloat16), FusedHead)


def test_a_head_that_is_no_longer_called_is_told():
    model = make("qwen3", {})
    head = inspected(model)
    model.lm_head = nn.Linear(16, VOCAB, bias=False)
    inputs, labels = batch()
    with pytest.raises(RuntimeError, match=r"Linear \(61, 16\), the output embedding when training began"):
        head.score(model, inputs, labels, LossOptions())


def test_an_error_behind_the_head_holds_nothing():
    model = make("qwen3", {})
    head = inspected(model)
    inputs, labels = batch()

    def failing(**kwargs):
        model(**kwargs)
        raise MemoryError

    with pytest.raises(MemoryError):
        head.score(failing, inputs, labels, LossOptions())
    assert head._result is None and "forward" not in vars(model.lm_head)
