"""The auxiliary loss of a mixture of experts, compared with that of the model's own forward."""

import pytest
import torch
import transformers
from datasets import Dataset

from dft import DFTTrainer
from tests.training.test_trainer import VOCAB, conversations, tiny

COEFFICIENT = 0.5
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "pad_token_id": 0,
    "output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "router_jitter_noise": 0.0,
}  # fmt: skip


SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "output_router_logits": True}
OTHERS = {
    "jetmoe": {
        **SIZES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": COEFFICIENT,
    },
    "dbrx": {
        **SIZES, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "use_cache": False,
        "ffn_config": {
            "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": COEFFICIENT,
        },
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
    },
}  # fmt: skip
"""Model families with a different name for the coefficient."""


def make(model_type: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **OTHERS.get(model_type, CONFIG))
    return transformers.AutoModelForCausalLM.from_config(config)


def trainer(tmp_path, model, rows, fused_head="on", **flags) -> DFTTrainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        disable_tqdm=True, seed=5, max_grad_norm=0, lr_scheduler_type="constant", **flags,
    )  # fmt: skip
    return DFTTrainer(model, arguments, alpha=0, fused_head=fused_head, train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("fused_head", ["on", "off"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe", "jetmoe", "dbrx"])
def test_loss_and_gradients_match_the_models_own_forward(tmp_path, model_type, fused_head):
    rows, model = conversations(6), make(model_type)
    run = trainer(tmp_path, model, rows, fused_head)
    batch = run.data_collator(rows)
    count = (batch["labels"] != -100).sum()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    own = model(**inputs)
    own.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    run.is_in_train = True
    loss = run.compute_loss(model, batch, num_items_in_batch=count)
    loss.backward()
    assert own.aux_loss > 0 and loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name


def test_auxiliary_losses_of_micro_batches_are_weighted_by_tokens(tmp_path):
    rows = conversations(8)
    run = trainer(
        tmp_path,
        make("mixtral"),
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    model, parts = make("mixtral"), []
    compute_loss = run.compute_loss

    def recording_compute_loss(model, inputs, **kwargs):
        parts.append(inputs)
        return compute_loss(model, inputs, **kwargs)

    run.compute_loss = recording_compute_loss
    run.train()
    (record,) = [entry for entry in run.state.log_history if "grad_norm" in entry]
    assert len(parts) == 4
    total = sum(len(part["loss_positions"]) for part in parts)
    expected = 0.0
    with torch.no_grad():
        for part in parts:
            output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            expected += output.aux_loss.item() * len(part["loss_positions"]) / total
    assert record["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert record["loss"] == pytest.approx(record["nll"], rel=1e-6), "the loss is that of the tokens alone"


def test_a_router_loss_without_coefficient_is_rejected(tmp_path):
    model = tiny()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits.* add 'router_aux_loss_coef'"):
        trainer(tmp_path, model, conversations(2))
