"""Random numbers without a generator: a key and a counter decide them, on any device, rank and batch."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def mix(x: Tensor) -> Tensor:
    """SplitMix64's scrambling of int64 tensors: what counts up by GOLDEN becomes random numbers.

    Example:
        >>> import torch
        >>> (mix(torch.arange(3)) & 255).tolist()
        [0, 229, 138]
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * (factor - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
