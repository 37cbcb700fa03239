"""Token-weighted metrics, compared with a recomputation token by token in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dft import DFTTrainer, dft_loss
from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.loss.objectives import Dft
from dft.metrics import BINS
from dft.training.measuring import accumulator
from dft.training.measuring.meter import TokenMeter, short_names
from dft.training.measuring.scoring import EXAMPLE_TOKENS, scored_sequences
from tests.training.test_trainer import VOCAB, conversations, tiny

END = 7
FILES = ["data/a.jsonl", "data/b.jsonl", "none.jsonl"]


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows) -> None:
        self.rows, self.files = rows, FILES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], "origins": [(index % 2, index + 1)]}


def with_end_token(count: int) -> list[dict]:
    rows = conversations(count)
    for row in rows:
        row["input_ids"][-1] = row["labels"][-1] = END
    return rows


def tokens_of(model, rows, end: int = END) -> list[dict]:
    """Return every supervised token in order, computed from float64 logits."""
    model = copy.deepcopy(model).double().eval()
    tokens = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:]):
            if target != -100:
                at = logp[position]
                tokens.append(
                    {
                        "p": at[target].exp().item(),
                        "nll": -at[target].item(),
                        "entropy": -(at.exp() * at).sum().item(),
                        "correct": int(at.argmax()) == target,
                        "end": target == end,
                        "row": number,
                        "target": target,
                    }
                )
    return tokens


def expected_of(tokens, alpha) -> dict[str, float]:
    p = np.array([token["p"] for token in tokens])
    return {
        "entropy": np.mean([token["entropy"] for token in tokens]),
        "effective_tokens": np.mean(alpha * p + 1 - alpha),
        "p_end_of_turn": np.mean([token["p"] for token in tokens if token["end"]]),
    }


def make_trainer(tmp_path, rows, *, alpha=0.6, evaluation=None, **flags) -> DFTTrainer:
    options = {name: flags.pop(name) for name in ("log_per_file", "fused_head") if name in flags}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **flags,
    )
    return DFTTrainer(
        tiny(),
        arguments,
        alpha=alpha,
        train_dataset=rows,
        eval_dataset=evaluation,
        end_of_turn_ids=[END],
        **options,
    )


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (2, 4)])
def test_training_metrics(tmp_path, fused, batch, accumulated):
    rows = with_end_token(8)
    trainer = make_trainer(
        tmp_path, Rows(rows), fused_head=fused, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated, max_steps=1,
    )  # fmt: skip
    tokens = tokens_of(tiny(), rows)
    trainer.train()
    record = trainer.state.log_history[0]
    for name, value in expected_of(tokens, 0.6).items():
        assert record[name] == pytest.approx(value, rel=1e-5), name
    assert record["supervised_tokens"] == len(tokens)
    real = sum(len(row["input_ids"]) for row in rows)
    if accumulated == 1:
        padded = 8 * max(len(row["input_ids"]) for row in rows)
        assert record["padding_share"] == pytest.approx(1 - real / padded)
    assert record["seconds_left"] == 0 and record["peak_memory_gib"] > 0.05


@pytest.mark.parametrize("fused", ["on", "off"])
def test_evaluation_metrics_histogram_and_per_file_metrics(tmp_path, fused):
    rows = with_end_token(13)
    trainer = make_trainer(
        tmp_path, Rows(rows), evaluation=Rows(rows), log_per_file=True, fused_head=fused,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    tokens = tokens_of(tiny(), rows)
    metrics = trainer.evaluate()
    for name, value in expected_of(tokens, 0.6).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    counts, _ = np.histogram([token["p"] for token in tokens], bins=BINS, range=(0, 1))
    histogram = trainer.state.log_history[-1]["eval_p_histogram"]
    assert histogram == counts.tolist() and sum(histogram) == metrics["eval_supervised_tokens"] == len(tokens)
    assert all(isinstance(value, int | float) for value in metrics.values())
    for file, name in enumerate(["a.jsonl", "b.jsonl"]):
        of_file = [token for token in tokens if token["row"] % 2 == file]
        assert metrics[f"eval_{name}/nll"] == pytest.approx(
            np.mean([token["nll"] for token in of_file]), rel=1e-5
        )
        assert metrics[f"eval_{name}/avg_p_correct"] == pytest.approx(
            np.mean([token["p"] for token in of_file]), rel=1e-5
        )
    assert "eval_none.jsonl/nll" not in metrics


def test_history_has_the_histogram_and_callbacks_get_numbers_only(tmp_path):
    from transformers import TrainerCallback

    received = []

    class RecordLogs(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            received.append(dict(logs))

    rows = Rows(with_end_token(4))
    trainer = make_trainer(
        tmp_path, rows, evaluation=rows, eval_strategy="steps", eval_steps=1, eval_on_start=True, max_steps=2
    )
    trainer.add_callback(RecordLogs())
    trainer.train()
    assert all(isinstance(value, int | float) for logs in received for value in logs.values())
    histograms = [record["eval_p_histogram"] for record in trainer.state.log_history if "eval_nll" in record]
    assert [record["step"] for record in trainer.state.log_history if "eval_nll" in record] == [0, 1, 2]
    assert all(len(histogram) == BINS and sum(histogram) > 0 for histogram in histograms)


def test_histogram_counts_p_of_zero_and_one_in_the_outer_bins(tmp_path):
    trainer = make_trainer(tmp_path, Rows(with_end_token(2)))
    logits = torch.tensor([[[60.0, 0.0], [60.0, 0.0], [0.0, 0.0]]])
    _, stats = dft_loss(logits, torch.tensor([[-100, 0, 1]]))
    trainer._run.recorder.evaluation.update(
        stats, {"input_ids": torch.zeros(1, 3), "labels": torch.zeros(1, 3)}
    )
    histogram = trainer._run.recorder.evaluation.reduce(trainer.accelerator).histogram
    assert histogram[0] == 1 and histogram[-1] == 1 and sum(histogram) == 2


def test_score_returns_every_token_once_in_file_order(tmp_path):
    rows = with_end_token(11)
    trainer = make_trainer(tmp_path, Rows(rows), per_device_eval_batch_size=4)
    table = trainer.score(Rows(rows))
    expected = sorted(tokens_of(tiny(), rows), key=lambda token: (token["row"] % 2, token["row"]))
    assert len(table) == len(expected)
    assert table.target.tolist() == [token["target"] for token in expected]
    assert table.line.tolist() == [token["row"] + 1 for token in expected]
    assert table.p_correct == pytest.approx([token["p"] for token in expected], rel=1e-5)
    assert table.entropy == pytest.approx([token["entropy"] for token in expected], rel=1e-5)


def test_evaluation_keeps_a_few_conversations_token_by_token(tmp_path):
    rows = with_end_token(9)
    trainer = make_trainer(tmp_path, Rows(rows), evaluation=Rows(rows), per_device_eval_batch_size=2)
    trainer.evaluate()
    assert [example.line for example in trainer.examples] == [1, 2, 3, 4]
    tokens = tokens_of(tiny(), rows)
    for number, shown in enumerate(trainer.examples):
        assert shown.ids == rows[number]["input_ids"]
        supervised = [label != -100 for label in rows[number]["labels"]]
        assert [p is not None for p in shown.p_correct] == [False, *supervised[1:]]
        values = [p for p in shown.p_correct if p is not None]
        assert values == pytest.approx([token["p"] for token in tokens if token["row"] == number], rel=1e-5)


@pytest.mark.parametrize("collator", [PackedCollator(0), FlatCollator()])
def test_scored_sequences_splits_packed_rows(collator):
    first, second = with_end_token(2)
    packed = {
        "input_ids": first["input_ids"] + second["input_ids"],
        "labels": first["labels"] + second["labels"],
        "seq_lengths": [len(first["input_ids"]), len(second["input_ids"])],
        "origins": [(0, 5), (1, 6)],
    }
    batch = collator([packed, {**second, "origins": [(1, 9)]}])
    logits = torch.zeros(*batch["labels"].shape, VOCAB)
    _, stats = dft_loss(logits, batch["labels"])
    shown = scored_sequences(stats, batch, 4)
    assert [(part.file, part.line) for part in shown] == [(0, 5), (1, 6), (1, 9)]
    assert [part.ids for part in shown] == [first["input_ids"], second["input_ids"], second["input_ids"]]


def test_scored_sequences_truncates_long_conversations_at_the_start():
    ids = list(range(1, VOCAB)) * 20
    batch = PaddedCollator(0)([{"input_ids": ids, "labels": ids}])
    _, stats = dft_loss(torch.zeros(1, len(ids), VOCAB), batch["labels"])
    (shown,) = scored_sequences(stats, batch, 4)
    assert shown.shortened and shown.ids == ids[-EXAMPLE_TOKENS:] and shown.file == -1


def test_short_names_are_unique():
    assert short_names(["x/a.jsonl", "y/a.jsonl", "y/b.jsonl"]) == ["x/a.jsonl", "y/a.jsonl", "b.jsonl"]
    assert short_names(["a.jsonl", "sub/a.jsonl"]) == ["a.jsonl", "sub/a.jsonl"]
    assert short_names(["owner/name:train"]) == ["name:train"]


def meter_batch(nll: list[float]):
    """Return (stats, inputs) of one supervised token per value of `nll`; every second one ends a turn."""
    logits = torch.zeros(1, len(nll) + 1, VOCAB)
    labels = torch.tensor([[-100] + [1, END] * (len(nll) // 2)])
    _, stats = dft_loss(logits, labels)
    stats = stats._replace(nll=torch.tensor(nll), p_correct=torch.exp(-torch.tensor(nll)))
    return stats, {"input_ids": labels, "labels": labels}


def test_a_nan_token_makes_the_means_of_its_own_file_nan_only():
    meter = TokenMeter(torch.device("cpu"), [END], Dft(), files=3)
    stats, inputs = meter_batch([1.0, 2.0, math.nan, 3.0])
    meter.update(stats, inputs, files=torch.tensor([0, 0, 1, 2]))
    clean, broken, other = meter.reduce(Accelerator(cpu=True)).files
    assert clean["nll"] == pytest.approx(1.5) and other["nll"] == pytest.approx(3.0)
    assert clean["avg_p_correct"] == pytest.approx((math.exp(-1) + math.exp(-2)) / 2)
    assert math.isnan(broken["nll"]) and math.isnan(broken["avg_p_correct"])


def test_a_nan_token_within_a_turn_leaves_p_end_of_turn_finite():
    meter = TokenMeter(torch.device("cpu"), [END], Dft())
    meter.update(*meter_batch([math.nan, 2.0, 1.0, 2.0]))
    means = meter.reduce(Accelerator(cpu=True)).means
    assert means["p_end_of_turn"] == pytest.approx(math.exp(-2)) and math.isnan(means["nll"])


class ForbidFloat64(TorchDispatchMode):
    """Fail on operations that return float64, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        assert not isinstance(output, torch.Tensor) or output.dtype != torch.float64, function
        return output


