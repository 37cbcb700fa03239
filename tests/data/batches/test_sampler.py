"""EpochSampler: every example once per epoch for any batch size and number of ranks."""

import numpy as np
import pytest

from dft.data.batches.collator import FlatCollator, base_logp_of
from dft.data.batches.sampler import BLANK, EpochSampler, WithBlank


@pytest.mark.parametrize(("size", "multiple"), [(10, 4), (8, 4), (1, 8), (7, 1), (100, 32)])
@pytest.mark.parametrize("seed", [None, 3])
def test_each_example_comes_once_and_blanks_fill_the_last_batch(size, multiple, seed):
    sampler = EpochSampler(size, multiple, seed=seed)
    order = list(sampler)
    blanks = -size % multiple
    assert sorted(order[:size]) == list(range(size))
    assert order[size:] == [BLANK] * blanks
    assert len(sampler) == len(order) == size + blanks


def test_without_a_seed_the_order_of_the_dataset_is_kept():
    assert list(EpochSampler(5, 1)) == [0, 1, 2, 3, 4]


def test_order_depends_only_on_seed_and_epoch():
    sampler, smaller_batches = EpochSampler(50, 8, seed=3), EpochSampler(50, 4, seed=3)
    assert list(sampler) == list(sampler)
    assert list(sampler)[:50] == list(smaller_batches)[:50]  # not on the batch size
    before = list(sampler)
    sampler.set_epoch(1)
    smaller_batches.set_epoch(1)
    assert list(sampler) != before and list(sampler)[:50] == list(smaller_batches)[:50]
    assert list(EpochSampler(50, 8, seed=4)) != before


def test_drop_last_drops_examples_that_fill_no_batch():
    sampler = EpochSampler(10, 4, seed=1, drop_last=True)
    order = list(sampler)
    assert len(order) == len(sampler) == 8 and len(set(order)) == 8 and BLANK not in order


def test_steps_are_grouped_by_length_and_shuffled():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    sampler = EpochSampler(1003, 8, seed=2, lengths=lengths, group=8)
    order = np.array(list(sampler))
    assert sorted(order[:1003]) == list(range(1003))
    spread = np.mean([np.ptp(lengths[step]) for step in order[:1000].reshape(-1, 8)])
    plain = np.array(list(EpochSampler(1003, 8, seed=2)))
    assert spread < 0.1 * np.mean([np.ptp(lengths[step]) for step in plain[:1000].reshape(-1, 8)])
    means = lengths[order[:1000].reshape(-1, 8)].mean(axis=1)
    assert not np.all(np.diff(means) <= 0)  # sorted steps would train on all long examples first


def test_blank_is_unsupervised_and_other_examples_are_unchanged():
    dataset = WithBlank([{"input_ids": [4, 5], "labels": [-100, 5]}], token_id=9)
    assert dataset[BLANK] == {"input_ids": [9], "labels": [-100]}
    assert dataset[0] == {"input_ids": [4, 5], "labels": [-100, 5]} and len(dataset) == 1


def test_a_batch_of_blanks_has_the_scores_of_the_base_model_if_the_data_has_them():
    """Objectives that need them fail without the column, and ranks without rows get such batches."""
    example = {"input_ids": [4, 5], "labels": [-100, 5], "base_logp": [float("nan"), -1.0]}
    blank = WithBlank([example], token_id=9)[BLANK]
    scores = base_logp_of(FlatCollator()([blank, blank]))
    assert scores is not None and scores.shape == (1, 2) and scores.isnan().all()
    assert base_logp_of(FlatCollator()([example, blank]))[0, 1] == -1
