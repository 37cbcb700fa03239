"""The fused head in real model classes: loss and gradients match those from the model's own logits."""

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
    config_settings = settings if model_type == "gpt2" else {**SMALL, **settings}
    config = transformers.AutoConfig.for_model(model_type, **config_settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs of three rows, the last with padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 8:] = 0
    labels = ids.masked_fill((torch.rand(ids.shape, generator=generator) < 0.4) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def inspect(model: nn.Module, dtype=torch.float32) -> FusedHead | str:
    ids = torch.arange(3, 19).view(2, 8)
    return inspect_head(model, model, {"input_ids": ids}, dtype)


def compare(model: nn.Module, head: FusedHead, close: float = 1e-5) -> None:
    inputs, labels = batch()
    options = LossOptions(Dft(0.7), num_items=29)
    own = model(**inputs)
    expected, expected_stats = dft_loss(own.logits, labels, objective=Dft(0.7), num_items=29)
    expected_gradients = gradients(model, expected)
    loss, stats, outputs = head.score(model, inputs, labels, options)
    assert outputs.logits.shape == (3, 12, 1) and not outputs.logits.any()
    fused_gradients = gradients(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    torch.testing.assert_close(stats.nll, expected_stats.nll.to(stats.nll.dtype), rtol=close, atol=close)
    assert torch.equal(stats.correct, expected_stats.correct)
    assert fused_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (fused_gradients[name] - gradient).norm() <= close * gradient.norm() + 1e-9, name
    assert "forward" not in vars(head.module)
    assert torch.equal(model(**inputs).logits, own.logits), "the model has changed"


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_match_those_from_the_models_own_logits(name):
    model_type, settings, (scale, softcap) = FAMILIES[name]
    model = make(model_type, settings)
    head = inspect(model)
    assert isinstance(head, FusedHead), head
    assert head.transform.scale == pytest.approx(scale, rel=1e-7)
    assert head.transform.softcap == (softcap and pytest.approx(softcap, rel=1e-7))
    compare(model, head)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.bfloat16, None)])
def test_other_dtypes(dtype, close):
    model = make("qwen3", {}, dtype)
    head = inspect(model, dtype)
    assert isinstance(head, FusedHead)
    if close:
        compare(model, head, close)
        return
    # bfloat16 logits are rounded coarsely: the fused loss is closer to that of float64 logits.
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
    head = inspect(model.eval())
    compare(model.train(), head)
    model.lm_head.weight.requires_grad_(False)
    compare(model, head)


class ModelWithTransform(transformers.Qwen3ForCausalLM):
    """A model that transforms its logits in a way that no setting of its configuration shows."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change = change

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def transformed(change) -> ModelWithTransform:
    torch.manual_seed(0)
    return ModelWithTransform(transformers.Qwen3Config(**SMALL), change).eval()


UNKNOWN = "it transforms its logits by more than a scale and a soft cap"
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
def test_heads_with_unknown_transforms_are_not_fused(name):
    change, reason = CHANGES[name]
    message = inspect(transformed(change))
    assert isinstance(message, str)
    assert re.match(reason, message), message


def test_scale_and_soft_cap_are_detected_without_the_configuration():
    head = inspect(transformed(lambda z: 7 * torch.tanh(z * 0.3 / 7)))
    assert head.transform.scale == pytest.approx(0.3, rel=1e-6)
    assert head.transform.softcap == pytest.approx(7)
    model = transformed(lambda z: 7 * torch.tanh(z * 0.3 / 7))
    compare(model, inspect(model))


@pytest.mark.parametrize("kind", ["bias", "scale"])
def test_a_trainable_parameter_after_the_head_prevents_fusing(kind):
    """A bias of zeros and a scale of one do not change the logits during the inspection."""
    parameter = nn.Parameter(torch.zeros(VOCAB) if kind == "bias" else torch.ones(()))
    model = transformed(lambda z: z + parameter if kind == "bias" else z * parameter)
    assert inspect(model) == "it has trainable parameters after its output embedding"
    assert torch.is_grad_enabled()
    parameter.requires_grad_(False)
    frozen = inspect(model)
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


class Alias(torch.autograd.Function):
    """Returns a new tensor with the memory of its input, as ZeRO-3 does with the output of each module."""

    @staticmethod
    def forward(ctx, output):
        return output.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_wrapped_linear_layer_whose_output_is_replaced_by_an_alias_is_fused():
    model = make("qwen3", {})
    model.lm_head = nn.Sequential(model.lm_head)
    for module in model.lm_head.modules():
        module.register_forward_hook(lambda _module, _inputs, output: Alias.apply(output))
    compare(model, inspect(model))


def test_heads_that_are_not_a_plain_linear_layer_are_not_fused():
    torch.manual_seed(0)
    assert "but its output embedding returned" in inspect(Twice(transformers.Qwen3Config(**SMALL)).eval())
    model = make("qwen3", {})
    model.lm_head = Slow(16, VOCAB)
    assert inspect(model).endswith("test_head.Slow that does more than a single plain nn.Linear")
    model = make("qwen3", {})
    model.lm_head = nn.Sequential(model.lm_head, nn.Identity())  # returns its output unchanged
    compare(model, inspect(model))
    model.lm_head = nn.Sequential(model.lm_head[0], nn.Dropout(0.0), nn.Hardtanh(-1e9, 1e9))
    assert inspect(model).endswith("Sequential that does more than a single plain nn.Linear")
    model = make("qwen3", {})
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    assert inspect(model) == "the forward of its output embedding has been replaced"
    model.get_output_embeddings = lambda: None
    assert inspect(model) == "Qwen3ForCausalLM has no output embedding"
    assert inspect(nn.Linear(2, 2)) == "Linear has no output embedding"


def test_an_error_in_the_loss_restores_the_model():
    model = make("qwen3", {})
    head = inspect(model)
    inputs, labels = batch()
    with pytest.raises(ValueError, match="hidden must be"):
        head.score(model, inputs, labels[:, :-1], LossOptions())
    assert "forward" not in vars(model.lm_head)
    compare(model, head)


def test_large_logits_are_fused_despite_their_rounding_error():
    """The bfloat16 logits of this model are rounded to steps of 1 at 200, unlike those of the fused loss."""
    model = make("phi", {"num_key_value_heads": 2}, torch.bfloat16)
    with torch.no_grad():
        model.lm_head.bias -= 200
        model.lm_head.weight *= 4
    assert isinstance(inspect(model, torch.bfloat16), FusedHead)


def test_a_head_that_is_no_longer_called_raises():
    model = make("qwen3", {})
    head = inspect(model)
    model.lm_head = nn.Linear(16, VOCAB, bias=False)
    inputs, labels = batch()
    with pytest.raises(RuntimeError, match=r"Linear \(61, 16\), the output embedding when training began"):
        head.score(model, inputs, labels, LossOptions())


def test_an_error_after_the_head_releases_the_loss_and_restores_the_model():
    model = make("qwen3", {})
    head = inspect(model)
    inputs, labels = batch()

    def failing(**kwargs):
        model(**kwargs)
        raise MemoryError

    with pytest.raises(MemoryError):
        head.score(failing, inputs, labels, LossOptions())
    assert head._result is None and "forward" not in vars(model.lm_head)