def test_a_device_without_float64_gets_the_same_metrics(monkeypatch):
    batches = [meter_batch([0.1 * number, 1.5, 0.3, 2.0]) for number in range(1, 20)]
    files = torch.tensor([0, 1, 1, 0])
    expected = TokenMeter(torch.device("cpu"), [END], Dft(), files=2)
    for stats, inputs in batches:
        expected.update(stats, inputs, files=files)
    monkeypatch.setattr(accumulator, "DEVICES_WITHOUT_FLOAT64", ("cpu",))
    with ForbidFloat64():
        meter = TokenMeter(torch.device("cpu"), [END], Dft(), files=2)
        for stats, inputs in batches:
            meter.update(stats, inputs, files=files)
    saved = meter.rows(Accelerator(cpu=True))
    resumed = TokenMeter(torch.device("cpu"), [END], Dft())
    resumed.load_rows(saved, Accelerator(cpu=True))
    assert resumed.rows(Accelerator(cpu=True)) == saved
    reduced, reference = meter.reduce(Accelerator(cpu=True)), expected.reduce(Accelerator(cpu=True))
    assert reduced.means == pytest.approx(reference.means, rel=1e-6)
    assert reduced.histogram == reference.histogram
    for means, others in zip(reduced.files, reference.files, strict=True):
        assert means == pytest.approx(others, rel=1e-6)


