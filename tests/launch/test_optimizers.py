"""Optimizers from the command line, on several ranks."""

import pytest

from tests.launching import train_records


@pytest.mark.slow
def test_muon_makes_the_same_steps_on_two_ranks(example, forks):
    """The losses of later steps show the weights after the updates."""
    losses = []
    for ranks in (1, 2):
        output = example.folder / f"muon-{ranks}"
        words = example.words(
            output, optim="muon", max_steps=4, per_device_train_batch_size=8 // ranks, eval_data_files=None,
        )  # fmt: skip
        codes, printed = forks.run(words, ranks)
        assert set(codes) == {0}, printed
        losses.append([record["nll"] for record in train_records(output)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3), "Muon orthogonalizes in bfloat16"
    assert abs(losses[0][3] - losses[0][0]) > 0.1
