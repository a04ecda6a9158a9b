"""What a tile tells for free: values without a gradient, for `observe` or as terms of any weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses.tile import Tile, dot


class _Metric:
    """A value without a gradient."""

    sums_over_support: ClassVar[bool] = True

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Agreement(_Metric):
    """1 where student and teacher have the same most likely entry, else 0."""

    def value(self, tile: Tile) -> Tensor:
        return (tile.student_top() == tile.teacher_top()).to(tile.full.student.dtype)


@dataclass(frozen=True)
class StudentEntropy(_Metric):
    """-Σ q log q over the student's whole vocabulary."""

    temperature: float = 1.0
    full_vocabulary: ClassVar[bool] = True

    def value(self, tile: Tile) -> Tensor:
        return _entropy(tile.full.log_q(self.temperature), tile.full.q(self.temperature))


@dataclass(frozen=True)
class TeacherEntropy(_Metric):
    """-Σ p log p; of a sparse teacher, over its entries (a lower bound)."""

    temperature: float = 1.0

    def value(self, tile: Tile) -> Tensor:
        return _entropy(tile.log_p(self.temperature), tile.p(self.temperature))


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return -dot(p, log_p.clamp(min=torch.finfo(log_p.dtype).min))
