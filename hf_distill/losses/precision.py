"""Losses are computed in float32 whatever the models' types: outside autocast, on upcast inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.signals import upcast


def exactly(function: Callable) -> Callable:
    """`function` without autocast and with float tensors in float32; float64 stays float64."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        args = [_upcast(x) for x in args]
        kwargs = {name: _upcast(x) for name, x in kwargs.items()}
        device = next(x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def _upcast(x):
    return upcast(x) if torch.is_tensor(x) and x.is_floating_point() else x


def unit(x: Tensor) -> Tensor:
    """Vectors of the last dimension at length 1; those shorter than 1e-12 become 0, with gradient 0."""
    square = x.square().sum(-1, keepdim=True)
    long = square > 1e-24
    return x.where(long, 0.0) / square.where(long, 1.0).sqrt()
