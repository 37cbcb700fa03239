"""Training arguments that depend on the model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dft.training.preparation import resolve_sharded_layers
from tests.families import make_family


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", ["LlamaDecoderLayer"]),
        ("qwen3_5", ["Qwen3_5DecoderLayer"]),
        (
            "gemma3",
            [
                "Gemma3DecoderLayer", "SiglipEncoderLayer", "SiglipMultiheadAttentionPoolingHead",
                "SiglipVisionEmbeddings",
            ],
        ),
    ],
)  # fmt: skip
def test_fsdp_shards_the_layers_that_the_model_has(tokenizer_folder, tmp_path, family, layers):
    model = AutoModelForCausalLM.from_pretrained(make_family(family, tokenizer_folder, tmp_path / family))
    assert resolve_sharded_layers(model, None) == layers


def test_layers_that_the_user_names_must_exist():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    assert resolve_sharded_layers(model, ["LlamaMLP"]) == ["LlamaMLP"]
    with pytest.raises(ValueError, match="names GPT2Block, and the model has no such layer"):
        resolve_sharded_layers(model, ["LlamaMLP", "GPT2Block"])
    model._no_split_modules = ["GPT2Block"]
    with pytest.raises(ValueError, match="does not know the decoder layers of LlamaForCausalLM"):
        resolve_sharded_layers(model, None)
