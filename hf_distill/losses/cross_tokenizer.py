"""Universal logit distillation: teacher and student with different tokenizers (ULD, as in TRL's GOLD trainer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.signals import upcast

STRATEGIES = ("bayesian", "observed")
Groups = list[list[int]]


def align_bytes(
    student_offsets: Sequence[Sequence[int]], teacher_offsets: Sequence[Sequence[int]]
) -> tuple[Groups, Groups]:
    """Groups of tokens of two tokenizations that cover the same bytes.

    Args:
        student_offsets, teacher_offsets: [[start, end], ...] in bytes of the same text. A group closes whenever both
            sides reach the same byte; what is left over forms one last pair, one side of which may be empty.

    Returns:
        (student_groups, teacher_groups), equally many lists of token indices.

    Example:
        >>> align_bytes([[0, 1], [1, 3], [3, 4]], [[0, 3], [3, 4]])
        ([[0, 1], [2]], [[0], [1]])
    """
    groups: tuple[Groups, Groups] = ([], [])
    s = t = s_start = t_start = 0
    while s < len(student_offsets) and t < len(teacher_offsets):
        s_end, t_end = int(student_offsets[s][1]), int(teacher_offsets[t][1])
        s += s_end <= t_end
        t += t_end <= s_end
        if s_end == t_end:
            groups[0].append(list(range(s_start, s)))
            groups[1].append(list(range(t_start, t)))
            s_start, t_start = s, t
    if s < len(student_offsets) or t < len(teacher_offsets):
        groups[0].append(list(range(s_start, len(student_offsets))))
        groups[1].append(list(range(t_start, len(teacher_offsets))))
    return groups


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    student_input_ids: Tensor,
    teacher_input_ids: Tensor,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    strategy: str = "bayesian",
    skip_eos: bool = True,
    student_offsets=None,
    teacher_offsets=None,
    student_vocab: Mapping[str, int] | None = None,
    teacher_vocab: Mapping[str, int] | None = None,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    beta: float = 0.5,
    crossentropy_weight: float = 0.0,
    distillation_weight: float = 1.0,
) -> Tensor:
    """Σ |sorted q - sorted p| per aligned position of the answers; mean over positions, then over the batch.

    Args:
        student_logits, teacher_logits: (B, S, V), each side with its own S and V; no gradient into the teacher.
        student_labels, teacher_labels: (B, S), not shifted; the answer is what is not -100.
        student_input_ids, teacher_input_ids: (B, S), read for tokens that are merged.
        student_temperature, teacher_temperature: divide the logits. Default 1.0.
        strategy: "bayesian" (default) compares the distributions that predict the answer's tokens; "observed" those one
            position later, TRL's default.
        skip_eos: leave out the last token of each answer.
        student_offsets, teacher_offsets: (B, S, 2) tensor or nested lists, byte offsets per position: compare groups of
            tokens that cover the same bytes instead of position by position.
        student_vocab, teacher_vocab: token -> id: tokens of both vocabularies are compared directly, by a generalised
            Jensen-Shannon divergence of weight `matched_weight`, and only the others sorted.
        matched_weight, unmatched_weight: None weighs by the share of the teacher's vocabulary that is matched.
        beta: of that divergence, see GeneralizedJSD.
        crossentropy_weight, distillation_weight: of the student's label cross-entropy and of all the above.

    Returns:
        scalar, 0 with a zero gradient where nothing aligns.

    Raises:
        ValueError: an unknown strategy, a temperature that is not positive, beta outside [0, 1], or one of a pair of
            arguments without the other.

    Example:
        >>> ids = torch.tensor([[3, 0, 1, 2]])
        >>> labels = torch.tensor([[-100, 0, 1, 2]])
        >>> teacher = torch.eye(4)[None] * 3
        >>> round(uld_loss(torch.zeros(1, 4, 4), teacher, labels, labels, ids, ids).item(), 4)
        1.2401
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if min(student_temperature, teacher_temperature) <= 0:
        raise ValueError(f"temperatures must be positive, got {student_temperature} and {teacher_temperature}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    pairs = {
        "student_offsets and teacher_offsets": (student_offsets, teacher_offsets),
        "student_vocab and teacher_vocab": (student_vocab, teacher_vocab),
        "matched_weight and unmatched_weight": (matched_weight, unmatched_weight),
    }
    for names, (first, second) in pairs.items():
        if (first is None) != (second is None):
            raise ValueError(f"{names} go together; give both or neither")

    matched = None
    if student_vocab is not None:
        matched = matched_ids(student_vocab, teacher_vocab, student_logits.shape[-1], teacher_logits.shape[-1])
    student_offsets, teacher_offsets = (
        x.tolist() if isinstance(x, Tensor) else x for x in (student_offsets, teacher_offsets)
    )
    losses = []
    for i in range(len(student_logits)):
        offsets = None if student_offsets is None else (student_offsets[i], teacher_offsets[i])
        groups = _groups(student_labels[i], teacher_labels[i], offsets, strategy, skip_eos)
        if not groups[0]:
            losses.append(upcast(student_logits[i, :1]).sum() * 0.0)
            continue
        q = _merge(student_logits[i], student_input_ids[i], groups[0], student_temperature, strategy)
        p = _merge(teacher_logits[i].detach(), teacher_input_ids[i], groups[1], teacher_temperature, strategy)
        if matched is None:
            losses.append(sorted_distance(q, p).mean())
        else:
            losses.append(hybrid_distance(q, p, *matched, matched_weight, unmatched_weight, beta).mean())
    loss = distillation_weight * torch.stack(losses).mean()
    if crossentropy_weight:
        logits, labels = upcast(student_logits[:, :-1]).flatten(0, 1), student_labels[:, 1:].flatten()
        count = (labels != -100).sum().clamp(min=1)
        loss = loss + crossentropy_weight * F.cross_entropy(logits, labels, reduction="sum") / count
    return loss


