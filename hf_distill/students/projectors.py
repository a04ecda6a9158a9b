"""Projectors: a student's features in the form, size and width of its teacher's.

Features come in three forms, told apart by rank: pooled (B, D), tokens (B, N, D) and maps (B, C, H, W). Tokens of an
image stand for a square grid after their prefix tokens ([CLS], distillation, registers); tokens of a text for a line.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

FORMS = {2: "pooled", 3: "tokens", 4: "map"}
PREFIX_TOKENS = ("cls_token", "distillation_token", "register_tokens")
PRESETS = ("uniform", "last", "skip")


def form_of(shape) -> str:
    """ "pooled", "tokens" or "map". Raises ValueError for another rank."""
    if len(shape) not in FORMS:
        raise ValueError(f"features must be (B, D), tokens (B, N, D) or maps (B, C, H, W), got {tuple(shape)}")
    return FORMS[len(shape)]


def width_of(shape) -> int:
    """Channels of a map, else the last dimension."""
    return shape[1] if form_of(shape) == "map" else shape[-1]


def prefix_tokens(model: nn.Module) -> int | None:
    """How many tokens stand before the grid of an image model's tokens; None for a model of texts."""
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        return None
    return sum(p.shape[-2] for name, p in model.named_parameters() if name.endswith(PREFIX_TOKENS))


def as_map(features: Tensor, prefix: int | None = 0) -> Tensor:
    """Tokens (B, N, D) as a map (B, D, H, W) without their prefix; a map as it is.

    Args:
        prefix: tokens before the grid; None takes them for a text, a line (B, D, N, 1).

    Raises:
        ValueError: pooled features; tokens that are no square grid.
    """
    form = form_of(features.shape)
    if form == "map":
        return features
    if form == "pooled":
        raise ValueError(f"pooled features {tuple(features.shape)} have no places: tap a layer before the pooling")
    if prefix is None:
        return features.mT[..., None]
    grid = features[:, prefix:]
    side = math.isqrt(grid.shape[1])
    if side * side != grid.shape[1] or not side:
        raise ValueError(f"{features.shape[1]} tokens, {prefix} of them a prefix, are no square grid")
    return grid.mT.unflatten(2, (side, side))


def as_pooled(features: Tensor, prefix: int | None = 0, mask: Tensor | None = None) -> Tensor:
    """The mean over places, (B, D); of tokens without their prefix, of texts over the positions whose mask is 1."""
    form = form_of(features.shape)
    if form == "pooled":
        return features
    if form == "map":
        return features.mean((2, 3))
    if mask is None:
        return features[:, prefix or 0 :].mean(1)
    mask = mask.to(features)[..., None]
    return (features * mask).sum(1) / mask.sum(1).clamp(min=1)


def resized(features: Tensor, size: tuple[int, int]) -> Tensor:
    """A map at another size: averaged where it shrinks, else interpolated."""
    if features.shape[2:] == size:
        return features
    if all(new <= old for new, old in zip(size, features.shape[2:], strict=True)):
        return adaptive_avg_pool2d(features, size)
    return interpolate(features, size, mode="bilinear", align_corners=False)


