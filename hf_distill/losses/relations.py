"""Relation losses: what examples of a batch are to each other, compared between two networks.

Inputs of any float type, computed in float32 (float64 stays). A batch of one has no relations and is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from hf_distill.losses.precision import exactly, unit


@exactly
def rkd_loss(
    student_features: Tensor, teacher_features: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Relational knowledge distillation (1904.05068): weighted distance and angle terms; see `rkd_terms`."""
    distance, angle = rkd_terms(student_features, teacher_features)
    return distance_weight * distance + angle_weight * angle


@exactly
def rkd_terms(student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth L1 of pairwise distances, each network's divided by their mean, and of the angles of all triples.

    Args:
        student_features, teacher_features: (B, …), flattened; the teacher's is a constant. Memory grows with
            B² · width and B³.

    Raises:
        ValueError: two batches, or a batch of one.
    """
    ours, theirs = _of_one_batch("RKD", student_features, teacher_features.detach())
    ours, theirs = ours[None] - ours[:, None], theirs[None] - theirs[:, None]
    distance = smooth_l1_loss(_relative_distances(ours), _relative_distances(theirs))
    ours, theirs = unit(ours), unit(theirs)
    return distance, smooth_l1_loss(ours @ ours.mT, theirs @ theirs.mT)


@exactly
def sp_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity preserving (1907.09682): ‖G_t - G_s‖² / B², G the (B, B) inner products with rows at length 1.

    Args:
        student_features, teacher_features: (B, …), flattened; widths may differ. The teacher's is a constant.

    Raises:
        ValueError: two batches, or a batch of one.
    """
    ours, theirs = _of_one_batch("SP", student_features, teacher_features.detach())
    return (unit(theirs @ theirs.T) - unit(ours @ ours.T)).square().mean()


@exactly
def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Correlation congruence as the literature ran it: mean over neighbours i, i + 1 of the batch of Σ_d δ_i · δ_i+1.

    δ = |e_s - e_t|. Both embeddings are learned, so gradient flows into both.

    Raises:
        ValueError: two shapes, or a batch of one.
    """
    if student_embedding.shape != teacher_embedding.shape:
        raise ValueError(
            f"embeddings must have one shape, got {tuple(student_embedding.shape)} and "
            f"{tuple(teacher_embedding.shape)}: embed both into the same width first"
        )
    ours, theirs = _of_one_batch("CC", student_embedding, teacher_embedding)
    delta = (ours - theirs).abs()
    return (delta[:-1] * delta[1:]).sum(-1).mean()


def _of_one_batch(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher features must be of one batch, got {len(student)} and {len(teacher)}")
    if len(student) < 2:
        raise ValueError(f"{name} compares the examples of a batch with each other: it needs at least 2, got 1")
    return student.flatten(1), teacher.flatten(1)


def _relative_distances(difference: Tensor) -> Tensor:
    """(B, B) euclidean distances over their mean; the diagonal, 0, does not count."""
    size = len(difference)
    other = ~torch.eye(size, dtype=torch.bool, device=difference.device)
    distance = difference.square().sum(-1).clamp(min=1e-12).sqrt() * other
    return distance / (distance.sum() / (size * (size - 1)))
