"""Forward KL whose temperature differs from row to row, to a target with noise on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses.metrics import _Metric
from hf_distill.losses.tile import Tile, dot


@dataclass(frozen=True, eq=False)
class NoisyKL:
    """Σ p̃ · [log p̃ - log q], q = softmax(student / T_row), p = softmax(teacher / T_row).

    p̃ = max(p + scale · noise, 0), normalised; uniform where that leaves nothing. The target is a constant. It is made
    block by block, so noise that is drawn row by row from `keys` depends on no tile size.

    Attributes:
        temperatures: (rows,) T_row.
        scale: (rows,) factor of the noise; rows with 0 get none.
        keys: (rows, ...) what `draw` makes each row's noise of; None leaves the noise out.
        draw: (keys of some rows, V, dtype) -> (those rows, V) noise.

    Raises:
        ValueError: a teacher that is not known by its logits over the whole vocabulary.
    """

    temperatures: Tensor | None = None
    scale: Tensor | None = None
    keys: Tensor | None = None
    draw: Callable[[Tensor, int, torch.dtype], Tensor] | None = None
    row_fields: ClassVar[tuple[str, ...]] = ("temperatures", "scale", "keys")

    def value(self, tile: Tile) -> Tensor:
        log_q, target = self._log_q(tile), self._target(tile)
        if self.keys is None:
            return dot(target, tile.filled(self._log_p(tile) - log_q))
        log_q = log_q if tile.finite else log_q.where(tile.inside(), 0.0)
        return torch.xlogy(target, target).sum(-1) - dot(target, log_q)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        target, w = self._target(tile), (row_weight * self._inverse(tile).squeeze(-1))[:, None]
        mass = 1.0 if tile.finite else target.sum(-1, keepdim=True)
        out.addcmul_(self._log_q(tile).exp(), w * mass).addcmul_(target, w, value=-1)

    def _inverse(self, tile: Tile) -> Tensor:
        return self.temperatures.to(tile.student.dtype).reciprocal()[:, None]

    def _log_q(self, tile: Tile) -> Tensor:
        return tile.get((self, "log_q"), lambda: (tile.student * self._inverse(tile)).log_softmax(-1))

    def _log_p(self, tile: Tile) -> Tensor:
        if tile.teacher is None or type(tile) is not Tile:
            raise ValueError(
                "a temperature per row needs the teacher's logits over the whole vocabulary: give a live teacher, a "
                'cache of mode "hidden" or "logits", or an ensemble that mixes logits (no top-k, no draws, no mixture '
                "of probabilities)"
            )
        return tile.get((self, "log_p"), lambda: (tile.teacher * self._inverse(tile)).log_softmax(-1))

    def _target(self, tile: Tile) -> Tensor:
        """(rows, V) p̃, without what one side rules out."""
        return tile.get((self, "target"), lambda: self._noisy(self._log_p(tile).exp(), tile))

    def _noisy(self, p: Tensor, tile: Tile) -> Tensor:
        inside = None if tile.finite else tile.inside()
        if self.keys is not None:
            scale = self.scale.to(p.dtype)
            if p.device.type == "cpu":  # most rows need none, and drawing is what costs; a GPU would have to wait
                rows = scale.nonzero().flatten()
                some = None if inside is None else inside[rows]
                p = p.index_copy(0, rows, self._with_noise(p[rows], scale[rows], self.keys[rows], some))
            else:
                p = self._with_noise(p, scale, self.keys, inside)
        return p if inside is None else p.where(inside, 0.0)

    def _with_noise(self, p: Tensor, scale: Tensor, keys: Tensor, inside: Tensor | None) -> Tensor:
        noise = self.draw(keys, p.shape[-1], p.dtype) * scale[:, None]
        noisy = (p + (noise if inside is None else noise.where(inside, 0.0))).clamp_(min=0)
        total = noisy.sum(-1, keepdim=True)
        even = torch.ones_like(noisy) if inside is None else inside.to(p.dtype)
        even /= even.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(total > 0, noisy / total.where(total > 0, 1.0), even)


@dataclass(frozen=True, eq=False)
class RowNumber(_Metric):
    """A number that is given per row: its mean is logged and evaluated like a term's."""

    number: Tensor | None = None
    full_vocabulary: ClassVar[bool] = True
    row_fields: ClassVar[tuple[str, ...]] = ("number",)

    def value(self, tile: Tile) -> Tensor:
        return self.number.to(tile.full.student.dtype)
