import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_distill.losses import (
    TVD,
    AdaptiveKL,
    Agreement,
    AlphaBeta,
    ForwardKL,
    GeneralizedJSD,
    HeadLogits,
    Interpolated,
    Jeffreys,
    LabelCrossEntropy,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SparseLogits,
    StudentEntropy,
    TeacherEntropy,
    observe,
    one_term,
    reverse_kl,
    run_terms,
)
from hf_distill.losses.engines import Eager

EVERY = {
    "forward": ForwardKL(1.7), "reverse": ReverseKL(0.8), "jeffreys": Jeffreys(), "jsd": GeneralizedJSD(0.3),
    "skew_forward": SkewForwardKL(), "skew_reverse": SkewReverseKL(), "tvd": TVD(), "adaptive": AdaptiveKL(),
    "alpha_beta": AlphaBeta(), "soft": SoftCrossEntropy(2.0), "taid": Interpolated(torch.tensor(0.4)),
    "label": LabelCrossEntropy(), "agreement": Agreement(),
}  # fmt: skip
TERMS = {name: (divergence, 0.25 + k / 10) for k, (name, divergence) in enumerate(EVERY.items())}
SMALL = {"kl": (ForwardKL(2.0), 0.5), "reverse": (ReverseKL(), torch.tensor(0.3)), "label": (LabelCrossEntropy(), 1.0)}
N, V, H = 5, 17, 4


def heads(bias=True, scale=1.0, softcap=None, v_student=V, v_teacher=V, dtype=torch.float64, rows=N, seed=0):
    torch.manual_seed(seed)
    leaves = [torch.randn(rows, H, dtype=dtype), torch.randn(v_student, H, dtype=dtype)]
    leaves += [torch.randn(v_student, dtype=dtype)] if bias else []
    leaves = [x.requires_grad_() for x in leaves]
    teacher = HeadLogits(torch.randn(rows, 6, dtype=dtype), torch.randn(v_teacher, 6, dtype=dtype))
    return leaves, HeadLogits(*leaves[:2], leaves[2] if bias else None, scale, softcap), teacher


def gradients(terms, values, leaves, factor=3.0):
    loss = factor * sum(weight * values[name] for name, (_, weight) in terms.items())
    return torch.autograd.grad(loss, leaves)


def labels_of(rows=N, vocabulary=V):
    return torch.arange(rows) * 7 % vocabulary


@pytest.mark.parametrize("tile_rows", [1, 2, 5, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_rows", [2, 64])
def test_row_tiles_give_the_values_and_gradients_of_dense_logits(
    monkeypatch, tile_rows, bias, softcap, scale, masked, block_rows
):
    monkeypatch.setattr(Eager, "block_bytes", lambda budget, device: block_rows * V * 8)
    leaves, student, teacher = heads(bias, scale, softcap)
    mask = torch.tensor([1, 0, 1, 1, 0]) if masked else None
    row_weights = {"forward": torch.rand(N), "label": torch.rand(N) + 1} if masked else None
    given = dict(labels=labels_of(), mask=mask, row_weights=row_weights)
    fused = run_terms(student, teacher, TERMS, tile_rows=tile_rows, **given)
    dense = run_terms(student.dense(), teacher.dense(), TERMS, **given)
    for name in TERMS:
        torch.testing.assert_close(fused[name], dense[name], msg=name)
    pairs = zip(gradients(TERMS, fused, leaves), gradients(TERMS, dense, leaves), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("adaptive", "taid", "agreement")])
def test_gradcheck_through_the_head(name):
    leaves, student, teacher = heads(scale=0.7, softcap=4.0)

    def loss(hidden, weight, bias):
        head = HeadLogits(hidden, weight, bias, 0.7, 4.0)
        return one_term(head, teacher, EVERY[name], labels=labels_of())

    assert torch.autograd.gradcheck(loss, leaves)


def test_dense_rows_match_autograd_of_plain_torch_per_term_and_row():
    leaves, student, teacher = heads()
    s, t = student.dense().detach().requires_grad_(), teacher.dense()
    factors = torch.randn(2, N, dtype=torch.float64)
    rows = run_terms(s, t, {"f": (ForwardKL(), 1.0), "r": (ReverseKL(), 1.0)}, reduction="none", tile_rows=2)
    ours = torch.autograd.grad((factors[0] * rows["f"] + factors[1] * rows["r"]).sum(), s)[0]
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(ours, torch.autograd.grad((factors[0] * forward + factors[1] * reverse).sum(), s)[0])


@pytest.mark.parametrize("kind", ["dense", "head"])
@pytest.mark.parametrize(("v_student", "v_teacher"), [(17, 13), (13, 17)])
def test_other_vocabularies_meet_on_their_common_prefix_and_labels_see_the_whole(kind, v_student, v_teacher):
    leaves, student, teacher = heads(v_student=v_student, v_teacher=v_teacher)
    labels = torch.tensor([0, 3, v_student - 1, v_student - 2, 5])
    given = student if kind == "head" else student.dense()
    values = run_terms(given, teacher, SMALL, labels=labels, tile_rows=2)
    z, zt = student.dense(), teacher.dense()[:, :13]
    log_q, log_p = (z[:, :13] / 2).log_softmax(-1), (zt / 2).log_softmax(-1)
    log_q1, log_p1 = z[:, :13].log_softmax(-1), zt.log_softmax(-1)
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "reverse": (log_q1.exp() * (log_q1 - log_p1)).sum(-1).mean(),
        "label": torch.nn.functional.cross_entropy(z, labels),
    }
    for name in expected:
        torch.testing.assert_close(values[name], expected[name])
    pairs = zip(gradients(SMALL, values, leaves), gradients(SMALL, expected, leaves), strict=True)
    for ours, right in pairs:
        torch.testing.assert_close(ours, right)


