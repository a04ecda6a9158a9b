"""Augmentation that learns: families of differentiable transforms whose widths are trained against the student.

Pictures are (B, channels, H, W) with black at 0 and white at 1. What a family draws for a picture depends on its key
alone, not on the batch, rank or device it is met on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, pad

from hf_distill.curricula.draws import GOLDEN, mix

SAMPLED = 4096  # values of a picture that its key is made of
WIDTH_START, WIDTH_LIMIT = -1.5, 3.0


def picture_keys(pictures: Tensor, *numbers: int | Tensor) -> Tensor:
    """(B,) int64, decided by each picture's own values and by the numbers (seed, step…); equal pictures share one."""
    flat = pictures.detach().float().flatten(1)
    bits = flat[:, :: math.ceil(flat.shape[1] / SAMPLED)].contiguous().view(torch.int32).long()
    key = mix(bits + GOLDEN * torch.arange(1, bits.shape[1] + 1, device=bits.device)).sum(1)
    for number in numbers:
        key = mix(key + GOLDEN * (torch.as_tensor(number, device=key.device) + 1))
    return key


def uniform(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 within (-1, 1), decided by the keys."""
    numbers = mix(keys[:, None] + GOLDEN * torch.arange(1, count + 1, device=keys.device))
    return ((numbers & (2**24 - 1)).float() + 0.5) / 2**23 - 1


@dataclass(frozen=True)
class Affine:
    """Shift, rotation, scale and shear, each drawn evenly within a learned width; bilinear, black outside.

    theta_j = limit_j · sigmoid(w_j) · u_j with u_j in (-1, 1); w_j is learned, from -1.5, within [-3, 3].

    Attributes:
        shift: widest, in units where a picture goes from -1 to 1 (0.5 is 4 of 16 pixels).
        rotation: in degrees.
        scale, shear: exp(theta) times as large; slanted by theta.
    """

    shift: float = 0.5
    rotation: float = 30.0
    scale: float = 0.3
    shear: float = 0.3

    names = ("shift_x", "shift_y", "rotation", "log_scale", "shear")

    def start(self) -> dict[str, Tensor]:
        """What is learned, at its start."""
        return {"widths": torch.full((len(self.names),), WIDTH_START)}

    def __call__(self, pictures: Tensor, learned: dict[str, Tensor], keys: Tensor) -> Tensor:
        """The pictures, transformed in float32 at least; differentiable by `learned`."""
        pictures = pictures if pictures.dtype == torch.float64 else pictures.float()
        limits = [self.shift, self.shift, math.radians(self.rotation), self.scale, self.shear]
        width = torch.tensor(limits, device=pictures.device) * learned["widths"].sigmoid()
        x, y, angle, scale, shear = (width * uniform(keys, len(limits))).to(pictures.dtype).unbind(-1)
        cos, sin, size = angle.cos(), angle.sin(), scale.exp()
        # out to in: shear, then rotation, then scale
        first = torch.stack([size * cos, size * (shear * cos - sin), x], -1)
        second = torch.stack([size * sin, size * (shear * sin + cos), y], -1)
        with torch.autocast(pictures.device.type, enabled=False):
            grid = affine_grid(torch.stack([first, second], 1), list(pictures.shape), align_corners=False)
            return grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def describe(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The present widths, as shares of their limits."""
        return {f"width_{name}": w for name, w in zip(self.names, learned["widths"].sigmoid(), strict=True)}


@dataclass(frozen=True)
class PixelMix:
    """Brightness, contrast, saturation, blur and noise, each of a learned strength, mixed by learned softmax weights.

    Attributes:
        brightness: most that is added or taken away.
        contrast: exp(theta) times as much, theta up to this; likewise of colour, where there are three channels.
        blur: most that is replaced by the mean of 3 x 3 pixels.
        noise: largest standard deviation.
    """

    brightness: float = 0.4
    contrast: float = 0.7
    saturation: float = 1.0
    blur: float = 1.0
    noise: float = 0.2

    names = ("brightness", "contrast", "saturation", "blur", "noise")

    def start(self) -> dict[str, Tensor]:
        return {"widths": torch.full((len(self.names),), WIDTH_START), "mixture": torch.zeros(len(self.names))}

    def __call__(self, pictures: Tensor, learned: dict[str, Tensor], keys: Tensor) -> Tensor:
        """The pictures, changed in float32 at least; differentiable by `learned`."""
        x = pictures if pictures.dtype == torch.float64 else pictures.float()
        limits = torch.tensor([getattr(self, name) for name in self.names], device=x.device)
        drawn = uniform(keys, len(self.names) + x[0].numel()).to(x.dtype)
        strength = (limits * learned["widths"].sigmoid()).to(x.dtype) * drawn[:, : len(self.names)]
        brightness, contrast, saturation, blur, noise = strength[:, :, None, None, None].unbind(1)
        grain = math.sqrt(3) * drawn[:, len(self.names) :].reshape(x.shape)  # of standard deviation 1
        mean, grey = x.mean((1, 2, 3), keepdim=True), x.mean(1, keepdim=True)
        smooth = avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        changed = [
            x + brightness,
            mean + contrast.exp() * (x - mean),
            grey + saturation.exp() * (x - grey),
            x + blur.abs() * (smooth - x),
            x + noise.abs() * grain,
        ]
        shares = learned["mixture"].softmax(-1).to(x.dtype)
        return sum(share * picture for share, picture in zip(shares, changed, strict=True))

    def describe(self, learned: dict[str, Tensor]) -> dict[str, Tensor]:
        widths, shares = learned["widths"].sigmoid(), learned["mixture"].softmax(-1)
        out = {f"width_{name}": width for name, width in zip(self.names, widths, strict=True)}
        return out | {f"share_{name}": share for name, share in zip(self.names, shares, strict=True)}


FAMILIES = {"affine": Affine, "pixel_mix": PixelMix}


def within_range(augmented: Tensor, pictures: Tensor) -> Tensor:
    """The augmented pictures cut to 0 to 1, or to the range of the picture itself where that is wider."""
    low, high = (getattr(pictures, end)((1, 2, 3), keepdim=True) for end in ("amin", "amax"))
    return augmented.clamp(low.clamp(max=0.0), high.clamp(min=1.0))


def save_grid(rows: list[Tensor], path) -> None:
    """Write rows of pictures (each (n, channels, H, W), 0 to 1) as one PNG, every picture at least 64 pixels high."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(row), -1) for row in rows], -2).detach().float().cpu().clamp(0, 1)
    grid = grid[:3] if grid.shape[0] >= 3 else grid[:1].expand(3, -1, -1)
    times = max(1, 64 // rows[0].shape[-2])
    grid = grid.repeat_interleave(times, 1).repeat_interleave(times, 2)
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
