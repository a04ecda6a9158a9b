"""One tile of rows: its log-softmaxes, computed once and shared by every divergence that reads the tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Divergence(Protocol):
    """What one tile of rows yields. Engines, masks, reductions and types live elsewhere.

    Optional attributes: `temperature` (1.0 when absent), `full_vocabulary` (False: `out` covers the vocabulary both
    models share; True: the student's whole one, and no teacher is read), `reads_labels` (False), `sums_over_support`
    (False; True when the sum may be cut to a sparse teacher's entries) and `row_fields` (none; names of its fields that
    hold one entry per row, flat, and are cut to the rows of a tile).
    """

    def value(self, tile: Tile) -> Tensor:
        """(rows,) values."""

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        """out (rows, V) += row_weight[:, None] · d value / d student logits."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product of (rows, V) with (rows, V)."""
    return torch.linalg.vecdot(x, y)


class Tile:
    """Student and teacher logits of some rows, over the vocabulary they share. Read-only.

    Args:
        student: (rows, V) logits, float32 or float64.
        teacher: (rows, V) logits of the same type, or None.
        labels: (rows,) int64, negative where there is none, or None.
        full: the tile of the student's whole vocabulary when it is larger than V; None says it is this one.
        finite: no logit can be -inf, so nothing has to be kept from becoming nan.
    """

    def __init__(self, student, teacher=None, labels=None, *, full: Tile | None = None, finite: bool = False):
        self.student, self.teacher, self.labels, self.finite = student, teacher, labels, finite
        self._full = full  # never self: a cycle would keep the tile's tensors until the garbage collector comes by
        self.memo: dict = {}

    @property
    def full(self) -> Tile:
        """The tile of the student's whole vocabulary."""
        return self._full or self

    def get(self, key, make: Callable[[], Tensor]) -> Tensor:
        """make(), once per key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def log_q(self, temperature: float = 1.0) -> Tensor:
        """log softmax(student / temperature)."""
        return self.get(("log_q", temperature), lambda: _log_softmax(self.student, temperature))

    def log_p(self, temperature: float = 1.0) -> Tensor:
        """log softmax(teacher / temperature)."""
        if self.teacher is None:
            raise ValueError("this divergence compares with a teacher, but none was given; pass teacher logits")
        return self.get(("log_p", temperature), lambda: _log_softmax(self.teacher, temperature))

    def q(self, temperature: float = 1.0) -> Tensor:
        return self.get(("q", temperature), lambda: self.log_q(temperature).exp())

    def p(self, temperature: float = 1.0) -> Tensor:
        return self.get(("p", temperature), lambda: self.log_p(temperature).exp())

    def log_ratio(self, temperature: float = 1.0) -> Tensor:
        """log q - log p; 0 where either is -inf: entries that one side rules out count for nothing."""
        return self.get(
            ("log_ratio", temperature), lambda: self.filled(self.log_q(temperature) - self.log_p(temperature))
        )

    def mixture(self, temperature: float, student_weight: float) -> Tensor:
        """m = student_weight · q + (1 - student_weight) · p, at least the smallest normal number.

        Every use is weighted by p or q, which are 0 where the floor holds, so its log may replace a logaddexp.
        """
        return self.get(("mixture", temperature, student_weight), lambda: self._mixture(temperature, student_weight))

    def _mixture(self, temperature: float, student_weight: float) -> Tensor:
        m = torch.lerp(self.p(temperature), self.q(temperature), student_weight)
        return m.clamp_(min=torch.finfo(m.dtype).tiny)

    def forward_kl(self, temperature: float = 1.0) -> Tensor:
        """(rows,) Σ p (log p - log q)."""
        return self.get(("forward_kl", temperature), lambda: -dot(self.p(temperature), self.log_ratio(temperature)))

    def reverse_kl(self, temperature: float = 1.0) -> Tensor:
        """(rows,) Σ q (log q - log p)."""
        return self.get(("reverse_kl", temperature), lambda: dot(self.q(temperature), self.log_ratio(temperature)))

    def filled(self, x: Tensor) -> Tensor:
        """`x`, overwritten with 0 where an infinite logit made it infinite or nan."""
        return x if self.finite else x.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def inside(self) -> Tensor:
        """Where neither side is -inf."""
        return self.get("inside", lambda: self.student.isfinite() & self.teacher.isfinite())

    def student_top(self) -> Tensor:
        """(rows,) the student's most likely entry."""
        return self.student.argmax(-1)

    def teacher_top(self) -> Tensor:
        """(rows,) the teacher's most likely entry."""
        return (self.log_p() if self.teacher is None else self.teacher).argmax(-1)

    def add_grad(self, divergence: Divergence, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        """Adds a divergence's gradient to `out`, which covers the student's whole vocabulary."""
        if not getattr(divergence, "full_vocabulary", False):
            out = out[:, : self.student.shape[-1]]
        divergence.add_grad(self, value, row_weight, out)


class MixtureTile(Tile):
    """A tile whose teacher is a mixture, known by its log-probabilities (rows, V) at the temperature of this tile."""

    def __init__(self, student, log_probs: Tensor, labels=None, *, full: Tile | None = None, finite: bool = False):
        super().__init__(student, log_probs, labels, full=full, finite=finite)

    def log_p(self, temperature: float = 1.0) -> Tensor:
        if temperature != 1.0:
            raise ValueError(
                "a mixture of teachers is made for the temperatures that its divergences declare; make the divergence "
                "a frozen dataclass with a field `temperature`"
            )
        return self.teacher


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
