"""What is counted beside loss and accuracy, against a recomputation token by token in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dft import DFTTrainer, dft_loss
from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator
from dft.metrics import BINS
from dft.training.measuring.meter import short_names
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


def ended(count: int) -> list[dict]:
    rows = conversations(count)
    for row in rows:
        row["input_ids"][-1] = row["labels"][-1] = END
    return rows


def tokens_of(model, rows, end: int = END) -> list[dict]:
    """Every supervised token, sequence by sequence, from the model's logits in float64."""
    model = copy.deepcopy(model).double().eval()
    found = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:]):
            if target != -100:
                at = logp[position]
                found.append(
                    {
                        "p": at[target].exp().item(),
                        "nll": -at[target].item(),
                        "entropy": -(at.exp() * at).sum().item(),
                        "hit": int(at.argmax()) == target,
                        "end": target == end,
                        "row": number,
                        "target": target,
                    }
                )
    return found


def expected_of(tokens, alpha) -> dict[str, float]:
    p = np.array([one["p"] for one in tokens])
    return {
        "entropy": np.mean([one["entropy"] for one in tokens]),
        "effective_tokens": np.mean(alpha * p + 1 - alpha),
        "p_end_of_turn": np.mean([one["p"] for one in tokens if one["end"]]),
    }


def made(tmp_path, rows, *, alpha=0.6, evaluation=None, **flags) -> DFTTrainer:
    ours = {name: flags.pop(name) for name in ("log_per_file", "fused_head") if name in flags}
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
        **ours,
    )


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize(("batch", "accumulated"), [(8, 1), (2, 4)])
def test_training_metrics(tmp_path, fused, batch, accumulated):
    rows = ended(8)
    run = made(
        tmp_path, Rows(rows), fused_head=fused, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated, max_steps=1,
    )  # fmt: skip
    tokens = tokens_of(tiny(), rows)
    run.train()
    record = run.state.log_history[0]
    for name, value in expected_of(tokens, 0.6).items():
        assert record[name] == pytest.approx(value, rel=1e-5), name
    assert record["supervised_tokens"] == len(tokens)
    real = sum(len(row["input_ids"]) for row in rows)
    if accumulated == 1:
        padded = 8 * max(len(row["input_ids"]) for row in rows)
        assert record["padding_share"] == pytest.approx(1 - real / padded)
    assert record["seconds_left"] == 0 and record["peak_memory_gib"] > 0.05