def test_no_means_without_supervised_tokens(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2
    trainer = make_trainer(tmp_path, Rows(rows), evaluation=Rows(rows), max_steps=1)
    trainer.train()
    assert "nll" not in trainer.state.log_history[0]
    metrics = trainer.evaluate()
    assert "eval_nll" not in metrics and metrics["eval_supervised_tokens"] == 0
    assert math.isfinite(trainer.state.log_history[0]["grad_norm"])


def test_nan_tokens_are_excluded_from_the_histogram_and_from_best_checkpoints(tmp_path, capsys):
    rows = with_end_token(8)
    trainer = make_trainer(
        tmp_path, Rows(rows), evaluation=Rows(rows), metric_for_best_model="eval_acc", fused_head="off"
    )
    trainer.args.save_strategy = SaveStrategy.BEST
    assert trainer._determine_best_metric(trainer.evaluate(), None)
    trainer.state.best_metric = None
    trainer.model.lm_head.weight = torch.nn.Parameter(trainer.model.lm_head.weight.detach().clone())
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[20] = math.nan  # in some of the conversations
    metrics = trainer.evaluate()
    record = trainer.state.log_history[-1]
    assert math.isnan(metrics["eval_nll"]) and math.isfinite(metrics["eval_acc"])
    assert 0 < sum(record["eval_p_histogram"]) < metrics["eval_supervised_tokens"]
    assert "tokens evaluated have a p that is not a number" in capsys.readouterr().out
    assert not trainer._determine_best_metric(metrics, None)


def test_missing_metric_selects_no_best_checkpoint(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path,
        Rows(with_end_token(2)),
        evaluation=Rows(with_end_token(2)),
        metric_for_best_model="p_end_of_turn",
    )
    trainer.args.save_strategy = SaveStrategy.BEST
    assert not trainer._determine_best_metric({"eval_nll": 1.0}, None)
    assert "no eval_p_end_of_turn in this evaluation" in capsys.readouterr().out


def test_origins_column_of_a_wrong_type_is_an_error(tmp_path):
    rows = Rows(with_end_token(2))
    rows.files = "a method or a text"
    assert make_trainer(tmp_path, rows, evaluation=rows, log_per_file=True).evaluate()["eval_nll"] > 0
    row = {**with_end_token(1)[0], "origins": "wikipedia"}
    with pytest.raises(ValueError, match="origins 'wikipedia': must be 1 pair"):
        PaddedCollator(0)([row])


def test_each_of_several_evaluation_datasets_prints_its_line(tmp_path, capsys):
    trainer = make_trainer(tmp_path, Rows(with_end_token(2)), evaluation={"b": Rows(with_end_token(2))})
    metrics = trainer.evaluate()
    _, row = capsys.readouterr().out.splitlines()
    assert metrics["eval_b_nll"] > 0 and row.startswith("eval  step 0/0  0.000") and row.endswith("  b")
