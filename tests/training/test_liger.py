"""Liger kernels for the layers but not for the loss, in a separate process because Liger patches classes."""

import os
import subprocess
import sys

import pytest
import transformers

from dft import DFTTrainer
from dft.arguments.loss_settings import layer_kernels
from tests.launching import ROOT
from tests.training.test_trainer import tiny

SCRIPT = """
import sys
import torch, transformers
from datasets import Dataset
from dft import DFTTrainer
from tests.training.test_trainer import tiny

cross_entropy, model = torch.nn.functional.cross_entropy, tiny()
forward = model.forward
arguments = transformers.TrainingArguments(output_dir=sys.argv[1], use_cpu=True, use_liger_kernel=True)
rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
run = DFTTrainer(model, arguments, train_dataset=rows)
output = transformers.trainer_utils.TrainOutput(0, 0.0, {"train_loss": 0.0})
run._inner_training_loop = lambda *args, **kwargs: output  # its kernels cannot run here
run.train()
print("Liger" in repr(model.model.norm), "Liger" in repr(model.model.layers[0].mlp))
print(model.forward == forward, torch.nn.functional.cross_entropy is cross_entropy)
"""


def test_layers_use_liger_kernels_and_the_loss_does_not(tmp_path):
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["True True", "True True"], done.stdout


@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "cross_entropy"])
def test_liger_losses_are_rejected(tmp_path, name):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config={name: True}
    )
    with pytest.raises(ValueError, match=f"'{name}' replaces the loss of the model"):
        DFTTrainer(tiny(), arguments)


def test_other_kernel_settings_are_preserved():
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert layer_kernels(None) == off
    assert layer_kernels({"rope": False, "cross_entropy": False}) == {"rope": False, **off}
