"""Augmentation that draws the same for an example in every epoch and run: what a teacher says of it can be kept."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable

import numpy as np
import torch


class SeededAugmentation(torch.utils.data.Dataset):
    """`transform(dataset[i])`, with everything that it draws seeded by (seed, i).

    Args:
        dataset: anything with a length and indexing.
        transform: example -> example; draws from python's, numpy's or torch's global generators, which are put back.
        seed: another one draws other augmentations; a cached teacher must have been cached with the same.

    Example:
        >>> noisy = SeededAugmentation([{"x": 1.0}], lambda e: {"x": e["x"] + random.random()}, seed=3)
        >>> noisy[0] == noisy[0]
        True
    """

    def __init__(self, dataset, transform: Callable[[dict], dict], seed: int = 0):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        with seeded_draws(self.seed, index):
            return self.transform(self.dataset[index])


@contextlib.contextmanager
def seeded_draws(*key):
    """Python's, numpy's and torch's global generators seeded by a key of numbers, and put back at the end."""
    own = number_of(*key)
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(own)
            np.random.seed(own)
            torch.manual_seed(own)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def number_of(*key) -> int:
    """32 bits that a key of numbers and names decides."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest(), "little")