class Projector(nn.Module):
    """(student features, teacher features) -> both in one form and shape, the student's through a trained linear map.

    Pooled where either side is pooled, tokens where both are tokens of texts or of one grid, else maps. Where widths
    are equal nothing is trained.

    Args:
        student_shape, teacher_shape: of one batch; only rank, width and, for a regressor, height and width matter.
        student_prefix, teacher_prefix: see `prefix_tokens`.
        regressor: FitNet's, for maps: a convolution that also does the resizing, BatchNorm and ReLU.

    Raises:
        ValueError: other ranks than those of `form_of`; a regressor from a smaller map to one that is not its double.
    """

    def __init__(
        self,
        student_shape,
        teacher_shape,
        student_prefix: int | None = 0,
        teacher_prefix: int | None = 0,
        *,
        regressor: bool = False,
    ):
        super().__init__()
        self.prefixes = (student_prefix, teacher_prefix)
        forms = {form_of(student_shape), form_of(teacher_shape)}
        texts = student_prefix is None and teacher_prefix is None
        same_grid = student_shape[1] - (student_prefix or 0) == teacher_shape[1] - (teacher_prefix or 0)
        self.form = "pooled" if "pooled" in forms else "map"
        if forms == {"tokens"} and (texts or same_grid):
            self.form = "tokens"
        narrow, wide = width_of(student_shape), width_of(teacher_shape)
        if self.form == "map" and regressor:
            shapes = (
                as_map(torch.empty(s, device="meta"), p).shape
                for s, p in zip((student_shape, teacher_shape), self.prefixes, strict=True)
            )
            self.map = conv_regressor(*shapes)
        elif narrow == wide:
            self.map = nn.Identity()
        elif self.form == "map":
            self.map = nn.Conv2d(narrow, wide, 1, bias=False)
        else:
            self.map = nn.Linear(narrow, wide)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both features, aligned. `mask` (B, N) of a text's positions is read where tokens are pooled."""
        ours, theirs = (self._in_form(x, p, mask) for x, p in zip((student, teacher), self.prefixes, strict=True))
        weight = next(self.parameters(), ours)
        ours = self.map(ours.to(weight.dtype))
        return (resized(ours, tuple(theirs.shape[2:])) if self.form == "map" else ours), theirs

    def _in_form(self, features: Tensor, prefix: int | None, mask: Tensor | None) -> Tensor:
        if self.form == "pooled":
            return as_pooled(features, prefix, mask if prefix is None else None)
        return features[:, prefix or 0 :] if self.form == "tokens" else as_map(features, prefix)


def conv_regressor(student_shape, teacher_shape) -> nn.Sequential:
    """FitNet's regressor between maps (B, C, H, W): a convolution from one size to the other, BatchNorm, ReLU."""
    (_, narrow, *ours), (_, wide, *theirs) = student_shape, teacher_shape
    if ours == [2 * side for side in theirs]:
        conv = nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
    elif [2 * side for side in ours] == theirs:
        conv = nn.ConvTranspose2d(narrow, wide, 4, stride=2, padding=1)
    elif all(a >= b for a, b in zip(ours, theirs, strict=True)):
        conv = nn.Conv2d(narrow, wide, tuple(1 + a - b for a, b in zip(ours, theirs, strict=True)))
    else:
        raise ValueError(
            f"FitNet's regressor goes from a larger map to a smaller one or doubles it, not from {ours} to {theirs}: "
            "choose other layers, or regressor=False"
        )
    return nn.Sequential(conv, nn.BatchNorm2d(wide), nn.ReLU())


def layer_pairs(layers, student_layers: int, teacher_layers: int) -> list[tuple]:
    """(student, teacher) taps: indices into `hidden_states` of a preset, or the given pairs.

    Args:
        layers: "uniform" (layer i of n learns from i · m / n of m, rounded; the last from the last), "last" (the last n
            of the teacher), "skip" (every ⌊m / n⌋-th from below), or pairs of paths or indices.
        student_layers, teacher_layers: n and m, without the embeddings (index 0).

    Raises:
        ValueError: an unknown preset; a preset where the student has more layers than the teacher; pairs that are none.
    """
    n, m = student_layers, teacher_layers
    if not isinstance(layers, str):
        pairs = [tuple(pair) for pair in layers]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"layers must be (student, teacher) pairs or one of {', '.join(PRESETS)}, got {layers!r}")
        return pairs
    if layers not in PRESETS:
        raise ValueError(
            f"unknown layers {layers!r}; choose one of {', '.join(PRESETS)}, or give (student, teacher) pairs"
        )
    if not 0 < n <= m:
        raise ValueError(f'layers="{layers}" needs a teacher at least as deep as its student, got {m} layers for {n}')
    place = {"uniform": lambda i: round(i * m / n), "last": lambda i: m - n + i, "skip": lambda i: i * (m // n)}
    return [(i, place[layers](i)) for i in range(1, n + 1)]
