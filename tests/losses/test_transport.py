"""Transport between rows: against slow loops, at limits, by finite differences, and what must never become NaN."""

import math

import pytest
import torch

from hf_distill.losses import (
    ForwardKL,
    HeadLogits,
    MixtureLogits,
    SampledLogits,
    SparseLogits,
    forward_kl,
    one_term,
    reverse_kl,
    sinkhorn_cost,
    sinkhorn_distance,
    sinkhorn_plan,
)
from hf_distill.losses.transport import log_probs_of, row_error, top_entries, topk_cost
from hf_distill.testing.promises import _Widest

D64 = torch.float64


def logits(rows: int = 5, classes: int = 4, scale: float = 2.0, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(rows, classes, generator=draw, dtype=D64) for _ in range(2))
    return s.requires_grad_(), t


def probabilities(row, temperature: float) -> list[float]:
    e = [math.exp(v / temperature) for v in row.tolist()]
    return [v / sum(e) for v in e]


def by_loop(s, t, temperature: float, epsilon: float, iterations: int):
    """(cost, plan, distance) as the paper writes them, with plain exponentials."""
    n = len(s)
    x, y = ([probabilities(row, temperature) for row in z] for z in (s, t))
    cost = [[sum(abs(a - b) for a, b in zip(x[i], y[j], strict=True)) for j in range(n)] for i in range(n)]
    plan = [[math.exp(-cost[i][j] / epsilon) for j in range(n)] for i in range(n)]
    for _ in range(iterations):
        plan = [[v / sum(row) for v in row] for row in plan]
        columns = [sum(plan[i][j] for i in range(n)) for j in range(n)]
        plan = [[plan[i][j] / columns[j] for j in range(n)] for i in range(n)]
    return cost, plan, sum(plan[i][j] * cost[i][j] for i in range(n) for j in range(n))


@pytest.mark.parametrize(("temperature", "epsilon", "iterations"), [(2.0, 0.1, 20), (1.0, 0.5, 1), (3.0, 0.03, 7)])
def test_the_distance_is_not_that_of_a_loop(temperature, epsilon, iterations):
    s, t = logits()
    cost, plan, distance = by_loop(s, t, temperature, epsilon, iterations)
    ours = sinkhorn_cost(s, t, temperature)
    torch.testing.assert_close(ours, torch.tensor(cost, dtype=D64))
    torch.testing.assert_close(sinkhorn_plan(ours, epsilon, iterations), torch.tensor(plan, dtype=D64))
    assert sinkhorn_distance(s, t, temperature, epsilon, iterations).item() == pytest.approx(distance, rel=1e-10)


def test_the_defaults_are_not_the_paper_s():
    s, t = logits()
    assert sinkhorn_distance(s, t).item() == pytest.approx(by_loop(s, t, 2.0, 0.1, 20)[2], rel=1e-10)
    assert sinkhorn_plan(sinkhorn_cost(s, t)).sum().item() == pytest.approx(5.0), "the mass is B, not 1"


def test_one_row_has_a_plan_other_than_one():
    s, t = logits(rows=1)
    cost = sinkhorn_cost(s, t)
    assert sinkhorn_plan(cost).item() == 1.0
    assert sinkhorn_distance(s, t).item() == (s.softmax(-1) * 0 + (s / 2).softmax(-1) - (t / 2).softmax(-1)).abs().sum()


