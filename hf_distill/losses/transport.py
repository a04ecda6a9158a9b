"""Entropic optimal transport between the rows of a batch: a set of student distributions against the teacher's set.

Iterations run in log space, so that no epsilon gives a division by zero. The teacher's rows are constants.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_distill.losses.precision import exactly
from hf_distill.signals import HeadLogits, Logits, MixtureLogits, SampledLogits, SparseLogits, upcast

TILE_BYTES = 2**27


@exactly
def sinkhorn_cost(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """(B, B') L1 distances Σ_c |x_ic - y_jc|, 0 to 2, of the rows of softmax(student / T) and softmax(teacher / T).

    Args:
        student_logits, teacher_logits: (B, C) and (B', C), any float type; of texts the valid tokens' rows, flat.

    Raises:
        ValueError: logits that are not two-dimensional, or of other classes; a temperature not positive.

    Example:
        >>> z = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> [[round(d, 4) for d in row] for row in sinkhorn_cost(z, z, temperature=1.0).tolist()]
        [[0.0, 1.9995], [1.9995, 0.0]]
    """
    if student_logits.dim() != 2 or teacher_logits.dim() != 2 or student_logits.shape[1] != teacher_logits.shape[1]:
        raise ValueError(
            f"logits must be (rows, classes) with the same classes, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: of (batch, tokens, vocabulary) take the valid tokens as rows"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student, teacher = (z.div(temperature).softmax(-1) for z in (student_logits, teacher_logits.detach()))
    return torch.cdist(student, teacher, p=1)


@exactly
def sinkhorn_plan(cost: Tensor, epsilon: float = 0.1, iterations: int = 20) -> Tensor:
    """The transport plan of a cost (B, B): exp(-cost / epsilon), rows and then columns brought to sum 1, repeatedly.

    Columns come last and sum to 1; rows do as iterations grow (see `row_error`). The total mass is B. Gradient flows
    through all iterations.

    Raises:
        ValueError: a cost that is no matrix, an epsilon not positive, fewer than 1 iteration.

    Example:
        >>> sinkhorn_plan(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), epsilon=1e-3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if cost.dim() != 2:
        raise ValueError(f"cost must be a matrix, got {tuple(cost.shape)}")
    if not 1e-30 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive (1e-30 at least), got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    log_plan = cost / -epsilon
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(1).log_softmax(0)
    return log_plan.exp()


def sinkhorn_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """Σ_ij plan_ij · cost_ij of `sinkhorn_cost` and `sinkhorn_plan`: a sum, which grows with the rows.

    Not 0 for equal sets (entropic bias), but it goes there with epsilon when the rows differ from each other.

    Raises:
        ValueError: as those two; other numbers of rows.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits must have one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    cost = sinkhorn_cost(student_logits, teacher_logits, temperature)
    return (sinkhorn_plan(cost, epsilon, iterations) * cost).sum()


def row_error(plan: Tensor) -> Tensor:
    """Mean |row sum - 1| of a plan, what its iterations have left: 0 at convergence, 2 at most."""
    return (plan.detach().sum(1) - 1).abs().mean()


# ---- large vocabularies ----------------------------------------------------------------------------------------------
@torch.no_grad()
def top_entries(
    logits: Logits, k: int, temperature: float, vocabulary: int | None = None, tile_bytes: int | None = None
) -> SparseLogits:
    """The k most likely entries of each row, normalised over the first `vocabulary`; a tile of rows at a time.

    Args:
        logits: (N, V) of any kind but draws; what is sparse already stays as it is.

    Raises:
        ValueError: logits known by draws, without the mass of the rest, or sparse ones of another temperature.
    """
    if isinstance(logits, SampledLogits):
        raise ValueError(
            "a teacher known by draws gives no distances between rows: keep its top-k, its logits or its hidden states"
        )
    if isinstance(logits, SparseLogits):
        if logits.tail != "bucket":
            raise ValueError(f'distances between rows need the mass of the rest, tail="bucket", got {logits.tail!r}')
        if logits.temperature not in (None, temperature):
            raise ValueError(
                f"the teacher's log-probabilities have temperature {logits.temperature}, the transport cost "
                f'{temperature}: store them at that temperature, or hidden states (mode "hidden")'
            )
        return logits
    width = min(logits.shape[-1], vocabulary or logits.shape[-1])
    tiles = [
        log_probs_of(logits, rows, temperature, width).topk(min(k, width))
        for rows in _tiles(logits.shape[0], width, tile_bytes)
    ]
    log_probs, ids = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    return SparseLogits(ids, log_probs, temperature=temperature)


def topk_cost(
    student_logits: Tensor | HeadLogits,
    teacher: SparseLogits,
    temperature: float = 2.0,
    vocabulary: int | None = None,
    tile_bytes: int | None = None,
) -> Tensor:
    """(N, M) L1 distances, to each teacher row on its own k entries and one for the rest; no (N, V) tensor.

    Below the distance over the whole vocabulary by at most twice what the teacher's row has in the rest, equal to it
    for k = V. The student's probabilities are exact: normalised over the first `vocabulary` entries (None: all).

    Args:
        student_logits: (N, V) or HeadLogits; differentiable.
        teacher: (M, k) log-probabilities at this temperature, see `top_entries`.
    """
    width = min(student_logits.shape[-1], vocabulary or student_logits.shape[-1])
    known = teacher.log_probs.isfinite() & (teacher.ids < width)
    ids = teacher.ids.clamp(max=width - 1)
    picked = _columns(student_logits, ids.flatten()) / temperature
    log_q = picked - _normaliser(student_logits, temperature, width, tile_bytes)[:, None]
    q = log_q.exp().unflatten(1, ids.shape) * known
    p = teacher.log_probs.detach().to(q).exp().where(known, 0.0)
    return (q - p).abs().sum(-1) + (q.sum(-1) - p.sum(-1)).abs()


def log_probs_of(logits: Logits, rows: slice, temperature: float, vocabulary: int | None = None) -> Tensor:
    """(rows, vocabulary) log-probabilities of some rows of dense logits, a head's or a mixture's."""
    if not isinstance(logits, MixtureLogits):
        return (_tile(logits, rows, vocabulary) / temperature).log_softmax(-1)
    weights = logits.weights if logits.weights.dim() == 1 else logits.weights[rows]
    weights = upcast(weights)[..., None, :].unbind(-1)  # one (rows, 1) or (1,) per part
    if logits.space == "logit":
        z = sum(w * _tile(part, rows, vocabulary) for w, part in zip(weights, logits.parts, strict=True))
        return (z / temperature).log_softmax(-1)
    parts = (log_probs_of(part, rows, temperature, vocabulary) for part in logits.parts)
    return torch.stack([w.log() + part for w, part in zip(weights, parts, strict=True)]).logsumexp(0)


def _tile(logits: Tensor | HeadLogits, rows: slice, vocabulary: int | None) -> Tensor:
    return logits.tile(rows, vocabulary) if isinstance(logits, HeadLogits) else upcast(logits[rows, :vocabulary])


def _columns(logits: Tensor | HeadLogits, ids: Tensor) -> Tensor:
    """(N, len(ids)) logits of some entries of the vocabulary."""
    if not isinstance(logits, HeadLogits):
        return upcast(logits.index_select(1, ids))
    bias = None if logits.bias is None else logits.bias[ids]
    return replace(logits, weight=logits.weight.index_select(0, ids), bias=bias).dense()


def _normaliser(logits: Tensor | HeadLogits, temperature: float, width: int, tile_bytes: int | None) -> Tensor:
    """(N,) logsumexp of logits / T; of a head the tiles are made again in the backward pass."""
    if not isinstance(logits, HeadLogits):
        return (upcast(logits[:, :width]) / temperature).logsumexp(-1)

    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        own = replace(logits, hidden=hidden, weight=weight, bias=bias)
        return (own.tile(slice(None), width) / temperature).logsumexp(-1)

    parts = [
        checkpoint(of, logits.hidden[rows], logits.weight, logits.bias, use_reentrant=False, preserve_rng_state=False)
        for rows in _tiles(logits.shape[0], width, tile_bytes)
    ]
    return torch.cat(parts)


def _tiles(count: int, width: int, tile_bytes: int | None) -> list[slice]:
    """Slices of rows whose logits take a tile's bytes; one of no rows where there are none."""
    size = max((tile_bytes or TILE_BYTES) // (4 * width), 1)
    return [slice(i, min(i + size, count)) for i in range(0, max(count, 1), size)]
