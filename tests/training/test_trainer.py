"""DFTTrainer in one process: metrics compared with a recomputation, rejected arguments, and saving."""

import math

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dft import DFTTrainer
from dft.arguments.intervals import interval
from dft.errors import UserError
from dft.training.batching import sequence_lengths
from dft.training.memory.out_of_memory import OutOfMemory

VOCAB = 40


def tiny(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, use_cache=True,
        )
    )  # fmt: skip


def conversations(count: int, seed: int = 1) -> list[dict[str, list[int]]]:
    """Return sequences of 3 to 12 tokens whose last tokens are supervised; the first one never is."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def trainer(
    tmp_path, rows, *, alpha: float = 0.6, model=None, evaluation=None, options=None, **flags
) -> DFTTrainer:
    flags = {"logging_steps": 1, "save_strategy": "no", **flags}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant",
        disable_tqdm=True, seed=5, **flags,
    )  # fmt: skip
    return DFTTrainer(
        model or tiny(), arguments, alpha=alpha, train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(evaluation) if evaluation else None, options=options,
    )  # fmt: skip


def recomputed(model, rows, alpha: float) -> dict[str, float]:
    """Compute the metrics from float64 logits, sequence by sequence and without padding."""
    model = model.double().eval()
    nll, hits = [], 0
    for row in rows:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:]):
            if target != -100:
                nll.append(-logp[position, target].item())
                hits += int(logp[position].argmax()) == target
    count = len(nll)
    return {
        "loss": sum((alpha * math.exp(-value) + 1 - alpha) * value for value in nll) / count,
        "nll": sum(nll) / count,
        "avg_p_correct": sum(math.exp(-value) for value in nll) / count,
        "acc": hits / count,
        "objective": sum(alpha * (1 - math.exp(-value)) + (1 - alpha) * value for value in nll) / count,
    }


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_evaluation_metrics_are_token_weighted_for_every_batch_size(tmp_path, batch):
    """With 13 sequences, the last batch of 4 holds one sequence and blanks, which must not count."""
    rows, model = conversations(13), tiny()
    expected = recomputed(tiny(), rows, 0.6)
    metrics = trainer(
        tmp_path, rows, model=model, evaluation=rows, per_device_eval_batch_size=batch
    ).evaluate()
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_training_metrics_are_computed_before_the_update(tmp_path):
    rows = conversations(8)
    run = trainer(tmp_path, rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    expected = recomputed(tiny(), rows, 0.6)
    run.train()
    record = run.state.log_history[0]
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-5), name
    assert record["dft_alpha"] == 0.6 and record["tokens_per_second"] > 0


def test_metrics_of_a_logging_window_are_token_weighted(tmp_path):
    """With a learning rate of 0 the model is constant, so a window is a mean over its tokens."""
    rows = conversations(12)
    flags = {
        "learning_rate": 0.0,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 3,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **flags
    )
    run = DFTTrainer(tiny(), arguments, alpha=0.6, train_dataset=Dataset.from_list(rows))
    run.train()
    expected = recomputed(tiny(), rows, 0.6)
    for name, value in expected.items():
        assert run.state.log_history[0][name] == pytest.approx(value, rel=1e-5), name


def test_no_example_is_repeated_in_the_last_step_of_an_epoch(tmp_path):
    """With 5 examples in batches of 4, the second step contains only the fifth example."""
    rows = conversations(5)
    run = trainer(
        tmp_path,
        rows,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
    )
    run.args.learning_rate = 0.0
    run.train()
    assert run.state.log_history[1]["nll"] == pytest.approx(
        recomputed(tiny(), rows[4:], 0.6)["nll"], rel=1e-5
    )


def test_micro_batches_without_supervised_tokens_have_no_effect(tmp_path):
    rows = conversations(6)
    unsupervised = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    flags = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "per_device_train_batch_size": 2}
    plain = trainer(tmp_path, rows, gradient_accumulation_steps=3, **flags)
    mixed = trainer(
        tmp_path, rows[:2] + [unsupervised] * 2 + rows[2:], gradient_accumulation_steps=4, **flags
    )
    plain.train()
    mixed.train()
    for name in ("loss", "nll", "grad_norm"):
        assert mixed.state.log_history[0][name] == pytest.approx(plain.state.log_history[0][name], rel=1e-6)


def test_alpha_0_matches_transformers_trainer(tmp_path):
    """SFT matches transformers' own loss and token counting at every step."""
    rows = conversations(16)
    flags = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    ours = trainer(tmp_path, rows, alpha=0.0, train_sampling_strategy="sequential", **flags)
    plain = transformers.Trainer(
        tiny(), ours.args, train_dataset=Dataset.from_list(rows), data_collator=ours.data_collator
    )
    ours.train()
    plain.train()
    for mine, theirs in zip(ours.state.log_history, plain.state.log_history, strict=True):
        if "grad_norm" in theirs:
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert mine["nll"] == pytest.approx(theirs["loss"], rel=1e-5)
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_only_saved_steps_can_be_the_best_checkpoint(tmp_path):
    """Evaluations at steps 1 to 4, saves at 2 and 4: the largest value, at step 1, has no checkpoint."""
    rows = conversations(16)
    run = trainer(
        tmp_path, rows, evaluation=rows, per_device_train_batch_size=8, max_steps=4, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_nll", greater_is_better=True,
    )  # fmt: skip
    run.args.save_strategy = transformers.trainer_utils.SaveStrategy.STEPS
    run.args.save_steps = 2
    run.train()
    by_step = {entry["step"]: entry["eval_nll"] for entry in run.state.log_history if "eval_nll" in entry}
    assert by_step[1] > by_step[2] > by_step[4]
    assert run.state.best_metric == by_step[2]
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")