def test_row_weights_scale_rows_but_not_the_denominator():
    leaves, student, teacher = heads()
    weights, mask = torch.tensor([0.0, 2, 1, 5, 0.5]), torch.tensor([1, 1, 1, 0, 1])
    each = reverse_kl(student.dense(), teacher.dense(), reduction="none")
    terms = {"r": (ReverseKL(), 1.0)}
    value = run_terms(student, teacher, terms, mask=mask, row_weights=weights, tile_rows=2)["r"]
    torch.testing.assert_close(value, (each * weights * mask).sum() / 4)
    weights.requires_grad_()
    run_terms(student, teacher, terms, row_weights={"r": weights})["r"].backward()
    assert weights.grad is None
    with pytest.raises(ValueError, match="name no term: other"):
        run_terms(student, teacher, terms, row_weights={"other": weights})


class Flops(FlopCounterMode):
    def __init__(self):
        super().__init__(display=False)


@pytest.mark.parametrize("tile_rows", [3, 64])
def test_flops_are_one_projection_each_and_two_gradient_products(tile_rows):
    leaves, student, teacher = heads()

    def count(grad=True, **flags):
        for leaf, name in zip(leaves, ("hidden", "weight", "bias"), strict=True):
            leaf.requires_grad_(flags.get(name, True))
        with Flops() as flops, torch.set_grad_enabled(grad):
            values = run_terms(student, teacher, TERMS, labels=labels_of(), tile_rows=tile_rows)
            if grad:
                sum(w * values[n] for n, (_, w) in TERMS.items()).backward()
        return flops.get_total_flops()

    unit, teacher_unit = 2 * N * V * H, 2 * N * V * 6
    assert count() == 3 * unit + teacher_unit
    assert count(weight=False, bias=False) == 2 * unit + teacher_unit
    assert count(grad=False) == unit + teacher_unit
    with Flops() as flops:
        observe(student, teacher, {"a": Agreement(), "s": StudentEntropy(), "t": TeacherEntropy()})
    assert flops.get_total_flops() == unit + teacher_unit


def test_entries_that_no_term_reads_are_not_projected():
    leaves, student, teacher = heads(v_student=17, v_teacher=13)
    with Flops() as flops:
        reverse_kl(student, teacher).backward()
    assert flops.get_total_flops() == 2 * N * 13 * (3 * H + 6)


@pytest.mark.parametrize("terms", [{"kl": (ForwardKL(2.0), 0.5)}, SMALL, TERMS])
def test_masked_rows_cost_nothing(terms):
    leaves, student, teacher = heads()
    mask = torch.tensor([0, 1, 0, 0, 1])
    with Flops() as flops:
        values = run_terms(student, teacher, terms, labels=labels_of(), mask=mask)
        sum(w * values[n] for n, (_, w) in terms.items()).backward()
    assert flops.get_total_flops() == 2 * 2 * V * (3 * H + 6)


