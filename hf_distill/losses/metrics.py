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
class TopKOverlap(_Metric):
    """|top-k of the student ∩ top-k of the teacher| / k, over the vocabulary both share; of a teacher that gives all
    its logits."""

    k: int = 5
    sums_over_support: ClassVar[bool] = False

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def value(self, tile: Tile) -> Tensor:
        if self.k > tile.student.shape[-1]:
            raise ValueError(f"the {self.k} likeliest of {tile.student.shape[-1]} entries were asked for: lower k")
        ours, theirs = (logits.topk(self.k, -1).indices for logits in (tile.student, tile.teacher))
        shared = (ours[..., :, None] == theirs[..., None, :]).any(-1)
        return shared.to(tile.full.student.dtype).mean(-1)


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


@dataclass(frozen=True)
class CalibrationBin(_Metric):
    """Of rows whose most likely entry has a probability in (bin / bins, (bin + 1) / bins], else 0.

    Sums over all rows of all bins make a reliability diagram, whatever the split into tiles, batches and ranks.

    Attributes:
        what: "count" (1), "confidence" (that probability), or "right" (1 where that entry is the label).
    """

    bin: int
    what: str
    bins: int = 15
    full_vocabulary: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def value(self, tile: Tile) -> Tensor:
        place, values = tile.full.get(("calibration", self.bins), lambda: self._rows(tile.full))
        return values[self.what] * (place == self.bin)

    def _rows(self, tile: Tile) -> tuple[Tensor, dict[str, Tensor]]:
        confidence, top = tile.q().max(-1)
        place = ((confidence * self.bins).ceil().long().clamp(1, self.bins) - 1).where(tile.labels >= 0, -1)
        right = (top == tile.labels).to(confidence)
        return place, {"count": torch.ones_like(confidence), "confidence": confidence, "right": right}


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return -dot(p, log_p.clamp(min=torch.finfo(log_p.dtype).min))
