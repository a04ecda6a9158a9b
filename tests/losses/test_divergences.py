import doctest
import importlib
import math

import pytest
import torch

from hf_distill import losses
from hf_distill.losses import (
    DIVERGENCES,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    ForwardKL,
    GeneralizedJSD,
    Interpolated,
    Jeffreys,
    LabelCrossEntropy,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    Symmetric,
    one_term,
)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p, q, share_of_p):
    return [share_of_p * a + (1 - share_of_p) * b for a, b in zip(p, q, strict=True)]


def slow_jsd(q, p, beta):
    m = mixed(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def slow_adaptive(q, p, mu):
    order = sorted(range(len(p)), key=lambda v: -p[v])
    head, total = [order[0]], p[order[0]]
    for v in order[1:]:
        total += p[v]
        if total <= mu:
            head.append(v)
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = sum(gaps[v] for v in head) / sum(gaps)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def slow_alpha_beta(q, p, a, b):
    pairs = list(zip(q, p, strict=True))
    if a == b == 0:
        return sum(math.log(x / y) ** 2 for x, y in pairs) / 2
    if b == 0:
        return sum(a * y**a * math.log(y / x) - y**a + x**a for x, y in pairs) / a**2
    if a == 0:
        return sum(b * x**b * math.log(x / y) - x**b + y**b for x, y in pairs) / b**2
    if a + b == 0:
        return sum(a * math.log(x / y) + (y / x) ** a - 1 for x, y in pairs) / a**2
    return -sum(y**a * x**b - a / (a + b) * y ** (a + b) - b / (a + b) * x ** (a + b) for x, y in pairs) / (a * b)


FAMILY = [
    (ForwardKL(1.7), lambda q, p: kl(p, q)),
    (ReverseKL(0.8), lambda q, p: kl(q, p)),
    (Jeffreys(1.3), lambda q, p: (kl(p, q) + kl(q, p)) / 2),
    (Symmetric(0.3, 2.0), lambda q, p: 0.7 * kl(p, q) + 0.3 * kl(q, p)),
    (GeneralizedJSD(0.2, 1.5), lambda q, p: slow_jsd(q, p, 0.2)),
    (GeneralizedJSD(0), lambda q, p: kl(p, q)),
    (GeneralizedJSD(1), lambda q, p: kl(q, p)),
    (SkewForwardKL(0.2, 1.5), lambda q, p: kl(p, mixed(p, q, 0.2))),
    (SkewForwardKL(0), lambda q, p: kl(p, q)),
    (SkewReverseKL(0.2, 0.7), lambda q, p: kl(q, mixed(q, p, 0.2))),
    (SkewReverseKL(0), lambda q, p: kl(q, p)),
    (TVD(1.2), lambda q, p: sum(abs(a - b) for a, b in zip(q, p, strict=True)) / 2),
    (AdaptiveKL(0.5, 1.1), lambda q, p: slow_adaptive(q, p, 0.5)),
    (AdaptiveKL(0.9), lambda q, p: slow_adaptive(q, p, 0.9)),
    *(
        (AlphaBeta(a, b, 1.2), lambda q, p, a=a, b=b: slow_alpha_beta(q, p, a, b))
        for a, b in [(0.5, 0.5), (0.3, 0.4), (1, 0), (0, 1), (0.6, 0), (0, 0.7), (0.6, -0.6), (0, 0), (1, 1), (2, -0.5)]
    ),
]
CROSS_ENTROPY = (SoftCrossEntropy(1.4), lambda q, p: -sum(b * math.log(a) for a, b in zip(q, p, strict=True)))
DIVERGENCE_ONLY = [divergence for divergence, _ in FAMILY]


def logits(rows=6, vocabulary=7, scale=2.0, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(rows, vocabulary) * scale).to(dtype), (torch.randn(rows, vocabulary) * scale).to(dtype)


def rows_of(divergence, student, teacher):
    return one_term(student, teacher, divergence, reduction="none")


@pytest.mark.parametrize(("divergence", "slow"), [*FAMILY, CROSS_ENTROPY], ids=lambda x: "" if callable(x) else str(x))
def test_value_matches_a_loop_over_the_vocabulary(divergence, slow):
    s, t = logits()
    softmax = [(x / divergence.temperature).softmax(-1).tolist() for x in (s, t)]
    expected = torch.tensor([slow(q, p) for q, p in zip(*softmax, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(rows_of(divergence, s, t), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", [d for d in [*DIVERGENCE_ONLY, CROSS_ENTROPY[0]] if "Adaptive" not in str(d)])
def test_gradient_is_that_of_the_value(divergence):
    s, t = logits()
    assert torch.autograd.gradcheck(lambda s: rows_of(divergence, s, t), s.requires_grad_())


def test_adaptive_kl_gradient_holds_its_shares_constant():
    s, t = logits()
    s.requires_grad_()
    q, p = s.softmax(-1), t.softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    value = rows_of(AdaptiveKL(), s, t)
    share = ((value - reverse) / (forward - reverse)).detach()
    expected = torch.autograd.grad((share * forward + (1 - share) * reverse).sum(), s)[0]
    torch.testing.assert_close(torch.autograd.grad(value.sum(), s)[0], expected)


def test_adaptive_kl_reads_the_student_in_the_teachers_order():
    p, q = torch.tensor([[0.1, 0.3, 0.6]]), torch.tensor([[0.2, 0.3, 0.5]])
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    value = rows_of(AdaptiveKL(0.5), q.log(), p.log())
    torch.testing.assert_close(value, (forward / 2 + reverse / 2)[None])
    value = rows_of(AdaptiveKL(0.95), q.log(), p.log())  # the head is the last two entries: it holds half of the gap
    torch.testing.assert_close(value, (forward / 2 + reverse / 2)[None])
    p, q = torch.tensor([[0.1, 0.3, 0.6]]), torch.tensor([[0.1, 0.5, 0.4]])
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    torch.testing.assert_close(rows_of(AdaptiveKL(0.95), q.log(), p.log()), forward[None])


@pytest.mark.parametrize("divergence", DIVERGENCE_ONLY, ids=str)
def test_equal_distributions_give_zero_and_others_are_positive(divergence):
    s, t = logits()
    assert rows_of(divergence, s, s + torch.arange(6.0)[:, None]).abs().max() < 1e-12
    assert rows_of(divergence, s, t).min() > 1e-4
    torch.testing.assert_close(rows_of(divergence, s + 3, t - 5), rows_of(divergence, s, t))


@pytest.mark.parametrize("divergence", [*DIVERGENCE_ONLY, SoftCrossEntropy()], ids=str)
@pytest.mark.parametrize(("scale", "dtype"), [(100, torch.float32), (100, torch.bfloat16), (1e4, torch.float32)])
def test_extreme_logits_stay_finite(divergence, scale, dtype):
    s = torch.tensor([[1.0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).mul(scale).to(dtype).requires_grad_()
    t = torch.tensor([[-1.0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]]).mul(scale).to(dtype)
    value = rows_of(divergence, s, t)
    value.sum().backward()
    assert value.dtype == torch.float32 and s.grad.dtype == dtype
    assert value.isfinite().all() and s.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [GeneralizedJSD(0.3), SkewForwardKL(0.1), SkewReverseKL(0.1)], ids=str)
def test_mixtures_do_not_underflow_in_float32(divergence):
    s, t = logits(scale=60.0)
    exact = rows_of(divergence, s, t)
    torch.testing.assert_close(rows_of(divergence, s.float(), t.float()), exact.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", [*DIVERGENCE_ONLY, SoftCrossEntropy(), Interpolated(torch.tensor(0.4))], ids=str)
def test_columns_ruled_out_by_both_sides_do_not_exist(divergence):
    s, t = logits()
    padding = torch.full((6, 2), -torch.inf, dtype=torch.float64)
    wide = torch.cat([s, padding], -1).requires_grad_()
    value = rows_of(divergence, wide, torch.cat([t, padding], -1))
    torch.testing.assert_close(value, rows_of(divergence, s, t))
    value.sum().backward()
    s.requires_grad_()
    rows_of(divergence, s, t).sum().backward()
    torch.testing.assert_close(wide.grad, torch.cat([s.grad, padding * 0], -1).nan_to_num(0.0))


@pytest.mark.parametrize("divergence", [*DIVERGENCE_ONLY, SoftCrossEntropy(), Interpolated(torch.tensor(1.0))], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_columns_ruled_out_by_one_side_never_give_nan(divergence, side):
    s, t = logits(dtype=torch.float32)
    (s if side == "student" else t)[:, 2] = -torch.inf
    s.requires_grad_()
    value = rows_of(divergence, s, t)
    value.sum().backward()
    assert value.isfinite().all() and s.grad.isfinite().all()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), Jeffreys(), SoftCrossEntropy()], ids=str)
def test_a_column_only_the_teacher_rules_out_is_masked_in_value_and_gradient(divergence):
    s, t = logits()
    t[:, 2] = -torch.inf
    assert torch.autograd.gradcheck(lambda s: rows_of(divergence, s, t), s.requires_grad_())
    inside = torch.arange(7) != 2
    log_q, log_p = s.log_softmax(-1)[:, inside], t.log_softmax(-1)[:, inside]
    if isinstance(divergence, ReverseKL):
        torch.testing.assert_close(rows_of(divergence, s, t), (log_q.exp() * (log_q - log_p)).sum(-1))
    if isinstance(divergence, ForwardKL):
        torch.testing.assert_close(rows_of(divergence, s, t), (log_p.exp() * (log_p - log_q)).sum(-1))


def test_jsd_tends_to_both_kls_when_divided_by_its_weight():
    s, t = logits()
    torch.testing.assert_close(
        rows_of(GeneralizedJSD(1e-4), s, t) / 1e-4, rows_of(ForwardKL(), s, t), rtol=1e-2, atol=1e-3
    )
    torch.testing.assert_close(
        rows_of(GeneralizedJSD(1 - 1e-4), s, t) / 1e-4, rows_of(ReverseKL(), s, t), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize(("at", "near"), [((1, 0), (1, 1e-5)), ((0.6, 0), (0.6, 1e-5)), ((2, 0), (2, 1e-5)),
    ((0, 0.7), (1e-5, 0.7)), ((0.6, -0.6), (0.6, -0.6 + 1e-5)), ((0, 0), (1e-4, 1e-4))])  # fmt: skip
def test_alpha_beta_is_continuous_at_its_limits(at, near):
    s, t = logits(scale=1.0)
    torch.testing.assert_close(rows_of(AlphaBeta(*near), s, t), rows_of(AlphaBeta(*at), s, t), rtol=2e-3, atol=1e-4)


def test_adaptive_kl_lies_between_forward_and_reverse():
    s, t = logits()
    both = torch.stack([rows_of(ForwardKL(), s, t), rows_of(ReverseKL(), s, t)])
    value = rows_of(AdaptiveKL(), s, t)
    assert (both.amin(0) <= value).all() and (value <= both.amax(0)).all()


def test_interpolated_target_is_a_constant():
    s, t = logits()
    s.requires_grad_()
    step = torch.tensor(0.3)
    target = (0.7 * s.detach() + 0.3 * t).div(1.5).softmax(-1)
    expected = -(target * s.div(1.5).log_softmax(-1)).sum(-1)
    value = rows_of(Interpolated(step, 1.5), s, t)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), s)[0], torch.autograd.grad(expected.sum(), s)[0], rtol=1e-6, atol=1e-8
    )


def test_label_cross_entropy_ignores_rows_without_a_label():
    s, _ = logits()
    s.requires_grad_()
    labels = torch.tensor([0, 3, -100, 6, -100, 2])
    value = one_term(s, None, LabelCrossEntropy(), labels=labels, reduction="sum")
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="sum")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], torch.autograd.grad(expected, s)[0])


