"""Collators: padding is neither attended to nor supervised, and packed sequences stay separated."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from dft.data.batches.collator import FlatCollator, PackedCollator, PaddedCollator

BLANK = {"input_ids": [9], "labels": [-100]}
PACKED = [
    {
        "input_ids": np.array([1, 2, 3, 4, 5], dtype=np.int32),
        "labels": np.array([-100, 2, 3, -100, 5], dtype=np.int32),
        "seq_lengths": [3, 2],
    },
    {"input_ids": [6, 7], "labels": [-100, 7], "seq_lengths": [2]},
    BLANK,
]


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
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padded_collator_rejects_examples_of_several_sequences():
    with pytest.raises(ValueError, match="holds 2 sequences"):
        PaddedCollator(pad_token_id=9)(PACKED)
    batch = PaddedCollator(pad_token_id=9)(PACKED[1:])  # one sequence each
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_packed_position_ids_restart_at_every_sequence_and_at_the_padding():
    batch = PackedCollator(pad_token_id=9)(PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9], [9, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7] + [-100] * 3, [-100] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert "attention_mask" not in batch and batch["num_tokens"] == 8
    sequences = find_packed_sequence_indices(batch["position_ids"])
    assert sequences.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_flat_batch_has_no_padding_and_holds_the_sequence_bounds():
    batch = FlatCollator()(PACKED)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 7, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0]]
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == [0, 3, 5, 7, 8] and batch[name].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3


def test_flat_batch_of_single_sequences_equals_the_one_of_transformers():
    generator = np.random.default_rng(0)
    examples = []
    for length in (5, 1, 12, 3):
        ids = generator.integers(1, 50, length).tolist()
        examples.append({"input_ids": ids, "labels": ids})
    batch = FlatCollator()(examples)
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)
    assert (
        batch.keys() - expected.keys() == {"loss_positions", "sequence_ids"}
        and expected.keys() <= batch.keys()
    )
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[name], value) and batch[name].dtype == value.dtype, name
        else:
            assert batch[name] == value and type(batch[name]) is type(value), name


@pytest.mark.parametrize("collator", [PackedCollator(9), FlatCollator()])
def test_first_token_of_a_packed_sequence_is_never_a_target(collator):
    """The labels supervise every token; the first would be predicted from another conversation."""
    labels = torch.arange(1, 6)
    batch = collator([{"input_ids": labels, "labels": labels, "seq_lengths": [3, 2]}])
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert labels.tolist() == [1, 2, 3, 4, 5]  # the dataset itself is unchanged


@pytest.mark.parametrize("collator", [PaddedCollator(9), PackedCollator(9), FlatCollator()])
def test_blank_alone_makes_a_batch_of_one_unsupervised_token(collator):
    batch = collator([BLANK])
    assert batch["input_ids"].tolist() == [[9]] and batch["labels"].tolist() == [[-100]]


@pytest.mark.parametrize("lengths", [[3, 3], [5, 0], []])
@pytest.mark.parametrize("collator", [PackedCollator(9), FlatCollator()])
def test_sequence_lengths_that_do_not_match_the_tokens_raise(collator, lengths):
    with pytest.raises(ValueError, match="seq_lengths"):
        collator([PACKED[0] | {"seq_lengths": lengths}])


def test_read_only_arrays_are_accepted_without_a_warning(recwarn):
    ids = np.arange(4, dtype=np.int32)
    ids.flags.writeable = False
    PaddedCollator(0)([{"input_ids": ids, "labels": ids}])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("collator", "expected"),
    [
        (PaddedCollator(9), [[0, 0, 0], [1, -1, -1]]),
        (PackedCollator(9), [[0, 0, 0], [1, -1, -1]]),
        (FlatCollator(), [[0, 0, 0, 1]]),
    ],
)
def test_batch_holds_the_sequence_number_of_each_token(collator, expected):
    """Examples without origins, such as a blank, get (-1, -1)."""
    example = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "origins": [(4, 5)]}
    batch = collator([example, {"input_ids": [9], "labels": [-100]}])
    assert batch["sequence_ids"].tolist() == expected
    assert batch["origins"].tolist() == [[4, 5], [-1, -1]]


@pytest.mark.parametrize(
    ("collator", "expected"),
    [(PackedCollator(9), [[0, 0, 1, 1, 1], [2, -1, -1, -1, -1]]), (FlatCollator(), [[0, 0, 1, 1, 1, 2]])],
)
def test_packed_sequences_are_numbered_consecutively_across_rows(collator, expected):
    packed = {
        "input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "seq_lengths": [2, 3],
        "origins": [(0, 1), (1, 7)],
    }  # fmt: skip
    batch = collator([packed, {"input_ids": [6], "labels": [6], "origins": [(0, 2)]}])
    assert batch["sequence_ids"].tolist() == expected
    assert batch["origins"].tolist() == [[0, 1], [1, 7], [0, 2]]
    assert "origins" not in collator([{"input_ids": [6], "labels": [6]}])
