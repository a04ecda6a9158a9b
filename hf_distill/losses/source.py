"""Where rows come from: both models' logits, projected a tile at a time and looked at a block at a time.

A tile is what one matrix product makes; its rows follow from a byte budget. A block is a few of its rows, small enough
for the temporaries of a divergence to stay in the cache. Neither is ever of the size rows × vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_distill.losses.engines import Block, Compiled, Eager
from hf_distill.losses.sparse import check_sparse
from hf_distill.losses.tile import Divergence
from hf_distill.signals import Finish, HeadLogits, Logits, MixtureLogits, SampledLogits, SparseLogits

TILE_BYTES = {"cpu": 2**27, "cuda": 2**30}
LEAST_ROWS = 256  # below, reading the heads once per tile costs more than the arithmetic hides


@dataclass(frozen=True)
class Source:
    """Flat, detached rows of both models, and how they are cut."""

    student: Tensor | HeadLogits
    teacher: Logits | None
    labels: Tensor | None
    width: int  # the student's vocabulary, as far as any term reads it
    common: int  # the vocabulary both share
    dtype: torch.dtype
    temperatures: tuple[float | None, ...]  # per slot of the plan; None where no term compares with the teacher
    tile_rows: int
    block_rows: int
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.student.shape[0]

    @property
    def device(self) -> torch.device:
        return _anchor(self.student).device

    def tiles(self) -> list[slice]:
        return _slices(slice(0, self.rows), self.tile_rows)

    def blocks(self, rows: slice) -> Iterator[tuple[slice, Block]]:
        """The blocks of a tile of rows. A student's block lies in a buffer that the gradient may overwrite."""
        student, finish = self._logits(self.student, rows, self.width, "student")
        mixture = self.teacher if isinstance(self.teacher, MixtureLogits) else None
        sparse = self.teacher if isinstance(self.teacher, (SparseLogits, SampledLogits)) else None
        teacher = teacher_finish = mixtures = None
        if mixture is not None and mixture.space == "probability":
            mixtures = self._mixtures(mixture, rows)
        elif mixture is not None:
            teacher, teacher_finish = self._mean_logits(mixture, rows), Finish()
        elif self.teacher is not None and sparse is None:
            teacher, teacher_finish = self._logits(self.teacher, rows, self.common, "teacher")
        finite = _bounded(self.student) and _bounded(self.teacher)
        for own in _slices(rows, self.block_rows):
            here = slice(own.start - rows.start, own.stop - rows.start)
            yield (
                own,
                Block(
                    student=student[here],
                    finish=finish,
                    teacher=None if teacher is None else teacher[here],
                    teacher_finish=teacher_finish,
                    mixtures=None if mixtures is None else tuple(None if m is None else m[here] for m in mixtures),
                    sparse=None if sparse is None else _cut(sparse, own),
                    labels=None if self.labels is None else self.labels[own],
                    common=self.common,
                    finite=finite,
                ),
            )

    def product(self, rows: slice) -> Tensor:
        """The student's tile as it lies in its buffer: after the blocks were gone through, its gradient."""
        return self.buffers["student"][: rows.stop - rows.start]

    def _buffer(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(min(self.tile_rows, self.rows), width, dtype=dtype, device=self.device)
        return self.buffers[name][:rows]

    def _logits(self, logits: Tensor | HeadLogits, rows: slice, width: int, name: str) -> tuple[Tensor, Finish]:
        """(rows, width) product or logits, and what finishes them."""
        if isinstance(logits, Tensor):
            return logits[rows, :width], Finish()
        out = self._buffer(name, rows.stop - rows.start, width, logits.weight.dtype)
        torch.mm(logits.hidden[rows], logits.weight[:width].T, out=out)
        return out, logits.finish

    def _parts(self, mixture: MixtureLogits, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """Rows inside the tile, finished logits, weights (rows, 1), whether it is the first part; block by block."""
        for m, part in enumerate(mixture.parts):
            product, finish = self._logits(part, rows, self.common, f"part {_anchor(part).dtype}")
            for own in _slices(rows, self.block_rows):
                here = slice(own.start - rows.start, own.stop - rows.start)
                weight = mixture.weights[own, m, None].to(self.dtype)
                yield here, finish(product[here].to(self.dtype)), weight, m == 0

    def _mean_logits(self, mixture: MixtureLogits, rows: slice) -> Tensor:
        mean = self._buffer("mean", rows.stop - rows.start, self.common, self.dtype).zero_()
        for here, logits, weight, _ in self._parts(mixture, rows):
            mean[here] += weight * logits
        return mean

    def _mixtures(self, mixture: MixtureLogits, rows: slice) -> tuple[Tensor | None, ...]:
        """log Σ_m w_m softmax(z_m / T) per temperature: one buffer each, however many parts there are."""
        size = (rows.stop - rows.start, self.common, self.dtype)
        out = [None if t is None else self._buffer(f"mixture {t}", *size) for t in self.temperatures]
        for here, logits, weight, first in self._parts(mixture, rows):
            for total, temperature in zip(out, self.temperatures, strict=True):
                if total is None:
                    continue
                log_p = (logits / temperature).log_softmax(-1).add_(weight.log())
                if first:
                    total[here] = log_p
                else:
                    torch.logaddexp(total[here], log_p, out=total[here])
        return tuple(out)


def make_source(
    student: Tensor | HeadLogits,
    teacher: Logits | None,
    divergences: Sequence[Divergence],
    temperatures: Sequence[float | None],
    labels: Tensor | None,
    tile_bytes: int | None,
    tile_rows: int | None,
    engine: type[Eager] | type[Compiled],
) -> Source:
    """Check that the inputs fit together, and plan the tiles.

    Raises:
        ValueError: they do not, or tile_rows below 1.
    """
    dtype, device = kind_of(student)
    if teacher is not None and tuple(teacher.shape[:-1]) != tuple(student.shape[:-1]):
        given = f"{tuple(student.shape[:-1])} and {tuple(teacher.shape[:-1])}"
        raise ValueError(f"student and teacher must have the same rows, got {given}")
    common = width = student.shape[-1]
    if isinstance(teacher, (SparseLogits, SampledLogits)):
        for divergence in divergences:
            check_sparse(divergence, teacher)
    elif teacher is not None:
        common = min(width, teacher.shape[-1])
        if not any(getattr(d, "full_vocabulary", False) for d in divergences):
            width = common
    matmul = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    student, teacher = flat(student, matmul), flat(teacher, matmul)
    needed = _row_bytes(student, teacher, width, common, dtype, sum(t is not None for t in temperatures))
    least = LEAST_ROWS * needed if tile_bytes is None else 1
    budget = max(tile_bytes or TILE_BYTES["cpu" if device.type == "cpu" else "cuda"], least)
    if tile_rows is None:
        tile_rows = max(1, budget // max(needed, 1))
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, got {tile_rows}")
    block_rows = max(1, engine.block_bytes(budget, device) // (dtype.itemsize * max(1, width)))
    labels = None if labels is None else labels.reshape(-1)
    return Source(student, teacher, labels, width, common, dtype, tuple(temperatures), tile_rows, block_rows)


def kind_of(student: Tensor | HeadLogits) -> tuple[torch.dtype, torch.device]:
    """Type of the arithmetic (float64 or float32), and where it happens."""
    if not isinstance(student, (Tensor, HeadLogits)):
        raise ValueError(f"a student cannot be {type(student).__name__}; pass its logits or HeadLogits")
    anchor = student.weight if isinstance(student, HeadLogits) else student
    return torch.float64 if anchor.dtype == torch.float64 else torch.float32, anchor.device


def _row_bytes(student, teacher, width: int, common: int, dtype: torch.dtype, temperatures: int) -> int:
    """Bytes that one more row of a tile takes: products, a mixture, and a low-precision gradient's float32 copy."""
    total = 0
    if isinstance(student, HeadLogits):
        total += width * student.weight.dtype.itemsize
        if student.weight.dtype != dtype and not student.weight.is_cuda:
            total += width * dtype.itemsize
    parts = teacher.parts if isinstance(teacher, MixtureLogits) else (teacher,)
    total += max(common * p.weight.dtype.itemsize if isinstance(p, HeadLogits) else 0 for p in parts)
    if isinstance(teacher, MixtureLogits):
        total += common * dtype.itemsize * (temperatures if teacher.space == "probability" else 1)
    return total


def flat(logits: Logits | None, matmul: torch.dtype | None) -> Logits | None:
    """Detached, with rows in one dimension and a head in the type its product runs in."""
    if isinstance(logits, MixtureLogits):
        weights = logits.weights.detach().expand(*logits.shape[:-1], -1).reshape(-1, len(logits.parts))
        return replace(logits, parts=tuple(flat(part, matmul) for part in logits.parts), weights=weights)
    if isinstance(logits, (SparseLogits, SampledLogits)):
        k = logits.shape[-1]
        names = ("ids", "log_probs", "weights") if isinstance(logits, SampledLogits) else ("ids", "log_probs")
        return replace(logits, **{name: getattr(logits, name).detach().reshape(-1, k) for name in names})
    if isinstance(logits, Tensor):
        return logits.detach().reshape(-1, logits.shape[-1])
    if logits is None:
        return None
    dtype = matmul or logits.weight.dtype
    bias = None if logits.bias is None else logits.bias.detach()
    return replace(logits, hidden=logits.hidden.detach().to(dtype), weight=logits.weight.detach().to(dtype), bias=bias)


def pick(logits: Logits | None, index: Tensor) -> Logits | None:
    """Some rows of (N, …) logits, differentiable where they are."""
    if isinstance(logits, MixtureLogits):
        weights = logits.weights if logits.weights.dim() == 1 else logits.weights[index]
        return replace(logits, parts=tuple(pick(part, index) for part in logits.parts), weights=weights)
    if isinstance(logits, (SparseLogits, SampledLogits)):
        return _cut(logits, index)
    if isinstance(logits, HeadLogits):
        return replace(logits, hidden=logits.hidden.index_select(0, index))
    return None if logits is None else logits.index_select(0, index)


def _cut(sparse: SparseLogits | SampledLogits, rows: slice | Tensor):
    if isinstance(sparse, SampledLogits):
        return SampledLogits(sparse.ids[rows], sparse.weights[rows], sparse.log_probs[rows], sparse.temperature)
    return SparseLogits(sparse.ids[rows], sparse.log_probs[rows], sparse.tail, sparse.temperature)


def _slices(rows: slice, size: int) -> list[slice]:
    return [slice(a, min(a + size, rows.stop)) for a in range(rows.start, rows.stop, size)]


def _anchor(logits: Tensor | HeadLogits) -> Tensor:
    return logits.hidden if isinstance(logits, HeadLogits) else logits


def _bounded(logits: Logits | None) -> bool:
    """Whether no logit can be -inf."""
    if isinstance(logits, MixtureLogits):
        return all(_bounded(part) for part in logits.parts)
    return logits is None or (isinstance(logits, HeadLogits) and (logits.bias is None or logits.softcap is not None))
