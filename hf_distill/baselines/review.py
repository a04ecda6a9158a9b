"""ReviewKD: the student's stages, fused from deep to shallow, against the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from hf_distill.baselines.features import TapsFeatures
from hf_distill.losses import hcl_loss
from hf_distill.signals import Signals
from hf_distill.students.projectors import as_map, resized, width_of


class AttentionFusion(nn.Module):
    """One stage: (its map, the deeper stage's fused map) -> (a map as the teacher's, its fused map).

    Args:
        width, middle, out: channels of the student's stage, of all fused maps, of the teacher's stage.
        deepest: there is nothing deeper to fuse with.
    """

    def __init__(self, width: int, middle: int, out: int, *, deepest: bool):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(nn.Conv2d(middle, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.gate = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for block in (self.enter, self.leave):
            nn.init.kaiming_uniform_(block[0].weight, a=1)

    def forward(self, own: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        own = self.enter(own)
        if self.gate is not None:
            deeper = interpolate(deeper, own.shape[2:], mode="nearest")
            gate = self.gate(torch.cat([own, deeper], 1))
            own = own * gate[:, :1] + deeper * gate[:, 1:]
        if own.shape[2:] != size:
            own = interpolate(own, size, mode="nearest")
        return self.leave(own), own


class ReviewHint(TapsFeatures):
    """ReviewKD (2104.09044): CE + ramp · Σ over stages of HCL between fused student and teacher; see `losses.hcl_loss`.

    Args:
        layers: from shallow to deep; every stage or layer of the student, spread over the teacher's, by default.
        width: of the fused maps; None takes the deepest student stage's, at most 512.
        fuse: False takes the minimal form, a 1x1 convolution per stage.
        weight: 1 (the paper's depends on the pair); warmup: 20 of 240 epochs.
    """

    def __init__(
        self,
        layers="uniform",
        *,
        width: int | None = None,
        fuse: bool = True,
        weight: float = 1.0,
        label_weight: float = 1.0,
        warmup: float = 20 / 240,
        **options,
    ):
        super().__init__(layers, weight=weight, label_weight=label_weight, warmup=warmup, **options)
        self.width, self.fuse = width, fuse
        if fuse:
            self.couples_batch = "its fusion blocks normalise over the batch (BatchNorm)"

    def build(self, shapes: list[tuple]) -> None:
        widths = [tuple(map(width_of, pair)) for pair in shapes]
        middle = self.width or min(512, widths[-1][0])
        if not self.fuse:
            self.blocks = nn.ModuleList(nn.Conv2d(*pair, 1, bias=False) for pair in widths)
            return
        self.blocks = nn.ModuleList(
            AttentionFusion(ours, middle, theirs, deepest=i == len(widths) - 1)
            for i, (ours, theirs) in enumerate(widths)
        )

    def names(self) -> tuple[str, ...]:
        return ("review",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        total, deeper = 0.0, None
        for pair, block in zip(reversed(self.tapped(student, teacher)), reversed(self.blocks), strict=True):
            ours, theirs = (as_map(x, prefix) for x, prefix in zip(pair, self.prefixes, strict=True))
            ours, size = ours.to(next(block.parameters()).dtype), tuple(theirs.shape[2:])
            if self.fuse:
                ours, deeper = block(ours, deeper, size)
            else:
                ours = resized(block(ours), size)
            total = total + hcl_loss(ours, theirs)
        return {"review": total}
