"""Contrastive losses against memory banks: one row per example of the training set."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.losses.precision import exactly, unit


@exactly
def crd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    contrast_index: Tensor,
    temperature: float = 0.07,
    z_student: Tensor | float | None = None,
    z_teacher: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrastive representation distillation (1910.10699): each network's embedding against the other one's bank.

    A score is exp(m · v / T) / Z. With P_n = 1 / n_data and K negatives, each side's loss is
    -(1/B) [Σ log(P / (P + K P_n + 1e-7)) + Σ_negatives log(K P_n / (P_neg + K P_n + 1e-7))].

    Args:
        student_embedding, teacher_embedding: (B, D), of length 1; both are learned, gradient flows into both.
        student_bank, teacher_bank: (n_data, D), constants.
        contrast_index: (B, 1 + K) rows of the banks; column 0 is the example itself.
        z_student: the constant Z of the student embedding's scores (against the teacher's bank), z_teacher of the
            teacher embedding's; None estimates it as mean(exp(m · v / T)) · n_data over these scores.

    Returns:
        (loss, z_student, z_teacher), the constants without gradient.

    Raises:
        ValueError: shapes that do not fit each other; no negatives.
    """
    if not student_embedding.shape == teacher_embedding.shape or student_bank.shape != teacher_bank.shape:
        raise ValueError(
            f"embeddings {tuple(student_embedding.shape)} and {tuple(teacher_embedding.shape)} must have one shape, "
            f"so must banks {tuple(student_bank.shape)} and {tuple(teacher_bank.shape)}"
        )
    if student_bank.shape[1:] != student_embedding.shape[1:]:
        raise ValueError(
            f"banks {tuple(student_bank.shape)} hold embeddings of another width than {tuple(student_embedding.shape)}"
        )
    if contrast_index.dim() != 2 or len(contrast_index) != len(student_embedding) or contrast_index.shape[1] < 2:
        raise ValueError(
            f"contrast_index must be ({len(student_embedding)}, 1 + negatives), column 0 the example's own row, got "
            f"{tuple(contrast_index.shape)}"
        )
    ours, z_student = _scores(student_embedding, teacher_bank.detach(), contrast_index, temperature, z_student)
    theirs, z_teacher = _scores(teacher_embedding, student_bank.detach(), contrast_index, temperature, z_teacher)
    return _side(ours, len(student_bank)) + _side(theirs, len(student_bank)), z_student, z_teacher


@torch.no_grad()
def crd_update(
    bank: Tensor, embedding: Tensor, index: Tensor, momentum: float = 0.5, *, inplace: bool = False
) -> Tensor:
    """The bank with rows `index` moved: m ← normalise(momentum · m + (1 - momentum) · embedding).

    Args:
        bank: (n_data, D). A copy is changed unless `inplace`.
        embedding: (B, D). Where a row occurs twice in `index`, its last embedding counts.
        index: (B,) int64.
    """
    position = torch.arange(len(index), device=bank.device)
    last = position.new_zeros(len(bank)).scatter_reduce_(0, index, position, "amax")[index]
    rows = unit(momentum * bank[index] + (1 - momentum) * embedding.to(bank)[last])
    return (bank if inplace else bank.clone()).index_copy_(0, index, rows)


def _scores(embedding: Tensor, bank: Tensor, index: Tensor, temperature: float, z) -> tuple[Tensor, Tensor]:
    """(B, 1 + K) scores under their constant."""
    if len(bank) <= index.shape[1] * bank.shape[1]:  # the product with the whole bank is smaller than the drawn rows
        similarity = (embedding @ bank.T).gather(1, index)
    else:
        similarity = torch.linalg.vecdot(bank[index], embedding[:, None])
    scores = (similarity / temperature).exp()
    z = scores.detach().mean() * len(bank) if z is None else torch.as_tensor(z, device=scores.device).to(scores)
    return scores / z, z


def _side(scores: Tensor, n_data: int) -> Tensor:
    noise = (scores.shape[1] - 1) / n_data
    positive, negative = scores[:, 0], scores[:, 1:]
    right = (positive / (positive + noise + 1e-7)).log().sum()
    wrong = (noise / (negative + noise + 1e-7)).log().sum()
    return -(right + wrong) / len(scores)
