"""Compiled layers train alike, and are compiled once for training and once for evaluation."""

import pytest
import torch
import transformers
from datasets import Dataset

from dft import DFTTrainer
from tests.training.test_batching import build_model, conversations


class Graphs(transformers.TrainerCallback):
    """Records the number of compiled graphs after each evaluation."""

    def __init__(self) -> None:
        self.after_evaluation: list[int] = []

    def on_evaluate(self, *args, **kwargs) -> None:
        self.after_evaluation.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def train(tmp_path, name: str, attention: str, **flags) -> tuple[DFTTrainer, list[int]]:
    """Return the trainer and the number of compiled graphs after each evaluation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, logging_steps=1, save_strategy="no", learning_rate=1e-2,
        lr_scheduler_type="constant", disable_tqdm=True, per_device_train_batch_size=4, num_train_epochs=1,
        per_device_eval_batch_size=3, eval_strategy="steps", eval_steps=3, report_to="none", **flags,
    )  # fmt: skip
    datasets = {"train_dataset": conversations(24), "eval_dataset": conversations(10)}
    datasets = {key: Dataset.from_list(rows) for key, rows in datasets.items()}
    counts = Graphs()
    trainer = DFTTrainer(build_model(name, attention), arguments, alpha=0.6, callbacks=[counts], **datasets)
    trainer.train()
    return trainer, counts.after_evaluation


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param("qwen3", False, marks=pytest.mark.slow, id="qwen3"),
        pytest.param("qwen3", True, marks=pytest.mark.slow, id="qwen3, gradient checkpointing"),
        pytest.param("gemma3, window of 4", False, marks=pytest.mark.slow, id="gemma3"),
        pytest.param("gemma3, window of 4", True, id="gemma3, gradient checkpointing"),
    ],
)
def test_batches_of_other_lengths_are_not_compiled_again(tmp_path, name, checkpointing):
    """Six steps and two evaluations of batches that differ in their numbers of tokens."""
    flags = {"gradient_checkpointing": checkpointing}
    plain, _ = train(tmp_path, name, "varlen", **flags)
    compiled, graphs = train(
        tmp_path, name, "varlen", torch_compile=True, torch_compile_backend="aot_eager", **flags
    )
    assert len(graphs) == 2 and graphs[0] == graphs[1]
    # For training and for evaluation, of layers with and without a window, and with checkpointing once more,
    # because the input of the first layer then requires a gradient in evaluation as well.
    assert graphs[0] <= 4
    for record, expected in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        for metric in {"loss", "nll", "grad_norm", "eval_loss", "eval_nll"} & expected.keys():
            assert record[metric] == pytest.approx(expected[metric], rel=1e-4), metric


def test_a_model_without_layers_of_transformers_is_left_to_accelerate(tmp_path):
    torch._dynamo.reset()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, torch_compile=True, torch_compile_backend="aot_eager"
    )
    model = build_model("qwen3")
    model.model.layers = torch.nn.ModuleList()
    trainer = DFTTrainer(model, arguments, train_dataset=Dataset.from_list(conversations(2)))
    assert trainer.accelerator.state.dynamo_plugin.backend.value == "AOT_EAGER"