PUBLIC = [getattr(losses, name) for name in DIVERGENCES]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_functions_reduce_over_counted_rows(function):
    s, t = logits(rows=6)
    s, t, mask = s.reshape(2, 3, 7).requires_grad_(), t.reshape(2, 3, 7).requires_grad_(), torch.tensor([[1, 0, 1]] * 2)
    each = function(s, t, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(each, rows_of(DIVERGENCES[function.__name__](), s, t))
    torch.testing.assert_close(function(s, t, mask=mask), (each * mask).sum() / 4)
    torch.testing.assert_close(function(s, t, mask=mask.bool(), reduction="sum"), (each * mask).sum())
    torch.testing.assert_close(function(s, t, temperature=2.0), function(s / 2, t / 2))
    torch.testing.assert_close(function(student_logits=s, teacher_logits=t), each.mean())
    with pytest.raises(TypeError, match="positional"):
        function(s, t, mask)  # a mask and a temperature are easily mistaken for each other
    function(s, t, mask=mask).backward()
    assert t.grad is None and (s.grad[:, 1] == 0).all() and s.grad.abs().sum() > 0
    s.grad = None
    nothing = function(s, t, mask=mask * 0)
    nothing.backward()
    assert nothing == 0 and (s.grad == 0).all()


def test_cross_entropy_form_changes_the_value_only():
    s, t = logits()
    s.requires_grad_()
    kl_form, ce_form = (losses.forward_kl(s, t, cross_entropy_form=form) for form in (False, True))
    p = t.softmax(-1)
    torch.testing.assert_close(ce_form - kl_form, -(p * p.log()).sum(-1).mean())
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (kl_form, ce_form)))


