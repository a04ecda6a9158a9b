"""Logit losses of classification students: means over the batch, T² inside, no cross-entropy added.

Logits are (B, C) of any float type, computed in float32 (float64 stays). The teacher's are a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.losses.functional import forward_kl
from hf_distill.losses.precision import exactly


@exactly
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton's knowledge distillation (1503.02531): T² · mean_i KL(p_t ‖ p_s), p = softmax(z / T).

    Raises:
        ValueError: logits that are not (B, C), other shapes of the two, a temperature not positive.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(kd_loss(z, z.flip(-1), temperature=1.0).item(), 4)
        1.5232
    """
    check_logits(student_logits, teacher_logits, temperature)
    return temperature**2 * forward_kl(student_logits, teacher_logits, temperature=temperature)


@exactly
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (2203.08679): alpha · TCKD + beta · NCKD; see `dkd_terms`."""
    target, others = dkd_terms(student_logits, teacher_logits, labels, temperature)
    return alpha * target + beta * others


@exactly
def dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0
) -> tuple[Tensor, Tensor]:
    """TCKD, T² · KL of (p_y, 1 - p_y), and NCKD, T² · KL of the softmax over the classes other than y; means.

    With two classes NCKD is 0: there is one other class.

    Args:
        labels: (B,) classes, or (B, C) probabilities, of which the largest is y.

    Raises:
        ValueError: as `kd_loss`; labels of another batch; fewer than two classes.
    """
    check_logits(student_logits, teacher_logits, temperature, classes=2)
    target = one_hot(labels, student_logits)
    ours, theirs = student_logits / temperature, teacher_logits.detach() / temperature
    both = forward_kl(_against_others(ours, target), _against_others(theirs, target))
    ours, theirs = (z.masked_fill(target, -torch.inf) for z in (ours, theirs))
    return temperature**2 * both, temperature**2 * forward_kl(ours, theirs)


@exactly
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 4.0,
) -> Tensor:
    """DIST (2205.10536): beta · inter + gamma · intra; see `dist_terms`. Needs a batch of at least two."""
    inter, intra = dist_terms(student_logits, teacher_logits, temperature)
    return beta * inter + gamma * intra


@exactly
def dist_terms(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """T² · (1 - mean Pearson correlation) of the probabilities: of each example's classes, of each class's examples.

    Raises:
        ValueError: as `kd_loss`; a batch of one, whose columns have no correlation.
    """
    check_logits(student_logits, teacher_logits, temperature)
    if len(student_logits) < 2:
        raise ValueError("the intra-class term of DIST correlates examples: it needs a batch of at least 2, got 1")
    ours, theirs = (z.div(temperature).softmax(-1) for z in (student_logits, teacher_logits.detach()))
    scale = temperature**2
    return scale * (1 - _pearson(ours, theirs).mean()), scale * (1 - _pearson(ours.T, theirs.T).mean())


@exactly
def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Normalised knowledge distillation (2303.13005): target + gamma · non-target; see `nkd_terms`."""
    target, others = nkd_terms(student_logits, teacher_logits, labels, temperature)
    return target + gamma * others


@exactly
def nkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """-mean p_t,y · log p_s,y at temperature 1; T² · mean cross-entropy of the softmaxes over the other classes at T.

    Cross-entropies, not divergences: at equal logits they are the teacher's entropy, not 0.

    Args:
        labels: (B,) classes, or (B, C) probabilities, of which the largest is y.

    Raises:
        ValueError: as `dkd_terms`.
    """
    check_logits(student_logits, teacher_logits, temperature, classes=2)
    target, theirs = one_hot(labels, student_logits), teacher_logits.detach()
    confidence = (theirs.softmax(-1) * target).sum(-1)
    right = -(confidence * student_logits.log_softmax(-1).masked_fill(~target, 0.0).sum(-1)).mean()
    q = (theirs / temperature).masked_fill(target, -torch.inf).softmax(-1)
    log_q = (student_logits / temperature).masked_fill(target, -torch.inf).log_softmax(-1)
    return right, -(temperature**2) * (q * log_q.masked_fill(target, 0.0)).sum(-1).mean()


@exactly
def standardize_logits(logits: Tensor) -> Tensor:
    """Logit standardisation (2403.01427): (z - mean_c z) / (1e-7 + std_c z), the unbiased deviation over classes.

    Applied to both models before `kd_loss` or `dkd_loss`; gradient flows through mean and deviation.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"standardised logits need at least 2 classes, got shape {tuple(logits.shape)}")
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


def check_logits(student: Tensor, teacher: Tensor, temperature: float, classes: int = 1) -> None:
    """Raises ValueError for what the losses of this file cannot compare."""
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must both be (batch, classes), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: give both models the same num_labels"
        )
    if student.shape[1] < classes:
        raise ValueError(f"this loss compares classes with each other: it needs {classes}, got {student.shape[1]}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """(B, C) bool, True at the class of each label; soft labels (B, C) count as their largest class."""
    soft = labels.is_floating_point()
    if labels.shape != (logits.shape if soft else logits.shape[:1]):
        raise ValueError(
            f"labels must be ({len(logits)},) classes or {tuple(logits.shape)} probabilities, got "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    index = labels.argmax(-1) if soft else labels
    return index[:, None] == torch.arange(logits.shape[1], device=logits.device)


def _against_others(logits: Tensor, target: Tensor) -> Tensor:
    """(B, 2): the target's logit, and what stands for all other classes; their softmax is (p_y, 1 - p_y)."""
    own = logits.masked_fill(~target, 0.0).sum(-1)
    return torch.stack([own, logits.masked_fill(target, -torch.inf).logsumexp(-1)], -1)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1) + 1e-8)
