"""Training with adapters: the fused loss unless the head itself has an adapter."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model

from dft import DFTTrainer
from dft.errors import UserError
from dft.loss import tiles
from dft.loss.head import FusedHead
from tests.training.test_trainer import conversations, tiny

ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "attention": (LoraConfig(r=2, target_modules=ATTENTION), True),
    "head trained whole": (LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["lm_head"]), True),
    "head with an adapter": (LoraConfig(r=2, target_modules=[*ATTENTION, "lm_head"]), False),
    "head rescaled": (IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[]), False),
}


def train(tmp_path, adapter, fused_head: str):
    """Return (trainer, trained weights, (loss, grad_norm) of each step, nll after training)."""
    torch.manual_seed(3)
    model = get_peft_model(tiny(), adapter)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-1,
        lr_scheduler_type="constant", disable_tqdm=True, seed=5, max_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    rows = Dataset.from_list(conversations(16))
    run = DFTTrainer(
        model, arguments, alpha=0.6, fused_head=fused_head, train_dataset=rows, eval_dataset=rows
    )
    run.train()
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    records = [record for record in run.state.log_history if "grad_norm" in record]
    metrics = [(record["loss"], record["grad_norm"]) for record in records]
    return run, weights, metrics, run.evaluate()["eval_nll"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_fused_loss_with_adapters_equals_the_loss_from_logits(tmp_path, capsys, name):
    adapter, fused = ADAPTERS[name]
    _, expected_weights, expected_records, expected_nll = train(tmp_path, adapter, "off")
    capsys.readouterr()
    run, weights, records, nll = train(tmp_path, adapter, "auto")
    assert isinstance(run._run.loss.head, FusedHead) == fused
    note = "the loss is computed from whole logits: its output embedding is a peft."
    assert (note in capsys.readouterr().out) != fused
    assert len(records) == 4
    for record, expected in zip(records, expected_records, strict=True):
        assert record == pytest.approx(expected, rel=1e-4)
    assert nll == pytest.approx(expected_nll, rel=1e-5)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


def test_fused_head_on_is_an_error_if_the_head_has_an_adapter(tmp_path):
    with pytest.raises(
        UserError, match="--fused_head on: its output embedding is a peft.* use --fused_head auto"
    ):
        train(tmp_path, ADAPTERS["head with an adapter"][0], "on")


def test_frozen_head_computes_no_weight_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "accumulated", lambda *a, **k: pytest.fail("gradient of a frozen weight"))
    train(tmp_path, ADAPTERS["attention"][0], "on")
