"""Logit losses of classifiers against loops over examples and classes, their invariances and limits."""

import math
from functools import partial

import pytest
import torch

from hf_distill.losses import (
    dist_loss,
    dkd_loss,
    dkd_terms,
    kd_loss,
    nkd_loss,
    standardize_logits,
)

B, C, T = 5, 4, 3.0
LABELS = torch.tensor([0, 3, 1, 1, 2])
LOSSES = {
    "kd": partial(kd_loss, temperature=T),
    "dkd": lambda s, t: dkd_loss(s, t, LABELS[: len(s)] % s.shape[1], 0.7, 3.0, T),
    "dist": partial(dist_loss, beta=1.5, gamma=0.5, temperature=T),
    "nkd": lambda s, t: nkd_loss(s, t, LABELS[: len(s)] % s.shape[1], 1.5, T),
    "standardised_kd": lambda s, t: kd_loss(standardize_logits(s), standardize_logits(t), 2.0),
    "standardised_dkd": lambda s, t: dkd_loss(
        standardize_logits(s), standardize_logits(t), LABELS[: len(s)] % s.shape[1], 1.0, 2.0, 2.0
    ),
}


def logits(seed: int = 0, shape=(B, C), scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))


def softmax(row, temperature, leave_out=None) -> list[float]:
    exp = [0.0 if c == leave_out else math.exp(z / temperature) for c, z in enumerate(row.tolist())]
    return [e / sum(exp) for e in exp]


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pearson(x, y) -> float:
    x, y = ([v - sum(z) / len(z) for v in z] for z in (x, y))
    lengths = [math.sqrt(sum(v * v for v in z)) for z in (x, y)]
    return sum(a * b for a, b in zip(x, y, strict=True)) / (lengths[0] * lengths[1] + 1e-8)


# ---- against loops --------------------------------------------------------------------------------------------------
def test_kd_is_summed_over_classes_and_averaged_over_the_batch():
    s, t = logits()
    expected = T**2 * sum(kl(softmax(t[i], T), softmax(s[i], T)) for i in range(B)) / B
    assert kd_loss(s, t, T).item() == pytest.approx(expected, rel=1e-12)


def test_dkd_matches_a_loop():
    s, t = logits()
    tckd = nckd = 0.0
    for i, y in enumerate(LABELS.tolist()):
        p, q = softmax(t[i], T)[y], softmax(s[i], T)[y]
        tckd += T**2 * kl([p, 1 - p], [q, 1 - q]) / B
        nckd += T**2 * kl(softmax(t[i], T, y), softmax(s[i], T, y)) / B
    assert [x.item() for x in dkd_terms(s, t, LABELS, T)] == pytest.approx([tckd, nckd], rel=1e-12)
    assert dkd_loss(s, t, LABELS, 0.7, 3.0, T).item() == pytest.approx(0.7 * tckd + 3.0 * nckd, rel=1e-12)


def test_dkd_masks_as_the_authors_code_that_subtracts_a_thousand():
    s, t = logits()
    mask = torch.nn.functional.one_hot(LABELS, C)
    ours, theirs = ((z / T - 1000.0 * mask).log_softmax(-1) for z in (s, t))
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") / B * T**2
    torch.testing.assert_close(dkd_terms(s, t, LABELS, T)[1], expected)


def test_kd_is_tckd_plus_nckd_times_what_the_teacher_leaves_to_other_classes():
    s, t = logits()
    for i in range(B):
        one = slice(i, i + 1)
        target, others = dkd_terms(s[one], t[one], LABELS[one], T)
        rest = 1 - (t[i] / T).softmax(-1)[LABELS[i]]
        torch.testing.assert_close(kd_loss(s[one], t[one], T), target + rest * others)


def test_dist_matches_a_loop():
    s, t = logits()
    ours, theirs = ([softmax(row, T) for row in z] for z in (s, t))
    inter = 1 - sum(pearson(ours[i], theirs[i]) for i in range(B)) / B
    intra = 1 - sum(pearson([r[c] for r in ours], [r[c] for r in theirs]) for c in range(C)) / C
    found = dist_loss(s, t, beta=1.5, gamma=0.5, temperature=T).item()
    assert found == pytest.approx(T**2 * (1.5 * inter + 0.5 * intra), rel=1e-10)


def test_nkd_matches_a_loop():
    s, t = logits()
    expected = 0.0
    for i, y in enumerate(LABELS.tolist()):
        expected -= softmax(t[i], 1.0)[y] * math.log(softmax(s[i], 1.0)[y]) / B
        q, p = softmax(t[i], T, y), softmax(s[i], T, y)
        expected -= 1.5 * T**2 * sum(q[c] * math.log(p[c]) for c in range(C) if c != y) / B
    assert nkd_loss(s, t, LABELS, 1.5, T).item() == pytest.approx(expected, rel=1e-12)


def test_standardised_logits_use_the_unbiased_deviation():
    s, _ = logits()
    for row, found in zip(s.tolist(), standardize_logits(s).tolist(), strict=True):
        mean = sum(row) / C
        std = math.sqrt(sum((z - mean) ** 2 for z in row) / (C - 1))
        assert found == pytest.approx([(z - mean) / (1e-7 + std) for z in row], rel=1e-12)


