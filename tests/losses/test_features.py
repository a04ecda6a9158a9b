"""Feature losses against loops over positions, their limits and invariances."""

import math

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from hf_distill.losses import at_loss, fitnet_loss, hcl_loss

B, C, H, W = 3, 4, 6, 6


def maps(seed: int = 0, shape=(B, C, H, W)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))


LOSSES = {"fitnet": fitnet_loss, "at": at_loss, "hcl": hcl_loss}


def attention(x: torch.Tensor, p: int) -> list[float]:
    """Of one example (C, H, W)."""
    a = [
        sum(x[c, i, j].item() ** p for c in range(x.shape[0])) / x.shape[0]
        for i in range(x.shape[1])
        for j in range(x.shape[2])
    ]
    length = math.sqrt(sum(v * v for v in a))
    return [v / length for v in a]


def test_fitnet_is_the_mean_over_all_elements():
    s, t = maps()
    total = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
    assert fitnet_loss(s, t).item() == pytest.approx(total / s.numel(), rel=1e-12)


def test_masked_positions_count_or_a_long_example_counts_more():
    s, t = (x.flatten(2).mT for x in maps())
    mask = (torch.arange(H * W) < torch.tensor([[36], [5], [1]])).long()
    expected = sum(fitnet_loss(s[i, :n], t[i, :n]) for i, n in enumerate((36, 5, 1))) / B
    torch.testing.assert_close(fitnet_loss(s, t, mask), expected)
    s, t, mask = (x.mT[..., None] for x in (s, t, mask[..., None]))
    mask = mask[:, 0]
    expected = sum(at_loss(s[i : i + 1, :, :n], t[i : i + 1, :, :n]) for i, n in enumerate((36, 5, 1))) / B
    torch.testing.assert_close(at_loss(s, t, mask=mask), expected)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_at_matches_a_loop(p):
    s, t = maps()
    t = torch.cat([t, 0.5 * t], 1)  # twice the channels
    total = 0.0
    for i in range(B):
        total += sum((a - b) ** 2 for a, b in zip(attention(s[i], p), attention(t[i], p), strict=True))
    assert at_loss(s, t, p).item() == pytest.approx(total / (B * H * W), rel=1e-12)


def test_at_sees_channels_or_scale():
    s, _ = maps()
    assert at_loss(s, torch.cat([s, s, s], 1)) < 1e-30
    torch.testing.assert_close(at_loss(3 * s, s), torch.zeros((), dtype=s.dtype))


def test_at_does_not_pool_the_larger_map():
    s, t = maps()
    large = t.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(at_loss(s, large), at_loss(s, t))
    torch.testing.assert_close(at_loss(large, s), at_loss(t, s))
    torch.testing.assert_close(at_loss(s, t.repeat_interleave(2, 2)), at_loss(s, t))


@pytest.mark.parametrize("size", [6, 4, 3, 1])
def test_hcl_matches_a_loop(size):
    s, t = maps(shape=(B, C, size, size))
    loss, weight, total = (s - t).square().mean(), 1.0, 1.0
    for level in (4, 2, 1):
        if level < size:
            weight /= 2
            cells = 0.0
            a, b = adaptive_avg_pool2d(s, level), adaptive_avg_pool2d(t, level)
            for i in range(level):
                for j in range(level):
                    cells += (a[..., i, j] - b[..., i, j]).square().mean() / level**2
            loss, total = loss + weight * cells, total + weight
    torch.testing.assert_close(hcl_loss(s, t), loss / total)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_wrong_or_reaches_the_teacher(name):
    s, t = maps(shape=(2, 3, 5, 5))
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, t), s.requires_grad_())
    t.requires_grad_()
    LOSSES[name](s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    equal = t.detach().clone().requires_grad_()
    loss = LOSSES[name](equal, t)
    loss.backward()
    assert loss.item() == 0 and not equal.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_float32(name, dtype):
    s, t = ((30 * x).to(dtype) for x in maps())
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](s, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), LOSSES[name](s.double(), t.double()), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_or_dead_features_are_not_finite(name):
    s, t = (1e4 * x.float().sign() for x in maps())
    s[0], t[1], s[2], t[2] = 0, 0, 0, 0
    s.requires_grad_()
    loss = LOSSES[name](s[:1], t[:1]) + LOSSES[name](s, t)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


def test_what_cannot_be_compared_passes():
    s, t = maps()
    with pytest.raises(ValueError, match=r"\(3, 4, 6, 6\).*\(3, 3, 6, 6\).*projectors"):
        fitnet_loss(s, t[:, :3])
    with pytest.raises(ValueError, match="differ in shape"):
        hcl_loss(s, t[:, :, :3])
    with pytest.raises(ValueError, match=r"compares maps.*\(3, 4, 36\)"):
        at_loss(s.flatten(2), t)
    with pytest.raises(ValueError, match="of one batch"):
        at_loss(s, t[:2])
