"""Digests of datasets, by which a resumed run recognizes other data."""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash
from torch.utils.data import IterableDataset

from dft.data.batches.dataset import Sequences

COLUMNS = ("input_ids", "labels", "loss_weights", "base_logp")
"""Columns that determine the loss of an example."""
ROWS_PER_BATCH = 1000


def data_digest(dataset: Any) -> str | None:
    """Return a digest of the tokens, labels and weights of a dataset, and of their order.

    Reads the whole dataset. Returns None if there is none, or if its examples come from a stream.

    Args:
        dataset: a dataset, or several by name.
    """
    if isinstance(dataset, Mapping):
        digests = {name: data_digest(member) for name, member in dataset.items()}
        return xxhash.xxh3_64_hexdigest(repr(digests).encode())
    if dataset is None or isinstance(dataset, IterableDataset | datasets.IterableDataset):
        return None
    if isinstance(dataset, Sequences):
        return dataset.digest()
    digest = xxhash.xxh3_64()
    if isinstance(dataset, datasets.Dataset):
        for table in dataset.with_format("arrow").iter(ROWS_PER_BATCH):
            for name in COLUMNS:
                if name in table.column_names:
                    digest.update(pc.list_value_length(table[name]).to_numpy())
                    digest.update(pc.list_flatten(table[name]).to_numpy())
        return digest.hexdigest()
    for index in range(len(dataset)):
        example = dataset[index]
        for name in COLUMNS:
            if name in example:
                digest.update(np.asarray(example[name]).tobytes())
    return digest.hexdigest()