def test_a_resumed_run_uses_its_own_logging_evaluation_and_save_steps(tmp_path, caplog):
    """transformers would use the intervals of the run that wrote the checkpoint."""
    rows = conversations(8)
    often = {"save_strategy": "steps", "eval_strategy": "steps", "per_device_train_batch_size": 2}
    first = {"max_steps": 2, "save_steps": 2, "logging_steps": 2, "eval_steps": 2}
    trainer(tmp_path, rows, evaluation=rows[:2], **often, **first).train()
    then = {"max_steps": 5, "save_steps": 1, "logging_steps": 1, "eval_steps": 1}
    run = trainer(tmp_path, rows, evaluation=rows[:2], **often, **then)
    run.train(resume_from_checkpoint=True)
    log = [entry for entry in run.state.log_history if entry["step"] > 2]
    assert [entry["step"] for entry in log if "grad_norm" in entry] == [3, 4, 5]
    assert [entry["step"] for entry in log if "eval_nll" in entry] == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in range(2, 6)
    ]
    assert "do not match" not in caplog.text


def checkpoints(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("share", "steps", "every"), [(0.25, 12, 3), (0.1, 70, 7), (0.3, 10, 3), (0.01, 12, 1)]
)
def test_a_share_of_the_run_is_rounded_up_to_whole_steps(share, steps, every):
    assert interval(share, steps) == every


def test_saves_and_evaluations_by_share_are_at_that_share_of_the_steps(tmp_path):
    """The run is stopped at half and resumed, which must not change the steps of the rest."""
    rows = conversations(8)
    flags = {
        "max_steps": 12, "save_strategy": "steps", "save_steps": 0.25, "eval_strategy": "steps",
        "eval_steps": 0.25, "logging_steps": 0.5, "per_device_train_batch_size": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_nll",
    }  # fmt: skip

    class StopAtHalf(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6

    run = trainer(tmp_path, rows, evaluation=rows[:2], **flags)
    run.add_callback(StopAtHalf())
    run.train()
    assert checkpoints(tmp_path) == [3, 6]
    run = trainer(tmp_path, rows, evaluation=rows[:2], **flags)
    run.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == [3, 6, 9, 12]
    log = run.state.log_history
    assert [entry["step"] for entry in log if "eval_nll" in entry] == [3, 6, 9, 12]
    assert [entry["step"] for entry in log if "grad_norm" in entry] == [6, 12]


def test_the_saved_config_has_the_original_cache_setting(tmp_path):
    run = trainer(tmp_path, conversations(4), max_steps=1)
    run.train()
    run.save_model()
    assert run.model.config.use_cache is False
    assert transformers.AutoConfig.from_pretrained(tmp_path).use_cache is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor 0.1"),
        ({"average_tokens_across_devices": False}, "--average_tokens_across_devices False"),
        ({"train_sampling_strategy": "batch_rebalance"}, "--train_sampling_strategy batch_rebalance"),
    ],
)
def test_arguments_that_would_change_the_loss_are_rejected(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, conversations(2), **flags)


