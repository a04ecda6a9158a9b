"""Random numbers without a generator: a key and a counter decide them, on any device, rank and batch."""

from __future__ import annotations

import math

import torch
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


def gaussian(keys: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, width) numbers of the standard normal distribution; each row depends on its key (rows,) int64 only."""
    first, second = _halves(keys, width, dtype)
    return (-2 * first.log()).sqrt_() * (2 * math.pi * second).cos_()


def laplace(keys: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, width) numbers of the Laplace distribution of scale 1 (variance 2), as `gaussian` draws them."""
    first, second = _halves(keys, width, dtype)
    return first.log_().neg_() * (second > 0.5).to(dtype).mul_(2).sub_(1)


def _halves(keys: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two uniform numbers in (0, 1] for each entry, of the halves of its 64 bits."""
    bits = mix(keys[:, None] + GOLDEN * torch.arange(1, width + 1, device=keys.device))
    return tuple((half.to(dtype) + 0.5) * 2.0**-32 for half in ((bits >> 32) & (2**32 - 1), bits & (2**32 - 1)))
