"""Cross-entropies with a target that is not the teacher's distribution: TAID's interpolation, and the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses.divergences import Tempered
from hf_distill.losses.tile import Tile, dot


@dataclass(frozen=True, eq=False)
class Interpolated(Tempered):
    """TAID's loss (arXiv 2501.16937): -Σ target · log q, target = softmax([(1 - t) · student + t · teacher] / T).

    The target is a constant. `t` is a 0-d tensor, so that a schedule can move it without a host sync.
    """

    t: Tensor
    temperature: float = 1.0

    def _target(self, tile: Tile) -> Tensor:
        log_q, log_p = tile.log_q(self.temperature), tile.log_p(self.temperature)
        t = self.t.detach().to(log_q)
        if not tile.finite:
            floor = torch.finfo(log_q.dtype).min / 4
            log_q, log_p = log_q.clamp(min=floor), log_p.clamp(min=floor)
        return ((1 - t) * log_q + t * log_p).softmax(-1)

    def value(self, tile: Tile) -> Tensor:
        target = tile.get((self, "target"), lambda: self._target(tile))
        log_q = tile.log_q(self.temperature)
        return -dot(target, log_q if tile.finite else log_q.where(log_q.isfinite(), 0.0))

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        target, w = tile.get((self, "target"), lambda: self._target(tile)), (row_weight / self.temperature)[:, None]
        out.addcmul_(tile.q(self.temperature), w).addcmul_(target, w, value=-1)


@dataclass(frozen=True)
class LabelCrossEntropy:
    """-log q(label) over the student's whole vocabulary, also where the teacher's is smaller or sparse.

    Rows with a negative label have value 0 and no gradient.
    """

    full_vocabulary: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    def _labels(self, tile: Tile) -> tuple[Tensor, Tensor]:
        if tile.labels is None:
            raise ValueError("the label cross-entropy needs labels, but none were given; pass labels=")
        return tile.labels.clamp(min=0)[:, None], tile.labels >= 0

    def value(self, tile: Tile) -> Tensor:
        index, counts = self._labels(tile)
        return -tile.full.log_q().gather(-1, index).squeeze(-1).where(counts, 0.0)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        index, counts = self._labels(tile)
        w = row_weight.where(counts, 0.0)[:, None]
        out.addcmul_(tile.full.q(), w).scatter_add_(-1, index, -w)