@pytest.mark.parametrize("fused", ["on", "off"])
def test_evaluation_metrics_histogram_and_files(tmp_path, fused):
    rows = ended(13)
    run = made(
        tmp_path, Rows(rows), evaluation=Rows(rows), log_per_file=True, fused_head=fused,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    tokens = tokens_of(tiny(), rows)
    metrics = run.evaluate()
    for name, value in expected_of(tokens, 0.6).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    counts, _ = np.histogram([one["p"] for one in tokens], bins=BINS, range=(0, 1))
    histogram = run.state.log_history[-1]["eval_p_histogram"]
    assert histogram == counts.tolist() and sum(histogram) == metrics["eval_supervised_tokens"] == len(tokens)
    assert all(isinstance(value, int | float) for value in metrics.values())
    for file, name in enumerate(["a.jsonl", "b.jsonl"]):
        of_file = [one for one in tokens if one["row"] % 2 == file]
        assert metrics[f"eval_{name}/nll"] == pytest.approx(
            np.mean([one["nll"] for one in of_file]), rel=1e-5
        )
        assert metrics[f"eval_{name}/avg_p_correct"] == pytest.approx(
            np.mean([one["p"] for one in of_file]), rel=1e-5
        )
    assert "eval_none.jsonl/nll" not in metrics


def test_the_histogram_is_in_the_history_and_callbacks_get_numbers(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Listen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run = made(tmp_path, Rows(ended(4)), evaluation=Rows(ended(4)), eval_strategy="steps", eval_steps=1,
               eval_on_start=True, max_steps=2)  # fmt: skip
    run.add_callback(Listen())
    run.train()
    assert all(isinstance(value, int | float) for logs in seen for value in logs.values())
    histograms = [record["eval_p_histogram"] for record in run.state.log_history if "eval_nll" in record]
    assert [record["step"] for record in run.state.log_history if "eval_nll" in record] == [0, 1, 2]
    assert all(len(one) == BINS and sum(one) > 0 for one in histograms)


def test_p_of_exactly_one_and_zero_are_in_the_outer_bins(tmp_path):
    run = made(tmp_path, Rows(ended(2)))
    logits = torch.tensor([[[60.0, 0.0], [60.0, 0.0], [0.0, 0.0]]])
    _, stats = dft_loss(logits, torch.tensor([[-100, 0, 1]]))
    run._eval_meter.update(stats, {"input_ids": torch.zeros(1, 3), "labels": torch.zeros(1, 3)})
    histogram = run._eval_meter.reduce(run.accelerator).histogram
    assert histogram[0] == 1 and histogram[-1] == 1 and sum(histogram) == 2


def test_scoring_gives_every_token_once_in_the_order_of_the_files(tmp_path):
    rows = ended(11)
    run = made(tmp_path, Rows(rows), per_device_eval_batch_size=4)
    table = run.score(Rows(rows))
    expected = sorted(tokens_of(tiny(), rows), key=lambda one: (one["row"] % 2, one["row"]))
    assert len(table) == len(expected)
    assert table.target.tolist() == [one["target"] for one in expected]
    assert table.line.tolist() == [one["row"] + 1 for one in expected]
    assert table.p_correct == pytest.approx([one["p"] for one in expected], rel=1e-5)
    assert table.entropy == pytest.approx([one["entropy"] for one in expected], rel=1e-5)


def test_a_few_conversations_are_kept_token_by_token(tmp_path):
    rows = ended(9)
    run = made(tmp_path, Rows(rows), evaluation=Rows(rows), per_device_eval_batch_size=2)
    run.evaluate()
    assert [one.line for one in run.examples] == [1, 2, 3, 4]
    tokens = tokens_of(tiny(), rows)
    for number, shown in enumerate(run.examples):
        assert shown.ids == rows[number]["input_ids"]
        supervised = [label != -100 for label in rows[number]["labels"]]
        assert [one is not None for one in shown.p_correct] == [False, *supervised[1:]]
        values = [one for one in shown.p_correct if one is not None]
        assert values == pytest.approx([one["p"] for one in tokens if one["row"] == number], rel=1e-5)


@pytest.mark.parametrize("collator", [PackedCollator(0), FlatCollator()])
def test_packed_sequences_are_kept_apart(collator):
    one, other = ended(2)
    packed = {
        "input_ids": one["input_ids"] + other["input_ids"],
        "labels": one["labels"] + other["labels"],
        "seq_lengths": [len(one["input_ids"]), len(other["input_ids"])],
        "origins": [(0, 5), (1, 6)],
    }
    batch = collator([packed, {**other, "origins": [(1, 9)]}])
    logits = torch.zeros(*batch["labels"].shape, VOCAB)
    _, stats = dft_loss(logits, batch["labels"])
    shown = scored_sequences(stats, batch, 4)
    assert [(one.file, one.line) for one in shown] == [(0, 5), (1, 6), (1, 9)]
    assert [part.ids for part in shown] == [one["input_ids"], other["input_ids"], other["input_ids"]]


def test_a_long_conversation_is_shown_from_its_end():
    ids = list(range(1, VOCAB)) * 20
    batch = PaddedCollator(0)([{"input_ids": ids, "labels": ids}])
    _, stats = dft_loss(torch.zeros(1, len(ids), VOCAB), batch["labels"])
    (shown,) = scored_sequences(stats, batch, 4)
    assert shown.shortened and shown.ids == ids[-EXAMPLE_TOKENS:] and shown.file == -1


def test_names_of_files_are_as_short_as_tells_them_apart():
    assert short_names(["x/a.jsonl", "y/a.jsonl", "y/b.jsonl"]) == ["x/a.jsonl", "y/a.jsonl", "b.jsonl"]
    assert short_names(["a.jsonl", "sub/a.jsonl"]) == ["a.jsonl", "sub/a.jsonl"]
    assert short_names(["owner/name:train"]) == ["name:train"]


def test_nothing_supervised_gives_no_means(tmp_path):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2
    run = made(tmp_path, Rows(rows), evaluation=Rows(rows), max_steps=1)
    run.train()
    assert "nll" not in run.state.log_history[0]
    metrics = run.evaluate()
    assert "eval_nll" not in metrics and metrics["eval_supervised_tokens"] == 0
    assert math.isfinite(run.state.log_history[0]["grad_norm"])


def test_a_token_without_a_probability_is_in_no_histogram_and_makes_no_best_checkpoint(tmp_path, capsys):
    rows = ended(8)
    run = made(
        tmp_path, Rows(rows), evaluation=Rows(rows), metric_for_best_model="eval_acc", fused_head="off"
    )
    run.args.save_strategy = SaveStrategy.BEST
    assert run._determine_best_metric(run.evaluate(), None)
    run.state.best_metric = None
    run.model.lm_head.weight = torch.nn.Parameter(run.model.lm_head.weight.detach().clone())
    with torch.no_grad():
        run.model.model.embed_tokens.weight[20] = math.nan  # in some of the conversations
    metrics = run.evaluate()
    found = run.state.log_history[-1]
    assert math.isnan(metrics["eval_nll"]) and math.isfinite(metrics["eval_acc"])
    assert 0 < sum(found["eval_p_histogram"]) < metrics["eval_supervised_tokens"]
    assert "tokens evaluated have a p that is not a number" in capsys.readouterr().out
    assert not run._determine_best_metric(metrics, None)


def test_a_metric_that_an_evaluation_does_not_have_makes_no_best_checkpoint(tmp_path, capsys):
    run = made(tmp_path, Rows(ended(2)), evaluation=Rows(ended(2)), metric_for_best_model="p_end_of_turn")
    run.args.save_strategy = SaveStrategy.BEST
    assert not run._determine_best_metric({"eval_nll": 1.0}, None)
    assert "no eval_p_end_of_turn in this evaluation" in capsys.readouterr().out


def test_a_column_of_another_meaning_is_one_error(tmp_path):
    rows = Rows(ended(2))
    rows.files = "a method or a text"
    assert made(tmp_path, rows, evaluation=rows, log_per_file=True).evaluate()["eval_nll"] > 0
    row = {**ended(1)[0], "origins": "wikipedia"}
    with pytest.raises(ValueError, match="origins 'wikipedia': must be 1 pair"):
        PaddedCollator(0)([row])


def test_one_of_several_evaluations_has_its_line(tmp_path, capsys):
    run = made(tmp_path, Rows(ended(2)), evaluation={"b": Rows(ended(2))})
    metrics = run.evaluate()
    assert metrics["eval_b_nll"] > 0 and "eval b step 0/0" in capsys.readouterr().out
