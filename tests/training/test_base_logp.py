"""Base scores of the data reach the loss of the trainer, however its batches are made."""

import math
import re

import pytest
import torch
from datasets import Dataset

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator, base_logp_of
from dft.training.parallel.sequence_parallel import SequenceParallel
from tests.loss.test_base_logp import Ratio
from tests.training.test_trainer import conversations, tiny
from tests.training.test_weights import FLAGS, run


def scored(count: int) -> list[dict[str, list]]:
    """Return sequences with the log-probabilities of another model."""
    rows = conversations(count)
    for row in rows:
        logp = tiny(1)(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).tolist()
        targets = zip(logp, row["labels"][1:], strict=False)
        row["base_logp"] = [math.nan, *(at[t] if t != -100 else math.nan for at, t in targets)]
    return rows


def joined(rows):
    columns = {name: [x for row in rows for x in row[name]] for name in ("input_ids", "labels", "base_logp")}
    return {**columns, "seq_lengths": [len(row["labels"]) for row in rows]}


@pytest.mark.parametrize("collator", [PackedCollator(0), FlatCollator()])
def test_packed_batches_have_the_scores_of_their_targets(collator):
    rows = scored(6)
    batch = collator([joined(rows[:4]), joined(rows[4:])])
    expected = [x for row in rows for x in row["base_logp"] if not math.isnan(x)]
    actual = base_logp_of(batch).flatten()[batch["loss_positions"] + 1]
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_sequence_parallel_ranks_have_the_scores_of_their_targets():
    rows, shares = scored(5), []
    for rank in range(3):
        sequences = SequenceParallel.__new__(SequenceParallel)
        sequences.size, sequences.rank = 3, rank
        shares.append(sequences.local_slice(PaddedCollator(0)(rows)))
    labels, scores = (torch.cat([part[name] for part in shares], 1) for name in ("labels", "base_logp"))
    expected = [x for row in rows for x in row["base_logp"] if not math.isnan(x)]
    torch.testing.assert_close(scores[labels != -100], torch.tensor(expected))


@pytest.mark.parametrize("fused", ["on", "off"])
def test_the_trainer_passes_the_scores_to_the_objective(tmp_path, fused):
    rows, total, count = scored(13), 0.0, 0
    for row in rows:
        logp = tiny()(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position, target in enumerate(row["labels"][1:]):
            if target != -100:
                nll = -logp[position, target].item()
                total += min(math.exp(-nll - row["base_logp"][position + 1]), 2.0) * nll
                count += 1
    log = run(tmp_path, rows, Ratio(), fused_head=fused, end_of_turn_weight=0.0, **FLAGS)
    assert log[0]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    packed = [joined(rows[start : start + 3]) for start in range(0, 13, 3)]
    batches = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 2}
    again = run(tmp_path / "packed", packed, Ratio(), fused_head=fused, end_of_turn_weight=0.0, **batches)
    assert again[0]["eval_loss"] == pytest.approx(log[0]["eval_loss"], rel=1e-5)


def test_scores_are_checked():
    rows = scored(2)
    with pytest.raises(ValueError, match="a supervised token has no base_logp"):
        PaddedCollator(0)([rows[0], {name: rows[1][name] for name in ("input_ids", "labels")}])
    with pytest.raises(ValueError, match="at most 0"):
        PaddedCollator(0)([{**rows[0], "base_logp": [0.5] * len(rows[0]["labels"])}])
    for name in ("base_logp", "loss_weights"):
        count = len(rows[0]["labels"])
        for values, shown in [
            (["-1"] * count, "['-1', '-1',"), (["x"] * count, "['x', 'x',"),
            ([[1], [1, 2]], "[[1], [1, 2]]"), (None, "of shape ()"),
            ([-1.0] * (count - 1), f"of shape ({count - 1},)"),
            ([math.inf] * count, "inf"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=rf"{name} {re.escape(shown)}.*: must be {count} "):
                PaddedCollator(0)([{**rows[0], name: values}])
    blank = {"input_ids": [0], "labels": [-100]}
    assert base_logp_of(PaddedCollator(0)([rows[0], blank])).shape[0] == 2


def test_scores_change_the_digest_of_a_dataset():
    from dft.training.checkpoints.data_digest import data_digest

    rows = scored(3)
    others = [{**row, "base_logp": [x - 1 for x in row["base_logp"]]} for row in rows]
    assert data_digest(Dataset.from_list(rows)) != data_digest(Dataset.from_list(others))