@pytest.mark.parametrize("make", [
    lambda: ForwardKL(0), lambda: GeneralizedJSD(-0.1), lambda: GeneralizedJSD(1.1), lambda: GeneralizedJSD(0.5, -1),
    lambda: SkewForwardKL(1.0), lambda: SkewReverseKL(-1), lambda: AdaptiveKL(1.5), lambda: Symmetric(2),
    lambda: AlphaBeta(1, 1, 0), lambda: Interpolated(torch.tensor(0.5), 0),
    lambda: losses.reverse_kl(torch.zeros(1, 2), torch.zeros(1, 2), reduction="batchmean"),
    lambda: losses.reverse_kl(torch.zeros(1, 2), None), lambda: one_term(torch.zeros(1, 2), None, LabelCrossEntropy()),
    lambda: losses.reverse_kl(torch.zeros(3, 2), torch.zeros(1, 2)),
    lambda: losses.reverse_kl(torch.zeros(3, 2), torch.zeros(3, 2), mask=torch.ones(2)),
])  # fmt: skip
def test_arguments_out_of_range_are_named(make):
    with pytest.raises(ValueError, match="must|needs|none was given"):
        make()


@pytest.mark.parametrize("module", ["functional", "fused", "sparse", "cross_tokenizer"])
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(f"hf_distill.losses.{module}"))
    assert result.attempted and not result.failed