def _groups(student_labels: Tensor, teacher_labels: Tensor, offsets, strategy: str, skip_eos: bool):
    """Aligned groups of sequence positions of both answers."""
    answers = [x.ne(-100).nonzero().squeeze(-1).tolist() for x in (student_labels, teacher_labels)]
    if skip_eos:
        answers = [x[:-1] for x in answers]
    if offsets is None:
        groups = [[[position] for position in x[: min(map(len, answers))]] for x in answers]
    else:
        own = [[o[position] for position in x] for o, x in zip(offsets, answers, strict=True)]
        aligned = align_bytes(*own)
        groups = [[[x[k] for k in group] for group in g] for x, g in zip(answers, aligned, strict=True)]
    kept = [(s, t) for s, t in zip(*groups, strict=True) if s and t]
    if strategy == "bayesian":  # nothing predicts the first token of a sequence
        kept = [(s, t) for s, t in kept if s[0] > 0 and t[0] > 0]
    return [s for s, _ in kept], [t for _, t in kept]


def _merge(logits: Tensor, input_ids: Tensor, groups: Groups, temperature: float, strategy: str) -> Tensor:
    """(len(groups), V): one row's distribution per group, times the probabilities of its other tokens."""
    shift = 1 if strategy == "bayesian" else 0
    positions = sum(groups, [])
    probs = (upcast(logits[torch.tensor(positions, device=logits.device) - shift]) / temperature).softmax(-1)
    row = {position: k for k, position in enumerate(positions)}
    merged = []
    for group in groups:
        base, others = (group[-1], group[:-1]) if strategy == "bayesian" else (group[0], group[1:])
        distribution = probs[row[base]]
        for position in others:
            distribution = distribution * probs[row[position], input_ids[position]].clamp(min=1e-8)
        merged.append(distribution)
    return torch.stack(merged)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """(N,) Σ |sorted q - sorted p| of probabilities (N, V) and (N, V'), the shorter rows filled up with zeros."""
    width = max(q.shape[-1], p.shape[-1])
    q, p = (F.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)


def matched_ids(
    student_vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], student_size: int, teacher_size: int
) -> tuple[Tensor, Tensor]:
    """Ids (M,), (M,) of the tokens both vocabularies know, in the teacher's order."""
    both = sorted((i, student_vocab[token]) for token, i in teacher_vocab.items() if token in student_vocab)
    both = [(t, s) for t, s in both if t < teacher_size and s < student_size]
    pairs = torch.tensor(both, dtype=torch.int64).reshape(-1, 2)
    return pairs[:, 1], pairs[:, 0]


def hybrid_distance(
    q: Tensor,
    p: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    matched_weight: float | None,
    unmatched_weight: float | None,
    beta: float,
) -> Tensor:
    """(N,) divergence of the matched tokens' probabilities, and `sorted_distance` of the others; see `uld_loss`."""
    if matched_weight is None:
        matched_weight = len(teacher_ids) / p.shape[-1]
        unmatched_weight = 1 - matched_weight
    log_q, log_p = q[:, student_ids].clamp(min=1e-8).log(), p[:, teacher_ids].clamp(min=1e-8).log()
    distance = matched_weight * _jsd(log_q, log_p, beta).sum(-1)
    q, p = (_without(x, ids) for x, ids in ((q, student_ids), (p, teacher_ids)))
    if q.shape[-1] and p.shape[-1]:  # a side without unmatched tokens has nothing to compare with, as in TRL
        distance = distance + unmatched_weight * sorted_distance(q, p)
    return distance


def _jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Terms of the generalised Jensen-Shannon divergence of log-probabilities that need not sum to 1."""
    if beta in (0, 1):
        return log_p.exp() * (log_p - log_q) if beta == 0 else log_q.exp() * (log_q - log_p)
    m = (1 - beta) * log_q.exp() + beta * log_p.exp()
    return beta * log_p.exp() * (log_p - m.log()) + (1 - beta) * log_q.exp() * (log_q - m.log())


def _without(x: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(x.shape[-1], dtype=torch.bool, device=x.device)
    keep[ids] = False
    return x[:, keep]
