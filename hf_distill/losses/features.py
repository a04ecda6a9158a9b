"""Feature losses: two networks' intermediate outputs compared place by place. Means over all that is compared.

Inputs of any float type, computed in float32 (float64 stays). The teacher's are constants.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, mse_loss

from hf_distill.losses.precision import exactly, unit


@exactly
def fitnet_loss(student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
    """FitNet's hint (1412.6550): mean squared difference over all elements; the regressor came before.

    Args:
        student_features, teacher_features: of one shape.
        mask: (B, N) of features (B, N, D): the mean of each example over the positions that are 1, then over examples.

    Raises:
        ValueError: two shapes.
    """
    check_same_shape(student_features, teacher_features)
    error = (student_features - teacher_features.detach()).square()
    return error.mean() if mask is None else _masked_mean(error.mean(-1), mask)


@exactly
def at_loss(student_map: Tensor, teacher_map: Tensor, p: int = 2, mask: Tensor | None = None) -> Tensor:
    """Attention transfer (1612.03928), one stage: mean (a_s - a_t)², a = the mean over channels of F^p, at length 1.

    Args:
        student_map, teacher_map: (B, C, H, W), any channels; the larger map is average-pooled to the smaller.
        mask: (B, H, W) of maps of one size: what is 0 is left out, as in `fitnet_loss`.

    Raises:
        ValueError: not maps, or of two batches.
    """
    check_maps(student_map, teacher_map)
    size = tuple(min(a, b) for a, b in zip(student_map.shape[2:], teacher_map.shape[2:], strict=True))
    kept = None if mask is None else mask.flatten(1).to(student_map)
    ours, theirs = (_attention(x, size, p, kept) for x in (student_map, teacher_map.detach()))
    error = (ours - theirs).square()
    return error.mean() if kept is None else _masked_mean(error, kept)


@exactly
def hcl_loss(student_map: Tensor, teacher_map: Tensor, levels: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    """Hierarchical context loss of ReviewKD (2104.09044), one stage.

    The squared error of the maps and of their averages over a level × level grid, for levels below the height, with
    weights 1, then ½, ¼, … in the order used; divided by the sum of the weights.

    Raises:
        ValueError: not maps of one shape.
    """
    check_maps(student_map, teacher_map)
    check_same_shape(student_map, teacher_map)
    teacher_map = teacher_map.detach()
    loss, weight, total = mse_loss(student_map, teacher_map), 1.0, 1.0
    for level in levels:
        if level >= student_map.shape[2]:
            continue
        weight /= 2
        total += weight
        loss = loss + weight * mse_loss(*(adaptive_avg_pool2d(x, level) for x in (student_map, teacher_map)))
    return loss / total


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} differ in shape: "
            "project the student's first (hf_distill.students.projectors)"
        )


def check_maps(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ValueError(
            f"this loss compares maps (batch, channels, height, width) of one batch, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: turn tokens into maps first (hf_distill.students.projectors.as_map)"
        )


def _attention(x: Tensor, size: tuple[int, int], p: int, kept: Tensor | None) -> Tensor:
    x = x if x.shape[2:] == size else adaptive_avg_pool2d(x, size)
    energy = x.pow(p).mean(1).flatten(1)
    return unit(energy if kept is None else energy * kept)


def _masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """(B, N) errors: the mean of each example over its positions, then over examples."""
    mask = mask.to(error)
    return ((error * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
