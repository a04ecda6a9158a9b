"""Relation losses against loops over pairs and triples, their limits and invariances."""

import math

import pytest
import torch

from hf_distill.losses import cc_loss, rkd_loss, rkd_terms, sp_loss

B = 5
LOSSES = {"rkd": rkd_loss, "sp": sp_loss, "cc": lambda s, t: cc_loss(s, t[:, : s.shape[1]])}


def features(seed: int = 0, widths=(4, 6)) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, width, generator=draw, dtype=torch.float64) for width in widths)


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def distances(f: list) -> list[list[float]]:
    d = [[math.dist(a, b) for b in f] for a in f]
    positive = [v for row in d for v in row if v > 0]
    return [[v / (sum(positive) / len(positive)) for v in row] for row in d]


def angle(f: list, i: int, j: int, k: int) -> float:
    def unit(a, b):
        length = math.dist(a, b)
        return [(y - x) / length if length else 0.0 for x, y in zip(a, b, strict=True)]

    return sum(a * b for a, b in zip(unit(f[i], f[j]), unit(f[i], f[k]), strict=True))


def test_rkd_matches_loops_over_pairs_and_triples():
    s, t = features()
    s[0] *= 8  # some differences beyond 1, where smooth L1 is linear
    ours, theirs = distances(s.tolist()), distances(t.tolist())
    pairs = sum(smooth_l1(ours[i][j] - theirs[i][j]) for i in range(B) for j in range(B)) / B**2
    s_, t_ = s.tolist(), t.tolist()
    triples = [(i, j, k) for i in range(B) for j in range(B) for k in range(B)]
    angles = sum(smooth_l1(angle(s_, *x) - angle(t_, *x)) for x in triples) / B**3
    assert [x.item() for x in rkd_terms(s, t)] == pytest.approx([pairs, angles], rel=1e-10)
    assert rkd_loss(s, t).item() == pytest.approx(25 * pairs + 50 * angles, rel=1e-10)
    assert rkd_loss(s, t, 1.0, 0.0).item() == pytest.approx(pairs, rel=1e-10)


def test_sp_normalises_rows_and_not_the_whole():
    s, t = features()
    expected = 0.0
    for i in range(B):
        ours, theirs = ([torch.dot(f[i], f[j]).item() for j in range(B)] for f in (s, t))
        lengths = [math.sqrt(sum(v * v for v in row)) for row in (ours, theirs)]
        expected += sum((a / lengths[0] - b / lengths[1]) ** 2 for a, b in zip(ours, theirs, strict=True))
    assert sp_loss(s, t).item() == pytest.approx(expected / B**2, rel=1e-12)


def test_cc_multiplies_neighbours_of_the_batch():
    s, t = features(widths=(4, 4))
    expected = sum(abs(s[i, d] - t[i, d]) * abs(s[i + 1, d] - t[i + 1, d]) for i in range(B - 1) for d in range(4)) / (
        B - 1
    )
    torch.testing.assert_close(cc_loss(s, t), expected)


def test_maps_are_flattened():
    s, t = features(widths=(12, 8))
    assert torch.equal(sp_loss(s.reshape(B, 3, 2, 2), t.reshape(B, 2, 2, 2)), sp_loss(s, t))
    assert torch.equal(rkd_loss(s.reshape(B, 3, 2, 2), t), rkd_loss(s, t))


def test_rotation_or_scale_of_the_student_changes_a_relation():
    s, t = features()
    torch.testing.assert_close(rkd_loss(3.0 * s @ rotation(4) + 1.0, t), rkd_loss(s, t))
    torch.testing.assert_close(sp_loss(s @ rotation(4), t), sp_loss(s, t))
    torch.testing.assert_close(sp_loss(2.0 * s, t), sp_loss(s, t))
    assert rkd_loss(2.0 * t @ rotation(6), t) < 1e-12
    assert (sp_loss(s + 1.0, t) - sp_loss(s, t)).abs() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_wrong_or_reaches_a_constant(name):
    s, t = features()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, t), s.requires_grad_())
    t.requires_grad_()
    LOSSES[name](s, t).backward()
    assert s.grad.abs().sum() > 0
    assert (t.grad is not None) == (name == "cc"), "only CC learns an embedding of the teacher's features"
    if name == "cc":
        assert torch.autograd.gradcheck(lambda x: LOSSES[name](s.detach(), x), t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_float32(name, dtype):
    s, t = ((20 * x).to(dtype) for x in features())
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](s, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), LOSSES[name](s.double(), t.double()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_dead_or_extreme_features_are_not_finite(name):
    for make in (torch.zeros_like, torch.ones_like, lambda x: 1e4 * x.sign(), lambda x: x[:1].expand_as(x)):
        s, t = (make(x.float()).clone() for x in features())
        s.requires_grad_()
        loss = LOSSES[name](s, t)
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()


def test_two_equal_examples_do_not_blow_up_the_gradient():
    s, t = (x.float() for x in features())
    s[1] = s[0]
    s.requires_grad_()
    rkd_loss(s, t).backward()
    assert s.grad.abs().max() < 1e3


def test_a_batch_of_one_or_of_two_sizes_passes():
    s, t = features()
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="at least 2, got 1"):
            loss(s[:1], t[:1])
    for loss in (rkd_loss, sp_loss):
        with pytest.raises(ValueError, match="of one batch, got 5 and 3"):
            loss(s, t[:3])
    with pytest.raises(ValueError, match=r"one shape, got \(5, 4\) and \(5, 6\)"):
        cc_loss(s, t)
    assert all(loss(s[:2], t[:2]).isfinite() for loss in LOSSES.values())
