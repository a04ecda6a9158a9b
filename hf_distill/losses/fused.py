"""Rows of two models through any number of divergences, with one projection of the student.

HeadLogits go through row tiles and take the gradient in the forward pass, so that no (N, V) tensor ever exists: exactly
one projection of the student, one of the teacher and the two products of the student's gradient. Dense logits stay
differentiable per row. A tile's size is a memory knob only: results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_distill.losses.engines import Compiled, Eager, Plan, choose, cut, say
from hf_distill.losses.source import Source, kind_of, make_source, pick
from hf_distill.losses.tile import Divergence
from hf_distill.signals import HeadLogits, Logits

REDUCTIONS = ("mean", "sum", "none")


class _Fused(torch.autograd.Function):
    """hidden rows × head → weighted sums per term (K,) and values (K, N); the gradient of Σ weight · sum is taken."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, source, engine, weights, row_weight, grad):
        head = source.student
        need = [
            grad and x is not None and n for x, n in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        d_hidden = torch.empty_like(head.hidden) if need[0] else None
        d_weight = torch.empty(weight.shape, dtype=source.dtype, device=weight.device) if need[1] else None
        d_bias = torch.zeros(bias.shape, dtype=source.dtype, device=bias.device) if need[2] else None
        gradient_weight = row_weight * weights[:, None]
        values = torch.empty_like(row_weight)
        for rows in source.tiles():
            for own, block in source.blocks(rows):
                values[:, own] = engine(own, block, gradient_weight[:, own], block.student if any(need) else None)
            if not any(need):
                continue
            g = source.product(rows)
            if d_bias is not None:
                d_bias[: source.width] += g.sum(0, dtype=source.dtype)
            if d_hidden is not None:
                torch.mm(g, head.weight[: source.width], out=d_hidden[rows])
            if d_weight is not None:
                _accumulate(d_weight[: source.width], g, head.hidden[rows], first=rows.start == 0)
        if d_weight is not None:
            d_weight[source.width if source.rows else 0 :] = 0
        ctx.save_for_backward(weights)
        ctx.gradients = [d_hidden, d_weight, d_bias]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(values)
        return _weighted(values, row_weight).sum(-1), values

    @staticmethod
    def backward(ctx, grad_output, _):
        _refuse_double_backward("HeadLogits")
        (weights,) = ctx.saved_tensors  # also what refuses a second backward without retain_graph
        factor, gradients = _factor(grad_output, weights), ctx.gradients
        if _graph_is_kept():
            gradients = [None if g is None else g * factor.to(g.dtype) for g in gradients]
        else:  # nobody reads them again: a head's gradient is too large to copy
            ctx.gradients = None
            gradients = [None if g is None else g.mul_(factor) for g in gradients]
        return (*(None if g is None else g.to(t) for g, t in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5)


class _Dense(torch.autograd.Function):
    """(N, V) logits → values (K, N), differentiable per term and row; tiles are made again in the backward pass."""

    @staticmethod
    def forward(ctx, logits, source, engine):
        ctx.save_for_backward(logits)
        ctx.source, ctx.engine = replace(source, buffers={}), engine
        return _values(source, engine)

    @staticmethod
    def backward(ctx, grad_output):
        _refuse_double_backward("logits")
        (logits,) = ctx.saved_tensors
        source = replace(ctx.source, student=logits.detach())
        out = torch.zeros_like(logits)
        for rows in source.tiles():
            for own, block in source.blocks(rows):
                ctx.engine(own, block, grad_output[:, own], out[own, : source.width])
        return out, None, None


def _values(source: Source, engine: Eager | Compiled) -> Tensor:
    terms = len(engine.plan.divergences)
    values = torch.empty(terms, source.rows, dtype=source.dtype, device=source.device)
    for rows in source.tiles():
        for own, block in source.blocks(rows):
            values[:, own] = engine(own, block, values[:, own], None)
    return values


def _setup(student, teacher, divergences: list[Divergence], moving: list[bool], labels, tile_bytes, tile_rows, engine):
    """The source of the rows and the engine that runs the terms on them."""
    dtype, device = kind_of(student)
    plan = Plan.of(divergences, moving, dtype, device)
    compared = {
        slot for d, slot in zip(divergences, plan.slots, strict=True) if not getattr(d, "full_vocabulary", False)
    }
    temperatures = [t if slot in compared else None for slot, t in enumerate(plan.temperatures)]
    kind = choose(engine, student, device)
    source = make_source(student, teacher, divergences, temperatures, labels, tile_bytes, tile_rows, kind)
    return source, kind(plan, dtype)


def _accumulate(d_weight: Tensor, g: Tensor, hidden: Tensor, first: bool) -> None:
    """d_weight += gᵀ · hidden (= for the first tile), summed in d_weight's own type, into which a CPU casts inputs."""
    if g.dtype != d_weight.dtype and g.is_cuda:
        if first:
            d_weight.zero_()
        torch.addmm(d_weight, g.T, hidden, out_dtype=d_weight.dtype, out=d_weight)
        return
    g, hidden = g.to(d_weight.dtype), hidden.to(d_weight.dtype)
    if first:
        torch.mm(g.T, hidden, out=d_weight)
    else:
        torch.addmm(d_weight, g.T, hidden, out=d_weight)


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


def _graph_is_kept() -> bool:
    """Whether this backward pass retains the graph; True where torch does not tell."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _factor(grad_output: Tensor, weights: Tensor) -> Tensor:
    """c of grad_output = c · weights."""
    c = (grad_output * weights).sum() / (weights * weights).sum().clamp(min=torch.finfo(weights.dtype).tiny)
    torch._assert_async(
        torch.isclose(grad_output, c * weights, rtol=1e-4, atol=1e-12).all(),
        "terms of one projection were re-weighted after the call; give the weights to the call",
    )
    return c


def _row_weights(given, names: list[str], mask: Tensor | None, shape, reduction: str, device, dtype) -> Tensor:
    """(K, N) factors of the values. The mean's denominator is the number of counted rows."""
    counted = torch.ones(shape, dtype=dtype, device=device) if mask is None else mask.detach().to(dtype)
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
    per_row: dict[str, Tensor] | None = None,
    tile_bytes: int | None = None,
    tile_rows: int | None = None,
    engine: str | None = None,
) -> dict[str, Tensor]:
    """Several divergences of the same rows, through one projection of the student.

    The caller's loss is Σ weight · value times one common factor. With HeadLogits the gradient is taken for these
    weights in the forward pass; backward fails when the values were weighted otherwise.

    Args:
        student: logits (..., V) or HeadLogits. float64 stays float64, else sums are float32.
        teacher: logits (..., V), HeadLogits, SparseLogits, SampledLogits or MixtureLogits with the same rows, no
            gradient; None if no term needs one. Different vocabularies are compared on their common first entries;
            labels see the student's whole one.
        terms: name -> (divergence, weight); a weight may be a 0-d tensor. `metrics` are terms too (weight 0).
        labels: (...) int64; negative ones count nothing in the label cross-entropy.
        mask: (...), 1 counts and 0 does not. None counts all. All zeros gives 0, not nan. Masked rows of HeadLogits
            are not projected (finding them waits for a GPU: index the rows beforehand where that matters).
        row_weights: (...) factors of the rows, for all terms or per term by name; no gradient flows through them. A
            mean still divides by the number of counted rows.
        reduction: "mean" over counted rows, "sum", or "none" (dense logits only).
        per_row: a dict to be filled with name -> (...) values per row, detached, 0 where masked.
        tile_bytes: budget of one tile's student and teacher products. Default 128 MiB, on CUDA 1 GiB, or more where
            256 rows need it.
        tile_rows: rows per tile, instead of a budget.
        engine: "eager", "compile" (torch.compile of the tile stage; eager where it does not work), or "auto" (None):
            compile for HeadLogits of at least 16,384 entries.

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
    by_head = isinstance(student, HeadLogits)
    if by_head and reduction == "none":
        raise ValueError(
            'reduction="none" needs dense logits; with HeadLogits weigh the rows by row_weights and read per_row'
        )
    if not terms:
        return {}
    divergences, shape = [divergence for divergence, _ in terms.values()], student.shape[:-1]
    dtype, device = kind_of(student)
    row_weight = _row_weights(row_weights, list(terms), mask, shape, reduction, device, dtype)
    index = None
    if by_head and mask is not None:
        index = mask.nonzero().flatten()
        student, teacher = pick(student, index), pick(teacher, index)
        labels, row_weight = None if labels is None else labels[index], row_weight[:, index]
        divergences = [cut(divergence, index) for divergence in divergences]
    moving = [not (by_head and isinstance(w, (int, float)) and w == 0) for _, w in terms.values()]
    source, run = _setup(student, teacher, divergences, moving, labels, tile_bytes, tile_rows, engine)
    with torch.autocast(device.type, enabled=False):
        if by_head:
            weights = torch.stack([_scalar(w, dtype, device) for _, w in terms.values()])
            out, rows = _Fused.apply(
                student.hidden, student.weight, student.bias, source, run, weights, row_weight,
                torch.is_grad_enabled(),
            )  # fmt: skip
            say(run, source.tile_rows)
        else:
            rows = _Dense.apply(student.reshape(-1, student.shape[-1]), source, run)
            out = _weighted(rows, row_weight)
            out = out.reshape(len(terms), *shape) if reduction == "none" else out.sum(-1)
    if per_row is not None:
        rows = rows.detach()
        if index is not None:
            rows = rows.new_zeros(len(terms), *shape).index_copy_(1, index, rows)
        elif mask is not None:
            rows = rows.where(mask.reshape(-1) != 0, 0.0)
        per_row |= zip(terms, rows.reshape(len(terms), *shape).unbind(0), strict=True)
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
    engine: str | None = None,
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
    source, run = _setup(
        student, teacher, list(metrics.values()), [False] * len(metrics), labels, tile_bytes, tile_rows, engine
    )
    with torch.autocast(source.device.type, enabled=False):
        values = _values(source, run)
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
