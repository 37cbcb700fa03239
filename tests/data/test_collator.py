"""Padding is on the right, not attended to and not supervised."""

import torch

from dft.data.collator import PaddedCollator


def test_shorter_examples_are_padded_on_the_right():
    batch = PaddedCollator(pad_token_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
            {"input_ids": torch.tensor([4], dtype=torch.int32), "labels": torch.tensor([-100])},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {one.dtype for one in batch.values()} == {torch.int64}