@pytest.mark.parametrize("rows", [3, 7, 40])
def test_columns_do_not_sum_to_one_or_rows_do_not_come_nearer(rows):
    s, t = logits(rows, 3, scale=4.0)
    cost, one = sinkhorn_cost(s, t).float(), torch.ones(rows)
    errors = []
    for iterations in (1, 5, 20, 200):
        plan = sinkhorn_plan(cost, iterations=iterations)
        torch.testing.assert_close(plan.sum(0), one, atol=1e-6, rtol=0)
        errors.append(row_error(plan).item())
        assert errors[-1] == pytest.approx((plan.sum(1) - 1).abs().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[0]


def test_the_order_of_rows_counts():
    s, t = logits(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    own = sinkhorn_distance(s, t)
    torch.testing.assert_close(sinkhorn_distance(s[order], t[order]), own)
    torch.testing.assert_close(sinkhorn_distance(s, t[order]), own)  # a distance of sets
    assert not torch.isclose(forward_kl(s, t[order]), forward_kl(s, t), rtol=0.05)


def test_equal_sets_are_at_no_distance_or_stay_apart_without_entropy():
    _, t = logits(6)
    far = [sinkhorn_distance(t, t, epsilon=epsilon).item() for epsilon in (0.5, 0.1, 0.01, 1e-4)]
    assert far[0] > far[1] > 0.05 and far[2] < 0.02 and far[3] < 1e-12


def test_the_gradient_is_not_that_of_finite_differences_or_the_plan_has_none():
    s, t = logits(4, 3)
    for settings in ({}, {"epsilon": 0.5, "iterations": 3}):
        assert torch.autograd.gradcheck(lambda s, settings=settings: sinkhorn_distance(s, t, **settings), s)
    (whole,) = torch.autograd.grad(sinkhorn_distance(s, t), s)
    cost = sinkhorn_cost(s, t)
    (fixed,) = torch.autograd.grad((sinkhorn_plan(cost).detach() * cost).sum(), s)
    assert (whole - fixed).norm() > 0.1 * fixed.norm()


def test_gradient_reaches_the_teacher():
    s, t = logits()
    t.requires_grad_()
    sinkhorn_distance(s, t).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


@pytest.mark.parametrize("epsilon", [0.019, 1e-3, 1e-6, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_a_small_epsilon_gives_nan(epsilon, dtype):
    s, t = (z.detach().to(dtype) for z in logits(8, 2, scale=20.0))
    t[3] = t[2]  # a tie
    s.requires_grad_()
    cost = sinkhorn_cost(s, t)
    plan = sinkhorn_plan(cost, epsilon)
    torch.testing.assert_close(plan.sum(0), torch.ones(8, dtype=dtype), atol=1e-5, rtol=0)
    value = (plan * cost).sum()
    value.backward()
    assert value.isfinite() and (epsilon < 1e-6 or s.grad.isfinite().all())


def test_plain_exponentials_would_have_done():
    cost = torch.full((3, 3), 2.0)
    assert (cost / -0.01).exp().sum() == 0  # rows of zeros: 0 / 0
    torch.testing.assert_close(sinkhorn_plan(cost, 0.01), torch.full((3, 3), 1 / 3))


def test_disjoint_supports_leave_no_gradient():
    """Two classes, all mass on the other one: reverse KL is huge and grows, the transport's gradient keeps its size."""
    t = torch.tensor([[6.0, -6.0], [5.0, -5.0]], dtype=D64)
    sizes = []
    for far in (6.0, 30.0, 300.0):
        s = torch.tensor([[-far, far], [-2.0, 2.0]], dtype=D64, requires_grad=True)
        (transport,) = torch.autograd.grad(sinkhorn_distance(s, t), s)
        (reverse,) = torch.autograd.grad(reverse_kl(s, t, reduction="sum"), s)
        sizes.append((transport[1].norm().item(), reverse.norm().item()))
    assert all(0.05 < transport < 2 for transport, _ in sizes)
    assert max(t for t, _ in sizes) / min(t for t, _ in sizes) < 2
    flat = torch.tensor([[-0.5, 0.5], [-1.0, 1.0]], dtype=D64, requires_grad=True)
    huge = 50 * t  # a teacher that is sure: reverse KL explodes, the transport does not
    (transport,) = torch.autograd.grad(sinkhorn_distance(flat, huge), flat)
    (reverse,) = torch.autograd.grad(reverse_kl(flat, huge, reduction="sum"), flat)
    assert 0.05 < transport.norm() < 2 < 50 < reverse.norm()


def test_low_precision_is_not_computed_in_float32():
    s, t = (z.detach().to(torch.bfloat16) for z in logits())
    exact = sinkhorn_distance(s.float(), t.float())
    assert sinkhorn_distance(s, t).dtype == torch.float32 and torch.equal(sinkhorn_distance(s, t), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_distance(s.float(), t.float()), exact)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: sinkhorn_cost(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "valid tokens as rows"),
        (lambda: sinkhorn_cost(torch.zeros(2, 3), torch.zeros(2, 4)), "same classes"),
        (lambda: sinkhorn_cost(torch.zeros(2, 3), torch.zeros(2, 3), float("nan")), "temperature must be positive"),
        (lambda: sinkhorn_plan(torch.zeros(3), 0.1), "a matrix"),
        (lambda: sinkhorn_plan(torch.zeros(2, 2), 0.0), "epsilon must be positive"),
        (lambda: sinkhorn_plan(torch.zeros(2, 2), float("nan")), "epsilon must be positive"),
        (lambda: sinkhorn_plan(torch.zeros(2, 2), 0.1, 0), "at least 1, got 0"),
        (lambda: sinkhorn_distance(torch.zeros(2, 3), torch.zeros(4, 3)), "one shape"),
        (lambda: top_entries(SparseLogits(*[torch.zeros(1, 2)] * 2, temperature=1.0), 2, 2.0), "temperature 1.0"),
        (lambda: top_entries(SparseLogits(*[torch.zeros(1, 2)] * 2, tail="renorm"), 2, 2.0), "mass of the rest"),
        (lambda: top_entries(SampledLogits(*[torch.zeros(1, 2)] * 3), 2, 2.0), "known by draws"),
    ],
)
def test_bad_input_passes(run, message):
    with pytest.raises(ValueError, match=message):
        run()


# ---- large vocabularies ----------------------------------------------------------------------------------------------
V, H = 23, 6


def heads(rows: int = 5, seed: int = 0, **settings):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=draw, dtype=D64) for n in (rows, V))
    return HeadLogits(hidden.requires_grad_(), weight.requires_grad_(), **settings)


FULL = {"bias": torch.linspace(-1, 1, V, dtype=D64), "scale": 0.7, "softcap": 3.0}