@pytest.mark.parametrize("kind", ["dense", "head"])
@pytest.mark.parametrize("masked", [False, True])
def test_values_per_row_come_along(kind, masked):
    leaves, student, teacher = heads()
    mask, rows = torch.tensor([1, 0, 1, 1, 0]) if masked else None, {}
    given = student if kind == "head" else student.dense()
    values = run_terms(given, teacher, SMALL, labels=labels_of(), mask=mask, per_row=rows, tile_rows=2)
    each = run_terms(student.dense(), teacher, SMALL, labels=labels_of(), mask=mask, reduction="none")
    for name in SMALL:
        torch.testing.assert_close(rows[name], each[name].detach())
        torch.testing.assert_close(rows[name].sum() / (3 if masked else N), values[name].detach())
        assert not rows[name].requires_grad and rows[name].shape == (N,)


def test_a_retained_graph_can_be_run_again_and_a_freed_one_cannot():
    leaves, student, teacher = heads()
    values = run_terms(student, teacher, SMALL, labels=labels_of())
    loss = sum(w * values[n] for n, (_, w) in SMALL.items())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(2 * loss, leaves)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(2 * a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_sparse_teacher_costs_the_students_products_only():
    leaves, student, teacher = heads()
    top = teacher.dense().log_softmax(-1).topk(4)
    sparse = SparseLogits(top.indices, top.values)
    with Flops() as flops:
        values = run_terms(student, sparse, SMALL, labels=labels_of(), tile_rows=2)
        sum(w * values[n] for n, (_, w) in SMALL.items()).backward()
    assert flops.get_total_flops() == 6 * N * V * H


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_of_all_rows_and_the_vocabulary_is_made():
    leaves, student, teacher = heads(rows=64, v_student=101, v_teacher=101)
    with Largest() as largest:
        values = run_terms(student, teacher, TERMS, labels=labels_of(64), tile_rows=8)
        sum(w * values[n] for n, (_, w) in TERMS.items()).backward()
        observe(student, teacher, {"a": Agreement()}, tile_rows=8)
    assert 8 * 101 <= largest.elements < 64 * 101 / 2


def test_a_byte_budget_sets_the_rows_of_a_tile_and_not_the_result():
    leaves, student, teacher = heads(dtype=torch.float32, rows=40)
    small, large = (run_terms(student, teacher, SMALL, labels=labels_of(40), tile_bytes=size) for size in (1, 2**27))
    for name in SMALL:
        torch.testing.assert_close(small[name], large[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(SMALL, small, leaves), gradients(SMALL, large, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_double_backward_says_what_to_do():
    leaves, student, teacher = heads()
    for given in (student, student.dense()):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(reverse_kl(given, teacher), leaves[0], create_graph=True)


def test_weighting_terms_after_the_call_is_refused():
    leaves, student, teacher = heads()
    values = run_terms(student, teacher, SMALL, labels=labels_of())
    with pytest.raises(RuntimeError, match="re-weighted"):
        (values["kl"] + values["reverse"] + values["label"]).backward()


def test_terms_of_weight_zero_are_reported_and_push_nothing():
    leaves, student, teacher = heads()
    off = {"r": (ReverseKL(), 0.0)}
    values = run_terms(student, teacher, off)
    assert values["r"] > 0
    assert all((g == 0).all() for g in gradients(off, values, leaves))
    both = {"r": (ReverseKL(), 0.0), "f": (ForwardKL(), 2.0)}
    only = {"f": (ForwardKL(), 2.0)}
    mixed = gradients(both, run_terms(student, teacher, both), leaves)
    for a, b in zip(mixed, gradients(only, run_terms(student, teacher, only), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dense", "head"])
def test_no_rows_and_masked_rows_give_zero_and_keep_the_graph(kind):
    for rows in (0, N):
        leaves, student, teacher = heads(rows=rows)
        given = student if kind == "head" else student.dense()
        mask = torch.zeros(rows)
        values = run_terms(given, teacher, SMALL, labels=labels_of(rows), mask=mask)
        assert all(v == 0 for v in values.values())
        assert all((g == 0).all() for g in gradients(SMALL, values, leaves))


def test_a_masked_row_of_infinite_loss_counts_nothing():
    s = torch.tensor([[0.0, -torch.inf], [0.0, 1.0]], requires_grad=True)
    given = dict(labels=torch.tensor([1, 1]), mask=torch.tensor([0, 1]))
    value = run_terms(s, None, {"label": (LabelCrossEntropy(), 1.0)}, **given)["label"]
    value.backward()
    torch.testing.assert_close(value, -s[1].log_softmax(-1)[1])
    assert (s.grad[0] == 0).all()


def test_frozen_parts_get_no_gradient_and_evaluation_builds_no_graph():
    leaves, student, teacher = heads()
    leaves[1].requires_grad_(False), leaves[2].requires_grad_(False)
    reverse_kl(student, teacher).backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None
    with torch.no_grad():
        assert not reverse_kl(student, teacher).requires_grad
    with torch.inference_mode():
        frozen = teacher.dense() + 0.0
    reverse_kl(student, frozen).backward()
    reverse_kl(student.dense(), frozen).backward()


def test_rows_of_a_head_have_no_per_row_gradient():
    leaves, student, teacher = heads()
    with pytest.raises(ValueError, match="needs dense logits"):
        reverse_kl(student, teacher, reduction="none")
    with pytest.raises(ValueError, match="cannot be SparseLogits"):
        reverse_kl(SparseLogits(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1)), teacher)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_heads_keep_float32_sums(how):
    leaves, student, teacher = heads(dtype=torch.float32, rows=64)
    exact = gradients(SMALL, run_terms(student, teacher, SMALL, labels=labels_of(64)), leaves)
    if how == "bfloat16":
        low = [x.detach().bfloat16().requires_grad_() for x in leaves]
        values = run_terms(HeadLogits(*low), teacher, SMALL, labels=labels_of(64), tile_rows=4)
        assert all(x.dtype == torch.bfloat16 for x in gradients(SMALL, values, low))
        values, leaves = run_terms(HeadLogits(*low), teacher, SMALL, labels=labels_of(64), tile_rows=4), low
    else:
        with torch.autocast("cpu", torch.bfloat16):
            values = run_terms(student, teacher, SMALL, labels=labels_of(64), tile_rows=4)
    assert all(v.dtype == torch.float32 for v in values.values())
    for ours, right, leaf in zip(gradients(SMALL, values, leaves), exact, leaves, strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.float() - right).norm() / right.norm() < 2e-2


def test_many_small_tiles_do_not_round_a_bfloat16_head_gradient_more_often():
    leaves, student, teacher = heads(dtype=torch.float32, rows=256)
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    one, many = (
        gradients(SMALL, run_terms(HeadLogits(*low), teacher, SMALL, labels=labels_of(256), tile_rows=rows), low)
        for rows in (256, 2)
    )
    for a, b in zip(one, many, strict=True):
        assert (a.float() - b.float()).norm() / a.float().norm() < 2e-3


def test_autocast_runs_the_products_in_its_type_and_nothing_else():
    leaves, student, teacher = heads(dtype=torch.float32)
    plain = run_terms(student, teacher, SMALL, labels=labels_of())
    rounded = HeadLogits(*(x.detach().bfloat16() for x in leaves[:2]), leaves[2].detach())
    teacher16 = HeadLogits(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    expected = run_terms(rounded, teacher16, SMALL, labels=labels_of())
    with torch.autocast("cpu", torch.bfloat16):
        values = run_terms(student, teacher, SMALL, labels=labels_of())
    assert any(values[n] != plain[n] for n in SMALL)
    for name in SMALL:
        torch.testing.assert_close(values[name], expected[name])


def test_observe_gives_values_per_row_without_a_gradient():
    leaves, student, teacher = heads(v_student=17, v_teacher=13)
    metrics = {
        "r": ReverseKL(),
        "a": Agreement(),
        "s": StudentEntropy(),
        "t": TeacherEntropy(),
        "c": LabelCrossEntropy(),
    }
    seen = observe(student, teacher, metrics, labels=labels_of(), tile_rows=2)
    z, zt = student.dense().detach(), teacher.dense()
    q, p = z.softmax(-1), zt.softmax(-1)
    assert not any(v.requires_grad for v in seen.values())
    torch.testing.assert_close(seen["r"], reverse_kl(z, zt, reduction="none"))
    torch.testing.assert_close(seen["a"], (z[:, :13].argmax(-1) == zt.argmax(-1)).double())
    torch.testing.assert_close(seen["s"], -(q * q.log()).sum(-1))
    torch.testing.assert_close(seen["t"], -(p * p.log()).sum(-1))
    torch.testing.assert_close(seen["c"], torch.nn.functional.cross_entropy(z, labels_of(), reduction="none"))
    batched = observe(z.reshape(1, N, 17), zt.reshape(1, N, 13), {"r": ReverseKL()})
    assert batched["r"].shape == (1, N)