def test_an_invalid_padding_id_is_ignored(tmp_path):
    """Some configurations use -1 for none."""
    model = tiny()
    model.config.pad_token_id = -1
    rows = conversations(5)
    metrics = trainer(tmp_path, rows, model=model, evaluation=rows, per_device_eval_batch_size=4).evaluate()
    assert metrics["eval_nll"] == pytest.approx(recomputed(tiny(), rows, 0.6)["nll"], rel=1e-5)


def test_a_custom_loss_function_is_rejected(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="compute_loss_func would replace the DFT loss"):
        DFTTrainer(tiny(), arguments, compute_loss_func=lambda *_: torch.tensor(0.0))


def test_a_model_that_is_yet_to_be_created_is_rejected(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"model is None: .* pass model=model_init\(\)"):
        DFTTrainer(None, arguments, model_init=tiny)


@pytest.mark.parametrize("place", ["model", "model/run"])
def test_training_does_not_write_into_the_folder_of_the_model(tmp_path, place):
    tiny().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    run = trainer(tmp_path / place, conversations(2), model=model)
    with pytest.raises(UserError, match="is in the folder that the model was loaded from"):
        run.train()


def test_a_batch_without_labels_is_rejected(tmp_path):
    run = trainer(tmp_path, conversations(2))
    with pytest.raises(ValueError, match="no 'labels'"):
        run.compute_loss(run.model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


def test_lengths_of_arrow_datasets_equal_those_of_lists():
    rows = conversations(9)
    expected = [len(row["input_ids"]) for row in rows]
    dataset = Dataset.from_list(rows)
    assert sequence_lengths(dataset).tolist() == expected
    assert sequence_lengths(dataset.select([3, 1])).tolist() == [expected[3], expected[1]]
    assert sequence_lengths(rows).tolist() == expected


def dropout_model() -> Qwen3ForCausalLM:
    """Return a model whose training draws random numbers in every micro-batch."""
    model = tiny()
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


class OutOfMemoryOnce(DFTTrainer):
    """Runs out of memory in the second micro-batch of step 3, after dropout has drawn random numbers."""

    has_memory = False

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.micro_batches = getattr(self, "micro_batches", 0) + 1
        if not self.has_memory and self.micro_batches == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


def test_a_run_resumes_exactly_after_running_out_of_memory(tmp_path):
    def make(folder, kind=DFTTrainer):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), use_cpu=True, learning_rate=1e-2, disable_tqdm=True, seed=5,
            logging_steps=2, save_strategy="no", max_steps=5, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, max_grad_norm=0.5,
        )  # fmt: skip
        return kind(dropout_model(), arguments, train_dataset=Dataset.from_list(conversations(24)))

    whole = make("whole")
    whole.train()
    broken = make("broken", OutOfMemoryOnce)
    with pytest.raises(OutOfMemory, match="out of memory in step 3"):
        broken.train()
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    for expected, weight in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, weight)
    records = [record for record in whole.state.log_history if "nll" in record]
    assert [record["nll"] for record in resumed.state.log_history if "nll" in record] == [
        record["nll"] for record in records
    ]


def test_train_rejects_a_checkpoint_that_others_can_write(tmp_path):
    rows = conversations(8)
    trainer(tmp_path, rows, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").chmod(0o666)
    with pytest.raises(UserError, match="can be written by others"):
        trainer(tmp_path, rows, max_steps=2).train(resume_from_checkpoint=True)