@pytest.mark.parametrize("settings", [{}, FULL])
def test_all_entries_are_not_the_whole_vocabulary_or_tiles_change_something(settings):
    student, teacher = heads(**settings), heads(4, seed=1, **settings)
    for tile_bytes in (None, 4 * V, 8 * V):
        exact = sinkhorn_cost(student.dense(), teacher.dense(), 2.0)
        cost = topk_cost(student, top_entries(teacher, V, 2.0, tile_bytes=tile_bytes), 2.0, tile_bytes=tile_bytes)
        torch.testing.assert_close(cost, exact, atol=1e-12, rtol=1e-12)
        ours, theirs = (torch.autograd.grad(c.square().sum(), (student.hidden, student.weight)) for c in (cost, exact))
        torch.testing.assert_close(ours, theirs)


def test_a_few_entries_are_not_those_of_a_loop():
    student, teacher = heads(), heads(4, seed=1)
    k = 3
    cost = topk_cost(student, top_entries(teacher, k, 2.0), 2.0)
    exact = sinkhorn_cost(student.dense(), teacher.dense(), 2.0)
    for j, row in enumerate(teacher.dense()):
        y = probabilities(row, 2.0)
        best = sorted(range(V), key=lambda v: -y[v])[:k]
        rest = 1 - sum(y[v] for v in best)
        for i, own in enumerate(student.dense()):
            x = probabilities(own, 2.0)
            expected = sum(abs(x[v] - y[v]) for v in best) + abs(1 - sum(x[v] for v in best) - rest)
            assert cost[i, j].item() == pytest.approx(expected)
            assert exact[i, j] - 2 * rest - 1e-9 <= cost[i, j] <= exact[i, j] + 1e-9


def test_what_a_cache_keeps_says_less_than_the_teacher_itself():
    student, teacher = heads(), heads(5, seed=1)
    log_p, ids = (teacher.dense() / 2).log_softmax(-1).topk(4)
    padded = SparseLogits(
        torch.cat([ids, ids[:, :1]], -1), torch.cat([log_p, torch.full((5, 1), -torch.inf, dtype=D64)], -1)
    )
    expected = topk_cost(student, top_entries(teacher, 4, 2.0), 2.0)
    for kept in (SparseLogits(ids, log_p, temperature=2.0), padded):
        torch.testing.assert_close(topk_cost(student, top_entries(kept, 99, 2.0), 2.0), expected)
    narrow, beyond = student.dense()[:, :10], ids >= 10  # what the student does not know counts as rest
    assert beyond.any() and not beyond.all()
    known = SparseLogits(ids.masked_fill(beyond, 0), log_p.masked_fill(beyond, -torch.inf))
    torch.testing.assert_close(topk_cost(narrow, SparseLogits(ids, log_p), 2.0), topk_cost(narrow, known, 2.0))


def test_a_larger_vocabulary_of_one_side_is_not_cut_to_the_common_one():
    student, teacher = heads(), heads(4, seed=1)
    narrow = HeadLogits(student.hidden, student.weight[:17])
    expected = sinkhorn_cost(narrow.dense(), teacher.dense()[:, :17], 2.0)
    torch.testing.assert_close(topk_cost(narrow, top_entries(teacher, V, 2.0, 17), 2.0, 17), expected)
    torch.testing.assert_close(topk_cost(student, top_entries(teacher, V, 2.0, 17), 2.0, 17), expected)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("per_row", [True, False])
def test_several_teachers_are_not_the_mixture_that_other_losses_see(space, per_row):
    parts = heads(5, seed=1), heads(5, seed=2).dense()
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [1.0, 0.0], [0.3, 0.7]], dtype=D64)
    mixture = MixtureLogits(parts, weights if per_row else weights[0], space)
    log_p = torch.cat([log_probs_of(mixture, slice(i, i + 2), 2.0) for i in (0, 2, 4)])
    student = heads(5, seed=3).dense()
    expected = one_term(student, mixture, ForwardKL(2.0))
    torch.testing.assert_close(one_term(student, 2 * log_p, ForwardKL(2.0)), expected)


def test_no_rows_are_an_error():
    student, teacher = heads(0), heads(0, seed=1)
    cost = topk_cost(student, top_entries(teacher, 3, 2.0), 2.0)
    plan = sinkhorn_plan(cost)
    (plan * cost).sum().backward()
    assert cost.shape == (0, 0) and student.weight.grad.abs().sum() == 0


def test_a_tensor_of_rows_times_vocabulary_is_made():
    width, rows = 4099, 64
    student, teacher = (
        HeadLogits(torch.randn(rows, H, requires_grad=True), torch.randn(width, H, requires_grad=True)) for _ in "st"
    )
    heads = {tuple(student.weight.shape)}
    for tile_bytes, wide in ((4 * width * 8, False), (None, True)):
        with _Widest(width, heads, rows=8) as mode:
            support = top_entries(teacher, 5, 2.0, tile_bytes=tile_bytes)
            topk_cost(student, support, tile_bytes=tile_bytes).sum().backward()
        assert bool(mode.worst) == wide, mode.worst
