"""Training adapters: fused where the head is plain or trained whole, logits where it has an adapter."""

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


def trained(tmp_path, adapter, fused_head: str):
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
    weights = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    records = [record for record in run.state.log_history if "grad_norm" in record]
    return run, weights, [(one["loss"], one["grad_norm"]) for one in records], run.evaluate()["eval_nll"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_takes_the_steps_it_would_from_whole_logits(tmp_path, capsys, name):
    adapter, fused = ADAPTERS[name]
    _, wanted, expected, evaluated = trained(tmp_path, adapter, "off")
    capsys.readouterr()
    run, weights, records, found = trained(tmp_path, adapter, "auto")
    assert isinstance(run._head, FusedHead) == fused
    told = "the loss is computed from whole logits: its output embedding is a peft."
    assert (told in capsys.readouterr().out) != fused
    assert len(records) == 4
    for one, other in zip(records, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert found == pytest.approx(evaluated, rel=1e-5)
    for key, weight in wanted.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-3, atol=1e-5)


def test_a_head_with_an_adapter_is_refused_if_fusing_is_insisted_on(tmp_path):
    with pytest.raises(
        UserError, match="--fused_head on: its output embedding is a peft.* use --fused_head auto"
    ):
        trained(tmp_path, ADAPTERS["head with an adapter"][0], "on")


def test_a_frozen_head_costs_no_product_for_its_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "accumulated", lambda *a, **k: pytest.fail("gradient of a frozen weight"))
    trained(tmp_path, ADAPTERS["attention"][0], "on")
