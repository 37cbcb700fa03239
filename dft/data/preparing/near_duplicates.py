"""Conversations that share most of their text, found by comparing their signatures.

Of two signatures (`dft.data.preparing.traits.signatures`), the share of equal entries estimates the share of
common text. Only conversations that have a part of their signatures in common are compared.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from dft.data.preparing.traits import HASHES

BANDS = 4
"""Parts of a signature. Conversations of which one part is equal are compared."""
NEARLY_EQUAL = 0.8
"""Share of equal entries of the signatures from which conversations count as nearly equal."""
MAX_BUCKET = 50
"""Number of conversations with an equal part of the signature with which each other one is compared."""


def has_near_twin(signatures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each signature whether one of the others is nearly equal to it.

    Args:
        signatures: (conversations, HASHES).
        others: (others, HASHES), usually many more.
    """
    is_near = np.zeros(len(signatures), dtype=bool)
    for keys, other_keys in zip(_bands(signatures), _bands(others), strict=True):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index in np.flatnonzero(np.isin(other_keys, keys)).tolist():
            bucket = buckets[other_keys[index].tobytes()]
            if len(bucket) < MAX_BUCKET:
                bucket.append(index)
        for index in np.flatnonzero(~is_near).tolist():
            bucket = buckets.get(keys[index].tobytes(), [])
            is_near[index] = bool(bucket) and _is_near(signatures[index], others[bucket])
    return is_near


def near_repeats(signatures: np.ndarray) -> np.ndarray:
    """Return for each signature whether an earlier one, that is no repeat itself, is nearly equal to it."""
    is_repeat = np.zeros(len(signatures), dtype=bool)
    bands = list(_bands(signatures))
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in bands]
    frequent = [np.isin(keys, _repeated(keys)) for keys in bands]
    for index in np.flatnonzero(np.any(frequent, axis=0)).tolist():
        matching = [
            bucket[keys[index].tobytes()]
            for keys, bucket, is_frequent in zip(bands, buckets, frequent, strict=True)
            if is_frequent[index]
        ]
        earlier = sorted({other for bucket in matching for other in bucket})
        if earlier and _is_near(signatures[index], signatures[earlier]):
            is_repeat[index] = True
            continue
        for bucket in matching:
            if len(bucket) < MAX_BUCKET:
                bucket.append(index)
    return is_repeat


def _bands(signatures: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each part of the signatures an array of one value per signature."""
    width = HASHES // BANDS
    for start in range(0, HASHES, width):
        part = np.ascontiguousarray(signatures[:, start : start + width])
        yield part.view(f"V{width * part.itemsize}")[:, 0]


def _repeated(keys: np.ndarray) -> np.ndarray:
    values, counts = np.unique(keys, return_counts=True)
    return values[counts > 1]


def _is_near(signature: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others == signature).mean(axis=1) >= NEARLY_EQUAL).any())
