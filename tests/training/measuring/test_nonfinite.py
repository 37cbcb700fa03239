"""Non-finite losses and gradients never reach the weights, and the message names their origin."""

import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from dft import DFTTrainer
from dft.errors import UserError
from dft.training.measuring.nonfinite import StepWatch, pass_on_nonfinite
from dft.training.run_options import RunOptions
from tests.training.test_trainer import conversations, tiny

POISON = 20
"""A token that occurs in a single conversation and is not used to inspect the model."""
STEPS = 6


class Rows(torch.utils.data.Dataset):
    """Conversations with origins, one of which may begin with `POISON`."""

    def __init__(self, count: int, poisoned: int | None) -> None:
        self.rows = [
            {name: [token + (token == POISON) for token in ids] for name, ids in row.items()}
            for row in conversations(count)
        ]
        if poisoned is not None:
            self.rows[poisoned]["input_ids"][0] = POISON

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], "origins": [(0, index + 1)]}


def poisoned_model(seed: int = 0):
    """Return a model in which the input embedding of `POISON` is NaN; the output embedding is separate."""
    model = tiny(seed)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = math.nan
    return model


def run(tmp_path, model, rows, on_nonfinite, fused_head="auto", **flags) -> DFTTrainer:
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", per_device_train_batch_size=1, gradient_accumulation_steps=2,
        **{
            "logging_steps": 1, "learning_rate": 1e-2, "max_steps": STEPS, "save_strategy": "no",
            "lr_scheduler_type": "constant", **flags,
        },
    )  # fmt: skip
    return DFTTrainer(
        model, arguments, train_dataset=rows, on_nonfinite=on_nonfinite, fused_head=fused_head,
        options=RunOptions(verify_save="False"),  # verification would find the NaN
    )  # fmt: skip


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_nonfinite_loss_stops_the_run_before_the_update(tmp_path, fused):
    """The seventh conversation is one of the two micro-batches of step 4."""
    model = poisoned_model()
    trainer = run(tmp_path, model, Rows(12, 6), "stop", fused)
    with pytest.raises(UserError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "step 4" in message and "the loss of file 0:7 on rank 0 is not finite" in message
    assert "file 0:8" not in message and "--on_nonfinite skip" in message
    clean = weights(model)
    clean["model.embed_tokens.weight"][POISON] = 0
    assert all(value.isfinite().all() for value in clean.values())
    assert trainer.state.global_step == 3


def test_a_skipped_step_leaves_weights_and_metrics_unchanged(tmp_path):
    """Step 4 affects neither the weights nor the metrics of other steps."""
    model = poisoned_model()
    trainer = run(tmp_path, model, Rows(12, 6), "skip")
    before: dict[int, dict] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before[state.global_step] = weights(model)

    trainer.add_callback(Watch())
    trainer.train()
    for name, value in before[3].items():
        assert torch.equal(value.nan_to_num(7), before[4][name].nan_to_num(7)), name
        assert name == "model.embed_tokens.weight" or value.isfinite().all()
    assert any(
        not torch.equal(value.nan_to_num(7), before[5][name].nan_to_num(7))
        for name, value in before[4].items()
    )
    records = [record for record in trainer.state.log_history if "grad_norm" in record]
    assert [math.isfinite(record["grad_norm"]) for record in records] == [True] * 3 + [False] + [True] * 2
    assert "nll" not in records[3]
    assert all(math.isfinite(record["nll"]) for record in records if record is not records[3])
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_a_skipped_step_is_excluded_from_its_logging_window(tmp_path):
    """With a learning rate of 0, all steps use the same model."""
    rows = Rows(12, 6)
    flags = {"learning_rate": 0.0, "logging_steps": STEPS}
    whole = run(tmp_path, poisoned_model(), rows, "skip", **flags)
    whole.train()
    rest = Rows(12, None)
    rest.rows = [row for index, row in enumerate(rows.rows) if index not in (6, 7)]
    other = run(
        tmp_path,
        poisoned_model(),
        rest,
        "stop",
        **{**flags, "max_steps": STEPS - 1, "logging_steps": STEPS - 1},
    )
    other.train()
    for name in ("loss", "nll", "avg_p_correct", "entropy", "effective_tokens"):
        assert whole.state.log_history[0][name] == pytest.approx(other.state.log_history[0][name], rel=1e-12)


def test_a_nonfinite_gradient_of_a_finite_loss_is_detected(tmp_path):
    model = tiny()
    calls = 0

    def spoil(gradient):
        nonlocal calls
        calls += 1
        return gradient * (math.inf if calls == 5 else 1)

    model.model.layers[0].mlp.up_proj.weight.register_hook(spoil)
    trainer = run(tmp_path, model, Rows(12, None), "stop")
    with pytest.raises(
        UserError, match=r"step 3: the gradient, though not the loss, of file 0:5, file 0:6 on rank 0"
    ):
        trainer.train()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_an_infinite_nll_with_weight_0_is_detected(tmp_path):
    """With p = 0, w * nll is NaN but w * (softmax - onehot) is a finite 0."""
    loss = torch.tensor(math.nan, requires_grad=True)
    pass_on_nonfinite(loss).backward()
    assert not loss.grad.isfinite()
    loss = torch.tensor(0.3, requires_grad=True)
    pass_on_nonfinite(loss).backward()
    assert loss.grad.item() == 1


def test_the_policy_does_not_affect_a_finite_run(tmp_path):
    final_weights = []
    for policy in ("stop", "skip"):
        model = tiny()
        run(tmp_path, model, Rows(12, None), policy).train()
        final_weights.append(weights(model))
    assert all(torch.equal(value, final_weights[1][name]) for name, value in final_weights[0].items())


def test_an_unknown_policy_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite 'go on': must be one of stop, skip"):
        run(tmp_path, tiny(), Rows(2, None), "go on")


def test_a_new_run_does_not_count_tokens_of_a_stopped_one(tmp_path):
    rows = Rows(12, 6)
    trainer = run(tmp_path, poisoned_model(), rows, "stop", logging_steps=4)
    with pytest.raises(UserError):
        trainer.train()
    trainer.train_dataset.rows[6] = trainer.train_dataset.rows[5]
    trainer.train()
    record = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    supervised = sum(label != -100 for row in rows.rows[:8] for label in row["labels"][1:])
    assert record["supervised_tokens"] == supervised and math.isfinite(record["nll"])


def test_too_many_consecutive_skips_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("dft.training.measuring.nonfinite.MAX_CONSECUTIVE_SKIPS", 3)
    rows = Rows(12, 0)
    rows.rows = [rows.rows[0]] * 12
    trainer = run(tmp_path, poisoned_model(), rows, "skip")
    with pytest.raises(UserError, match="step 4: .*and neither were the 3 steps before it"):
        trainer.train()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_steps_are_skipped_in_half_precision_on_a_cpu(tmp_path, precision):
    model = poisoned_model()
    run(tmp_path, model, Rows(12, 6), "skip", **{precision: True}).train()
    clean = weights(model)
    clean["model.embed_tokens.weight"][POISON] = 0
    assert all(value.isfinite().all() for value in clean.values())


def test_a_batch_of_a_custom_collator_is_reported_without_names():
    watch = StepWatch()
    watch.add(torch.tensor(math.nan), torch.tensor([math.nan]), {"origins": torch.zeros(1, 2)})
    assert str(watch.report(3, [])) == "the loss of conversations of unknown origin on rank 3"