# ---- limits and invariances -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "standardised_kd", "standardised_dkd"])
def test_equal_logits_give_a_loss_or_a_gradient(name):
    s, _ = logits()
    student = s.clone().requires_grad_()
    loss = LOSSES[name](student, s)
    loss.backward()
    small = 1e-5 if name == "dist" else 1e-12  # its denominators are larger by 1e-8
    assert abs(loss.item()) < small and student.grad.abs().max() < small


def test_nkd_at_equal_logits_is_the_teachers_entropy_and_does_not_pull_at_the_others():
    s, _ = logits()
    student = s.clone().requires_grad_()
    nkd_loss(student, s, LABELS, gamma=1.0, temperature=1.0).backward()
    only_target = s.clone().requires_grad_()
    nkd_loss(only_target, s, LABELS, gamma=0.0, temperature=1.0).backward()
    torch.testing.assert_close(student.grad, only_target.grad)


def test_scaling_logits_and_temperature_together_changes_more_than_t_squared():
    s, t = logits()
    torch.testing.assert_close(kd_loss(2 * s, 2 * t, 2 * T) / 4, kd_loss(s, t, T))


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_a_row_changes_the_loss(name):
    s, t = logits()
    shift = torch.arange(2.0 * B, dtype=torch.float64).reshape(2, B, 1)
    torch.testing.assert_close(LOSSES[name](s + shift[0], t - shift[1]), LOSSES[name](s, t))


@pytest.mark.parametrize("name", ["standardised_kd", "standardised_dkd"])
def test_standardised_losses_see_the_scale_of_logits(name):
    s, t = logits()
    torch.testing.assert_close(LOSSES[name](3 * s + 1, 0.5 * t - 2), LOSSES[name](s, t), rtol=1e-6, atol=1e-9)


def test_dist_sees_the_scale_of_centred_probabilities():
    _, t = logits()
    p = t.softmax(-1)
    flatter = (p.mean(0) + 0.5 * (p - p.mean(0))).log()  # each class's probabilities over the batch, halved
    assert dist_loss(flatter, t, beta=0.0, gamma=1.0, temperature=1.0).abs() < 1e-6
    flatter = (1 / C + 0.5 * (p - 1 / C)).log()  # each example's over the classes
    assert dist_loss(flatter, t, beta=1.0, gamma=0.0, temperature=1.0).abs() < 1e-6


def test_two_classes_leave_nothing_to_the_non_target_part():
    s, t = logits(shape=(B, 2))
    student = s.clone().requires_grad_()
    target, others = dkd_terms(student, t, LABELS % 2, T)
    assert others.item() == 0
    (grad,) = torch.autograd.grad(others, student, retain_graph=True, allow_unused=True)
    assert grad is None or not grad.any()
    torch.testing.assert_close(target, kd_loss(s, t, T))


def test_soft_labels_count_as_their_largest_class():
    s, t = logits()
    soft = 0.6 * torch.nn.functional.one_hot(LABELS, C) + 0.1
    assert torch.equal(dkd_loss(s, t, soft), dkd_loss(s, t, LABELS))
    assert torch.equal(nkd_loss(s, t, soft), nkd_loss(s, t, LABELS))


# ---- gradients, types, extremes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_wrong_or_reaches_the_teacher(name):
    s, t = logits()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, t), s.requires_grad_())
    t.requires_grad_()
    LOSSES[name](s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_float32(name, dtype):
    s, t = (z.to(dtype) for z in logits())
    student = s.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](student, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), LOSSES[name](s.double(), t.double()), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(B, C), (B, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_are_not_finite(name, shape):
    s, t = (1e4 * z.float().sign() for z in logits(shape=shape))
    t[0] = 0.0  # no spread either
    student = s.clone().requires_grad_()
    loss = LOSSES[name](student, t)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    student = torch.zeros(shape, requires_grad=True)
    LOSSES[name](student, t).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd"])
def test_a_batch_of_one_is_its_own_mean(name):
    s, t = logits()
    assert LOSSES[name](s[:1], t[:1]).isfinite()
    labels = [slice(i, i + 1) for i in range(B)]
    alone = {
        "kd": lambda i: kd_loss(s[i], t[i], T),
        "dkd": lambda i: dkd_loss(s[i], t[i], LABELS[i], 0.7, 3.0, T),
        "nkd": lambda i: nkd_loss(s[i], t[i], LABELS[i], 1.5, T),
    }[name]
    torch.testing.assert_close(LOSSES[name](s, t), sum(alone(i) for i in labels) / B)


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_what_cannot_be_compared_passes():
    s, t = logits()
    for name in LOSSES:
        with pytest.raises(ValueError, match=r"\(5, 4\) and \(5, 3\).*num_labels"):
            LOSSES[name](s, t[:, :3])
    with pytest.raises(ValueError, match="at least 2, got 1"):
        dist_loss(s[:1], t[:1])
    with pytest.raises(ValueError, match="it needs 2, got 1"):
        dkd_loss(s[:, :1], t[:, :1], LABELS * 0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        standardize_logits(s[:, :1])
    with pytest.raises(ValueError, match=r"labels must be \(5,\)"):
        nkd_loss(s, t, LABELS[:2])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        kd_loss(s, t, 0.0)
