"""Exit branches: small networks from a stage of a student to class logits of their own (OFA-KD, 2310.19444)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.students.projectors import as_map, as_pooled, form_of, width_of

GRID = 7  # side of the patch grid down to which tokens are merged
HEADS = 4


def exit_branch(shape, stage: int, width: int, classes: int, prefix: int | None) -> nn.Module:
    """A branch (features, mask) -> class logits for features of this shape.

    Args:
        shape: of a batch: a map (B, C, H, W), or tokens (B, N, D).
        stage: 1 to 4; 4 is the end of the student, an earlier branch has more layers.
        width: at the branch's end.
        prefix: tokens before the grid; None for a text.
    """
    if form_of(shape) == "map":
        return MapBranch(width_of(shape), stage, width, classes)
    side = 0 if prefix is None else as_map(torch.empty(shape, device="meta"), prefix).shape[-1]
    return TokenBranch(width_of(shape), stage, width, classes, prefix, side)


class MapBranch(nn.Module):
    """4 - stage depthwise-separable blocks that halve the map and double its channels, mean over places, linear."""

    def __init__(self, channels: int, stage: int, width: int, classes: int):
        super().__init__()
        doubled = [channels * 2**i for i in range(4 - stage)]
        sizes = [*doubled, width]
        blocks = [separable(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        self.blocks = nn.Sequential(*(blocks or [nn.Conv2d(channels, width, 1)]))
        self.head = nn.Linear(width, classes)
        initialise(self)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.blocks(features.to(self.head.weight.dtype)).mean((2, 3)))


def separable(narrow: int, wide: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(narrow, narrow, 3, stride=2, padding=1, groups=narrow, bias=False),
        nn.Conv2d(narrow, narrow, 1, bias=False),
        nn.BatchNorm2d(narrow),
        nn.ReLU(),
        nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow, bias=False),
        nn.Conv2d(narrow, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU(),
    )


class TokenBranch(nn.Module):
    """Patches merged 2 x 2 down to a 7 x 7 grid, transformer blocks, the first prefix token or the mean, linear.

    A text's tokens are not merged; its padding is masked and its tokens averaged. A grid too small to merge, and prefix
    tokens of another width, get a linear map to the branch's width [ours].
    """

    def __init__(self, width: int, stage: int, out: int, classes: int, prefix: int | None, side: int):
        super().__init__()
        self.prefix = prefix
        merges = max(int(math.log2(side / GRID)), 0) if side else 0
        self.merges = nn.ModuleList(Merge(out if i else width, out, last=i == merges - 1) for i in range(merges))
        self.enter = nn.Linear(width, out) if width != out and (prefix or not merges) else nn.Identity()
        heads = math.gcd(HEADS, out)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(out, heads, 4 * out, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(max(4 - stage, 1))
        )
        self.head = nn.Linear(out, classes)
        initialise(self)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        x, prefix = features.to(self.head.weight.dtype), self.prefix or 0
        if self.merges:
            grid = as_map(x, prefix)
            for merge in self.merges:
                grid = merge(grid)
            x = torch.cat([self.enter(x[:, :prefix]), grid.flatten(2).mT], 1)
        else:
            x = self.enter(x)
        padding = None if mask is None else mask == 0
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return self.head(x[:, 0] if prefix else as_pooled(x, self.prefix, mask))


class Merge(nn.Module):
    """Each 2 x 2 patches of a map (B, D, H, W) as one: LayerNorm(4 D), linear, GELU unless it is the last."""

    def __init__(self, width: int, out: int, *, last: bool):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * width), nn.Linear(4 * width, out)
        self.activation = nn.Identity() if last else nn.GELU()

    def forward(self, grid: Tensor) -> Tensor:
        grid = F.pad(grid, (0, grid.shape[3] % 2, 0, grid.shape[2] % 2))
        four = F.pixel_unshuffle(grid, 2).permute(0, 2, 3, 1)
        return self.activation(self.linear(self.norm(four))).permute(0, 3, 1, 2)


def initialise(branch: nn.Module) -> None:
    """Convolutions Kaiming normal (fan out), linear maps truncated normal 0.02, biases 0."""
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
            nn.init.zeros_(module.in_proj_bias)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
