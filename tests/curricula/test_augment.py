"""Learned augmentation: identity at width 0, known transforms, gradients, and draws that a picture alone decides."""

import math

import pytest
import torch
from PIL import Image

from hf_distill.curricula.augment import FAMILIES, Affine, PixelMix, picture_keys, save_grid, uniform, within_range

torch.set_num_threads(1)
PICTURES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def learned(family, width: float) -> dict:
    return family.start() | {"widths": torch.full((5,), width, dtype=torch.float64)}


# ---- draws -----------------------------------------------------------------------------------------------------------
def test_what_is_drawn_for_a_picture_depends_on_its_batch():
    keys = picture_keys(PICTURES, 3, 7)
    assert len(keys.unique()) == 4
    assert torch.equal(keys[2:], picture_keys(PICTURES[2:].clone(), 3, 7))
    assert torch.equal(keys, picture_keys(PICTURES, 3, torch.tensor(7)))
    for numbers in ((3, 8), (4, 7), (7, 3)):
        assert not set(keys.tolist()) & set(picture_keys(PICTURES, *numbers).tolist())
    large = torch.rand(2, 3, 64, 64)
    assert len(picture_keys(large).unique()) == 2


def test_draws_are_not_even():
    drawn = uniform(picture_keys(torch.rand(200, 1, 4, 4)), 50)
    assert drawn.abs().max() < 1 and drawn.mean().abs() < 0.02
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert torch.corrcoef(drawn[:, :10].T).sub(torch.eye(10)).abs().max() < 0.35
    assert drawn.quantile(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([-0.5, 0.5], abs=0.03)


# ---- families --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_no_width_changes_the_picture_and_width_does_not(name):
    family, keys = FAMILIES[name](), picture_keys(PICTURES)
    torch.testing.assert_close(family(PICTURES, learned(family, -40.0), keys), PICTURES, atol=1e-6, rtol=0)
    changed = [(family(PICTURES, learned(family, w), keys) - PICTURES).abs().mean() for w in (-3.0, 0.0, 3.0)]
    assert 0 < changed[0] < changed[1] < changed[2]
    assert set(family.describe(family.start())) >= {f"width_{name}" for name in family.names}
    assert family.describe(family.start())[f"width_{family.names[0]}"].item() == pytest.approx(1 / (1 + math.exp(1.5)))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_by_what_is_learned_are_wrong(name):
    family, keys = FAMILIES[name](), picture_keys(PICTURES)
    start = {key: value.double() + 0.1 for key, value in family.start().items()}
    names = list(start)
    inputs = [value.requires_grad_() for value in start.values()]
    weight = torch.randn(PICTURES.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(*values):
        return (family(PICTURES, dict(zip(names, values, strict=True)), keys) * weight).sum()

    found = torch.autograd.grad(loss(*inputs), inputs)
    assert all((g != 0).all() for g in found)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-4, rtol=1e-3)


def drawn_theta(family: Affine, keys, width: float) -> torch.Tensor:
    limits = torch.tensor([family.shift, family.shift, math.radians(family.rotation), family.scale, family.shear])
    return limits * torch.tensor(width).sigmoid() * uniform(keys, 5)


def test_an_affine_picture_is_not_a_loop_over_its_pixels():
    family, keys = Affine(), picture_keys(PICTURES)
    out = family(PICTURES, {"widths": torch.full((5,), 0.7)}, keys)
    for b, (x, y, angle, scale, shear) in enumerate(drawn_theta(family, keys, 0.7).tolist()):
        cos, sin, size = math.cos(angle), math.sin(angle), math.exp(scale)
        for i in (1, 4):
            for j in (2, 6):
                gx, gy = (2 * j + 1) / 8 - 1, (2 * i + 1) / 8 - 1
                px = gx + shear * gy
                sx, sy = size * (cos * px - sin * gy) + x, size * (sin * px + cos * gy) + y
                u, v = (sx + 1) * 4 - 0.5, (sy + 1) * 4 - 0.5
                expected = torch.zeros(3, dtype=torch.float64)
                for r in (math.floor(v), math.floor(v) + 1):
                    for c in (math.floor(u), math.floor(u) + 1):
                        if 0 <= r < 8 and 0 <= c < 8:
                            expected += (1 - abs(v - r)) * (1 - abs(u - c)) * PICTURES[b, :, r, c]
                torch.testing.assert_close(out[b, :, i, j], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("only", range(5))
def test_an_operation_of_pixel_mix_is_another_one(only):
    family, keys = PixelMix(), picture_keys(PICTURES)
    mixture = torch.full((5,), -1e4).index_fill(0, torch.tensor(only), 0.0)
    out = family(PICTURES, learned(family, 0.0) | {"mixture": mixture}, keys)
    drawn = uniform(keys, 5 + 192).double()
    for b, x in enumerate(PICTURES):
        s = (getattr(family, family.names[only]) * 0.5 * drawn[b, only]).item()
        smooth = torch.nn.functional.pad(x[None], (1, 1, 1, 1), mode="replicate")[0].unfold(1, 3, 1).unfold(2, 3, 1)
        expected = (
            x + s,
            x.mean() + math.exp(s) * (x - x.mean()),
            x.mean(0) + math.exp(s) * (x - x.mean(0)),
            x + abs(s) * (smooth.mean((-1, -2)) - x),
            x + abs(s) * math.sqrt(3) * drawn[b, 5:].reshape(3, 8, 8),
        )[only]
        torch.testing.assert_close(out[b], expected, atol=1e-6, rtol=0)


def test_pictures_leave_their_range():
    inside, outside = torch.rand(1, 1, 4, 4), 3 * torch.rand(1, 1, 4, 4) - 1
    wild = torch.tensor([-9.0, 9.0]).repeat(8).reshape(1, 1, 4, 4)
    assert set(within_range(wild, inside).flatten().tolist()) == {0.0, 1.0}
    ends = set(within_range(wild, outside).flatten().tolist())
    assert ends == {min(outside.min().item(), 0.0), max(outside.max().item(), 1.0)}


def test_half_precision_pictures_are_transformed_in_half_precision():
    for name in FAMILIES:
        family = FAMILIES[name]()
        half = PICTURES.bfloat16()
        out = family(half, family.start(), picture_keys(half))
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, family(half.float(), family.start(), picture_keys(half.float())))


def test_the_grid_has_no_pictures(tmp_path):
    red = torch.zeros(3, 3, 16, 16)
    red[:, 0] = 1.0
    save_grid([red, 0 * red], tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert (
        grid.size == (3 * 64, 2 * 64) and grid.getpixel((5, 5)) == (255, 0, 0) and grid.getpixel((5, 100)) == (0, 0, 0)
    )
    save_grid([torch.ones(1, 1, 8, 8)], tmp_path / "grey.png")
    assert Image.open(tmp_path / "grey.png").getpixel((3, 3)) == (255, 255, 255)
