"""ULD over rows of two heads: tile by tile over aligned groups, with the gradient taken in the forward pass.

Whole-vocabulary rows are needed for the sort, but only those of one tile stand in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_distill.losses.source import TILE_BYTES
from hf_distill.signals import HeadLogits, upcast

LEAST_LOG = math.log(1e-8)  # of a merged token's probability
COPIES = 8  # of a tile's probabilities that stand at once: logits, both softmaxes, sorted values and their places

Distance = Callable[[Tensor, Tensor], Tensor]


class Tile(NamedTuple):
    """A run of groups and the rows that they span."""

    groups: slice
    student: slice
    teacher: slice


def aligned_sum(
    student: Tensor | HeadLogits,
    teacher: Tensor | HeadLogits,
    student_labels: Tensor,
    teacher_labels: Tensor,
    groups: Tensor,
    weights: Tensor,
    distance: Distance,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    tile_bytes: int | None = None,
) -> Tensor:
    """Σ_g weights_g · distance(q_g, p_g) over groups of rows that predict the same bytes ("bayesian", see `uld_loss`).

    A group's distribution is its last row's, times the probabilities of its earlier tokens.

    Args:
        student, teacher: rows (N, V) and (N', V'), each with its own tokens; no gradient into the teacher.
        student_labels, teacher_labels: (N,), (N',) the tokens that the rows predict.
        groups: (G, 4) int64, first and last + 1 row of the student, and of the teacher; ascending, none empty.
        weights: (G,).
        distance: probabilities (g, V), (g, V') -> (g,).
        tile_bytes: budget of one tile; memory only, results do not depend on it. A group is never cut.

    Returns:
        scalar; 0 with a zero gradient without groups. Double backward is refused.
    """
    width = student.shape[-1] + teacher.shape[-1]
    budget = tile_bytes or TILE_BYTES["cpu" if groups.device.type == "cpu" else "cuda"]
    tiles = _tiles(groups, max(1, budget // (4 * COPIES * width)))
    weights = weights.detach()

    def run(own: Tensor | HeadLogits, tile: Tile) -> Tensor:
        mine, theirs = groups[tile.groups].split(2, dim=1)
        q = _merged(own, student_labels[tile.student], mine - tile.student.start, student_temperature)
        with torch.no_grad():
            rows = _rows(teacher, tile.teacher)
            p = _merged(rows, teacher_labels[tile.teacher], theirs - tile.teacher.start, teacher_temperature)
        return (distance(q, p) * weights[tile.groups].to(q.dtype)).sum()

    parts = (student, None, None)
    if isinstance(student, HeadLogits):
        parts = (student.hidden, student.weight, student.bias)
    return _Tiled.apply(*parts, student, run, tiles, torch.is_grad_enabled())


def _rows(logits: Tensor | HeadLogits, rows: slice) -> Tensor | HeadLogits:
    return replace(logits, hidden=logits.hidden[rows]) if isinstance(logits, HeadLogits) else logits[rows]


def _merged(logits: Tensor | HeadLogits, labels: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """(g, V) probabilities of groups [first, last + 1) of rows."""
    dense = logits.dense() if isinstance(logits, HeadLogits) else upcast(logits)
    log_probs = (dense / temperature).log_softmax(-1)
    lengths = groups[:, 1] - groups[:, 0]
    merged = log_probs[groups[:, 1] - 1]
    if bool((lengths > 1).any()):
        owner = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), lengths)
        place = torch.arange(len(owner), device=groups.device) - (lengths.cumsum(0) - lengths)[owner]
        rows, earlier = groups[owner, 0] + place, place < lengths[owner] - 1
        rows, owner = rows[earlier], owner[earlier]
        own = log_probs[rows, labels[rows]].clamp(min=LEAST_LOG)
        merged = merged + merged.new_zeros(len(groups)).index_add(0, owner, own)[:, None]
    return merged.exp()


def _tiles(groups: Tensor, rows: int) -> list[Tile]:
    """Runs of groups that span at most `rows` rows on either side, at least one group each."""
    spans = groups.tolist()
    cuts = [0] if spans else []
    for i, (_, s_end, _, t_end) in enumerate(spans):
        s_first, _, t_first, _ = spans[cuts[-1]]
        if i > cuts[-1] and max(s_end - s_first, t_end - t_first) > rows:
            cuts.append(i)
    pairs = zip(cuts, [*cuts[1:], len(spans)], strict=True) if spans else ()
    return [
        Tile(slice(a, b), slice(spans[a][0], spans[b - 1][1]), slice(spans[a][2], spans[b - 1][3])) for a, b in pairs
    ]


class _Tiled(torch.autograd.Function):
    """Rows × head (or dense rows) -> the sum over tiles; their gradient is kept, no tile is."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, student, run, tiles, grad):
        given = (hidden, weight, bias)
        need = [grad and x is not None and n for x, n in zip(given, ctx.needs_input_grad[:3], strict=True)]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kept = [torch.zeros_like(x, dtype=wide) if n else None for x, n in zip(given, need, strict=True)]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for tile in tiles:
            rows = tile.student
            own = [hidden[rows], weight, bias]
            own = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(own, need, strict=True)]
            with torch.set_grad_enabled(any(need)):
                head = replace(student, hidden=own[0], weight=own[1], bias=own[2]) if weight is not None else own[0]
                value = run(head, tile)
            total += value.detach()
            if any(need):
                found = iter(torch.autograd.grad(value, [x for x, n in zip(own, need, strict=True) if n]))
                for i, n in enumerate(need):
                    if n:
                        kept[i][rows if i == 0 else ...] += next(found)
        ctx.gradients, ctx.dtypes = kept, [None if x is None else x.dtype for x in given]
        ctx.save_for_backward(total)  # what refuses a second backward without retain_graph
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        _ = ctx.saved_tensors
        gradients = [
            None if g is None else (g * grad_output).to(t) for g, t in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 4)
