"""Engines: tiles of rows through any number of divergences, with one student projection.

HeadLogits go through row tiles and take the gradient in the forward pass, so that no (N, V) tensor ever exists: exactly
one projection of the student, one of the teacher and the two products of the student's gradient. Dense logits stay
differentiable per row. A tile's size is a memory knob only: results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.losses.sparse import SparseTile, check_tail
from hf_distill.losses.tile import Divergence, Tile
from hf_distill.signals import HeadLogits, Logits, SparseLogits

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class _Source:
    """Where tiles come from: flat, detached rows of both models."""

    student: Tensor | HeadLogits
    teacher: Tensor | HeadLogits | SparseLogits | None
    labels: Tensor | None
    width: int
    common: int
    dtype: torch.dtype
    tile_rows: int

    @property
    def rows(self) -> int:
        return self.student.shape[0]

    def slices(self) -> list[slice]:
        return [slice(a, min(a + self.tile_rows, self.rows)) for a in range(0, self.rows, self.tile_rows)]

    def tile(self, rows: slice) -> Tile:
        student, labels = self._logits(self.student, rows, self.width), None
        if self.labels is not None:
            labels = self.labels[rows]
        bounded = _bounded(self.student)
        if isinstance(self.teacher, SparseLogits):
            ids, log_probs = self.teacher.ids[rows], self.teacher.log_probs[rows].to(self.dtype)
            return SparseTile(Tile(student, labels=labels, finite=bounded), ids, log_probs, self.teacher.tail)
        if self.teacher is None:
            return Tile(student, labels=labels, finite=bounded)
        full = None if self.width == self.common else Tile(student, labels=labels, finite=bounded)
        teacher = self._logits(self.teacher, rows, self.common)
        bounded = bounded and _bounded(self.teacher)
        return Tile(student[:, : self.common], teacher, labels, full=full, finite=bounded)

    def _logits(self, logits: Tensor | HeadLogits, rows: slice, width: int) -> Tensor:
        if isinstance(logits, HeadLogits):
            return logits.tile(rows, width).to(self.dtype)
        return logits[rows, :width].to(self.dtype)


def _bounded(logits: Tensor | HeadLogits) -> bool:
    return isinstance(logits, HeadLogits) and (logits.bias is None or logits.softcap is not None)


def _flat(logits: Logits | None, matmul_dtype: torch.dtype | None) -> Logits | None:
    """Detached, with rows in one dimension and a head in the type its product runs in."""
    if logits is None:
        return None
    if isinstance(logits, SparseLogits):
        k = logits.shape[-1]
        return replace(logits, ids=logits.ids.reshape(-1, k), log_probs=logits.log_probs.detach().reshape(-1, k))
    if isinstance(logits, Tensor):
        return logits.detach().reshape(-1, logits.shape[-1])
    dtype = matmul_dtype or logits.weight.dtype
    bias = None if logits.bias is None else logits.bias.detach()
    return replace(logits, hidden=logits.hidden.detach().to(dtype), weight=logits.weight.detach().to(dtype), bias=bias)


def _source(student, teacher, divergences, labels, tile_bytes, tile_rows) -> _Source:
    if isinstance(student, SparseLogits):
        raise ValueError("a student cannot be SparseLogits; pass its logits or HeadLogits")
    anchor = student.weight if isinstance(student, HeadLogits) else student
    dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    device = anchor.device.type
    matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    common, second = anchor.shape[0] if anchor is not student else anchor.shape[-1], 0
    width = common
    if isinstance(teacher, SparseLogits):
        for divergence in divergences:
            check_tail(divergence, teacher)
    elif teacher is not None:
        common = second = min(width, teacher.shape[-1])
        if not any(getattr(d, "full_vocabulary", False) for d in divergences):
            width = common
    if teacher is not None and teacher.shape[:-1] != student.shape[:-1]:
        given = f"{tuple(student.shape[:-1])} and {tuple(teacher.shape[:-1])}"
        raise ValueError(f"student and teacher must have the same rows, got {given}")

    if tile_rows is None:
        budget = tile_bytes or (2**30 if device == "cuda" else 2**27)
        tile_rows = max(1, budget // (dtype.itemsize * max(1, width + second)))
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, got {tile_rows}")
    labels = None if labels is None else labels.reshape(-1)
    student, teacher = _flat(student, matmul_dtype), _flat(teacher, matmul_dtype)
    return _Source(student, teacher, labels, width, common, dtype, tile_rows)


class _Fused(torch.autograd.Function):
    """hidden rows × head → weighted sums per term (K,), with the gradient of Σ weight · sum already taken."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, source, divergences, weights, row_weight, grad):
        head = source.student
        need = [
            grad and x is not None and n for x, n in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        d_hidden, d_weight, d_bias = (
            torch.zeros(x.shape, dtype=source.dtype, device=x.device) if n else None
            for x, n in zip((hidden, weight, bias), need, strict=True)
        )
        gradient_weight = row_weight * weights[:, None]
        values = row_weight.new_zeros(row_weight.shape)
        for rows in source.slices():
            tile = source.tile(rows)
            g = row_weight.new_zeros(tile.full.student.shape) if any(need) else None
            for k, divergence in enumerate(divergences):
                values[k, rows] = value = divergence.value(tile)
                if g is not None:
                    tile.add_grad(divergence, value, gradient_weight[k, rows], g)
            if g is None:
                continue
            if head.softcap is not None:
                g *= 1 - (tile.full.student / head.softcap) ** 2
            del tile
            if head.scale != 1.0:
                g *= head.scale
            if d_bias is not None:
                d_bias[: source.width] += g.sum(0)
            if d_hidden is not None:
                d_hidden[rows] = g.to(head.weight.dtype) @ head.weight[: source.width]
            if d_weight is not None:
                _accumulate(d_weight[: source.width], g, head.hidden[rows])
        ctx.save_for_backward(weights, d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return _weighted(values, row_weight).sum(-1)

    @staticmethod
    def backward(ctx, grad_output):
        _refuse_double_backward("HeadLogits")
        weights, *gradients = ctx.saved_tensors
        factor = _factor(grad_output, weights)
        scaled = (None if g is None else (g * factor).to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))
        return (*scaled, *[None] * 5)


class _Dense(torch.autograd.Function):
    """(N, V) logits → values (K, N), differentiable per term and row; tiles are made again in the backward pass."""

    @staticmethod
    def forward(ctx, logits, source, divergences):
        ctx.save_for_backward(logits)
        ctx.source, ctx.divergences = source, divergences
        return _values(source, divergences)

    @staticmethod
    def backward(ctx, grad_output):
        _refuse_double_backward("logits")
        (logits,) = ctx.saved_tensors
        source = replace(ctx.source, student=logits.detach())
        out = torch.zeros(logits.shape, dtype=source.dtype, device=logits.device)
        for rows in source.slices():
            tile = source.tile(rows)
            for k, divergence in enumerate(ctx.divergences):
                tile.add_grad(divergence, divergence.value(tile), grad_output[k, rows], out[rows])
            del tile
        return out.to(logits.dtype), None, None


def _values(source: _Source, divergences: list[Divergence]) -> Tensor:
    values = torch.zeros(len(divergences), source.rows, dtype=source.dtype, device=_anchor(source.student).device)
    for rows in source.slices():
        tile = source.tile(rows)
        for k, divergence in enumerate(divergences):
            values[k, rows] = divergence.value(tile)
        del tile
    return values


def _anchor(logits: Tensor | HeadLogits) -> Tensor:
    return logits.hidden if isinstance(logits, HeadLogits) else logits


def _accumulate(d_weight: Tensor, g: Tensor, hidden: Tensor) -> None:
    """d_weight += gᵀ · hidden, summed in d_weight's own type; low precision inputs stay so on CUDA only."""
    if hidden.dtype == g.dtype or not hidden.is_cuda:
        torch.addmm(d_weight, g.T, hidden.to(g.dtype), out=d_weight)
    else:
        torch.addmm(d_weight, g.to(hidden.dtype).T, hidden, out_dtype=g.dtype, out=d_weight)


def _scalar(weight: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.detach().to(device, dtype)
    return torch.full((), weight, dtype=dtype, device=device)


def _weighted(values: Tensor, row_weight: Tensor) -> Tensor:
    return torch.where(row_weight == 0, 0.0, values * row_weight)


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"divergences of {name} can be differentiated once; for second derivatives (create_graph=True) write the "
            "divergence with torch operations on dense logits"
        )


def _factor(grad_output: Tensor, weights: Tensor) -> Tensor:
    """c of grad_output = c · weights."""
    c = (grad_output * weights).sum() / (weights * weights).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    torch._assert_async(
        torch.isclose(grad_output, c * weights, rtol=1e-4, atol=1e-12).all(),
        "terms of one projection were re-weighted after the call; give the weights to the call",
    )
    return c


def _row_weights(given, names: list[str], mask: Tensor | None, shape, reduction: str, like: Tensor, dtype) -> Tensor:
    """(K, N) factors of the values. The mean's denominator is the number of counted rows."""
    counted = torch.ones(shape, dtype=dtype, device=like.device) if mask is None else mask.detach().to(dtype)
    if counted.shape != shape:
        raise ValueError(f"mask must have the shape of the rows {tuple(shape)}, got {tuple(counted.shape)}")
    if reduction == "mean":
        counted = counted / counted.sum().clamp(min=1)
    if not isinstance(given, Mapping):
        given = dict.fromkeys(names, given)
    if unknown := set(given) - set(names):
        raise ValueError(f"row_weights name no term: {', '.join(sorted(unknown))}; terms are {', '.join(names)}")
    rows = [counted if given.get(n) is None else counted * given[n].detach().to(dtype) for n in names]
    return torch.stack(rows).reshape(len(names), -1)


def run_terms(
    student: Tensor | HeadLogits,
    teacher: Logits | None,
    terms: Mapping[str, tuple[Divergence, float | Tensor]],
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    row_weights: Tensor | Mapping[str, Tensor] | None = None,
    reduction: str = "mean",
    tile_bytes: int | None = None,
    tile_rows: int | None = None,
) -> dict[str, Tensor]:
    """Several divergences of the same rows, through one projection of the student.

    The caller's loss is Σ weight · value times one common factor. With HeadLogits the gradient is taken for these
    weights in the forward pass; backward fails when the values were weighted otherwise.

    Args:
        student: logits (..., V) or HeadLogits. float64 stays float64, else sums are float32.
        teacher: logits (..., V), HeadLogits or SparseLogits with the same rows, no gradient; None if no term needs one.
            Different vocabularies are compared on their common first entries; labels see the student's whole one.
        terms: name -> (divergence, weight); a weight may be a 0-d tensor.
        labels: (...) int64; negative ones count nothing in the label cross-entropy.
        mask: (...), 1 counts and 0 does not. None counts all. All zeros gives 0, not nan.
        row_weights: (...) factors of the rows, for all terms or per term by name; no gradient flows through them. A
            mean still divides by the number of counted rows.
        reduction: "mean" over counted rows, "sum", or "none" (dense logits only).
        tile_bytes: budget of one tile's student and teacher logits. Default 128 MiB, on CUDA 1 GiB.
        tile_rows: rows per tile, instead of a budget.

    Returns:
        name -> value, reduced and not multiplied by its weight.

    Raises:
        ValueError: reduction "none" with HeadLogits, or inputs that do not fit together.

    Example:
        >>> from hf_distill.losses import ForwardKL, LabelCrossEntropy
        >>> hidden, head = torch.ones(3, 2, requires_grad=True), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> terms = {"kl": (ForwardKL(), 0.5), "label": (LabelCrossEntropy(), 1.0)}
        >>> values = run_terms(HeadLogits(hidden, head), torch.zeros(3, 2), terms, labels=torch.tensor([0, 0, 1]))
        >>> (0.5 * values["kl"] + values["label"]).backward()
        >>> {name: round(value.item(), 4) for name, value in values.items()}
        {'kl': 0.1201, 'label': 0.6466}
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not terms:
        return {}
    divergences = [divergence for divergence, _ in terms.values()]
    source = _source(student, teacher, divergences, labels, tile_bytes, tile_rows)
    device, shape = _anchor(student).device, student.shape[:-1]
    row_weight = _row_weights(row_weights, list(terms), mask, shape, reduction, _anchor(student), source.dtype)
    with torch.autocast(device.type, enabled=False):
        if isinstance(student, HeadLogits):
            if reduction == "none":
                raise ValueError('reduction="none" needs dense logits; with HeadLogits weigh the rows by row_weights')
            weights = [_scalar(w, source.dtype, device) for _, w in terms.values()]
            out = _Fused.apply(
                student.hidden, student.weight, student.bias, source, divergences, torch.stack(weights), row_weight,
                torch.is_grad_enabled(),
            )  # fmt: skip
        else:
            rows = _Dense.apply(student.reshape(-1, student.shape[-1]), source, divergences)
            out = _weighted(rows, row_weight)
            out = out.reshape(len(terms), *shape) if reduction == "none" else out.sum(-1)
    return dict(zip(terms, out.unbind(0), strict=True))


@torch.no_grad()
def observe(
    student: Tensor | HeadLogits,
    teacher: Logits | None,
    metrics: Mapping[str, Divergence],
    *,
    labels: Tensor | None = None,
    tile_bytes: int | None = None,
    tile_rows: int | None = None,
) -> dict[str, Tensor]:
    """Values per row, without a gradient and without (N, V) tensors; arguments as in `run_terms`.

    Returns:
        name -> (...) values, one per row.

    Example:
        >>> from hf_distill.losses import Agreement
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> observe(logits, logits[:1].expand(2, 2), {"agreement": Agreement()})
        {'agreement': tensor([1., 0.])}
    """
    if not metrics:
        return {}
    source = _source(student, teacher, list(metrics.values()), labels, tile_bytes, tile_rows)
    with torch.autocast(_anchor(student).device.type, enabled=False):
        values = _values(source, list(metrics.values()))
    return dict(zip(metrics, values.reshape(len(metrics), *student.shape[:-1]).unbind(0), strict=True))


def one_term(
    student: Tensor | HeadLogits,
    teacher: Logits | None,
    divergence: Divergence,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """One divergence, reduced; arguments as in `run_terms`."""
    terms = {"value": (divergence, 1.0)}
    return run_terms(student, teacher, terms, labels=labels, mask=mask, reduction=reduction)["value"]
