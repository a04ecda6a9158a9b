import warnings

import pytest
import torch

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
    SampledLogits,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SparseLogits,
    StudentEntropy,
    TeacherEntropy,
    forward_kl,
    generalized_jsd,
    observe,
    one_term,
    run_terms,
    topk_divergence,
)

# fmt: off
FAMILY = [
    ForwardKL(1.7), ReverseKL(0.8), Jeffreys(), GeneralizedJSD(0.3, 1.4), SkewForwardKL(), SkewReverseKL(), TVD(),
    AdaptiveKL(), AlphaBeta(), AlphaBeta(0.5, 0), AlphaBeta(0, 0), SoftCrossEntropy(),
]
# fmt: on
N, V = 5, 11


def logits():
    torch.manual_seed(0)
    return torch.randn(N, V, dtype=torch.float64) * 2, torch.randn(N, V, dtype=torch.float64) * 2


def sparse(teacher, k, tail="bucket", temperature=1.0):
    top = (teacher / temperature).log_softmax(-1).topk(k)
    return SparseLogits(top.indices, top.values, tail)


def test_another_temperature_than_the_teacher_s_is_taken():
    s, t = logits()
    stored = sparse(t, 4, temperature=2.0)
    at_two = SparseLogits(stored.ids, stored.log_probs, temperature=2.0)
    assert torch.equal(one_term(s, at_two, ForwardKL(2.0)), one_term(s, stored, ForwardKL(2.0)))
    with pytest.raises(ValueError, match="have temperature 2.0, ForwardKL.*asks for another"):
        one_term(s, at_two, ForwardKL())


def reduced(x, ids, temperature, tail):
    """The definition, by autograd: log-probabilities over the full vocabulary, gathered, and the rest or a new sum."""
    log_x = (x / temperature).log_softmax(-1).gather(-1, ids)
    if tail == "renorm":
        return log_x.log_softmax(-1)
    return torch.cat([log_x, (1 - log_x.exp().sum(-1, keepdim=True)).log()], -1)


@pytest.mark.parametrize("divergence", FAMILY, ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_value_and_gradient_are_those_of_the_reduced_distributions(divergence, tail):
    s, t = logits()
    s.requires_grad_()
    T = divergence.temperature
    teacher = sparse(t, 4, tail, T)
    value = one_term(s, teacher, divergence, reduction="none")
    small = [reduced(x, teacher.ids, T, tail) * T for x in (s, t)]
    expected = one_term(*small, divergence, reduction="none")
    torch.testing.assert_close(value, expected)
    weight = torch.arange(1.0, N + 1, dtype=torch.float64)
    ours, right = (torch.autograd.grad((weight * x).sum(), s)[0] for x in (value, expected))
    torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("divergence", [d for d in FAMILY if not isinstance(d, AdaptiveKL)], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renorm"])
def test_gradcheck_through_a_head(divergence, tail):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, 3), (V, 3)))
    teacher = sparse(logits()[1], 3, tail)
    assert torch.autograd.gradcheck(lambda h, w: one_term(HeadLogits(h, w), teacher, divergence), (hidden, weight))


@pytest.mark.parametrize("divergence", [*FAMILY, Interpolated(torch.tensor(0.4))], ids=str)
def test_the_whole_vocabulary_as_support_is_the_dense_divergence(divergence):
    s, t = logits()
    s.requires_grad_()
    ours = one_term(s, sparse(t, V, temperature=divergence.temperature), divergence, reduction="none")
    expected = one_term(s, t, divergence, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), s)[0] for x in (ours, expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), GeneralizedJSD(), TVD(), AlphaBeta()], ids=str)
def test_a_bucket_only_hides_differences_and_less_so_with_more_entries(divergence):
    s, t = logits()
    full = one_term(s, t, divergence, reduction="none")
    last = torch.zeros(N, dtype=torch.float64)
    for k in range(1, V):
        value = one_term(s, sparse(t, k), divergence, reduction="none")
        assert (value <= full + 1e-9).all() and (value >= last - 1e-9).all()
        last = value


def test_ignore_is_the_plain_sum_on_the_support_and_for_the_forward_kl_only():
    s, t = logits()
    s.requires_grad_()
    teacher = sparse(t, 3, "ignore")
    log_q = s.log_softmax(-1).gather(-1, teacher.ids)
    expected = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1).mean()
    value = forward_kl(s, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], torch.autograd.grad(expected, s)[0])
    with pytest.raises(ValueError, match="needs the tail"):
        one_term(s, teacher, ReverseKL())
    with pytest.raises(ValueError, match="needs the tail"):
        topk_divergence(s, t, None, 3, tail="ignore", beta=0.5)


def test_labels_see_the_full_row_beside_a_sparse_teacher():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((N, 3), (V, 3)))
    teacher, labels = sparse(logits()[1], 3), torch.tensor([0, 10, 4, 9, 2])
    terms = {"kl": (ForwardKL(), 0.3), "label": (LabelCrossEntropy(), 1.0)}
    values = run_terms(HeadLogits(hidden, weight), teacher, terms, labels=labels, tile_rows=2)
    z = hidden @ weight.T
    small = [reduced(z, teacher.ids, 1.0, "bucket"), reduced(logits()[1], teacher.ids, 1.0, "bucket")]
    expected = {"kl": forward_kl(*small), "label": torch.nn.functional.cross_entropy(z, labels)}
    for name in terms:
        torch.testing.assert_close(values[name], expected[name])
    ours, right = (
        torch.autograd.grad(sum(w * v[n] for n, (_, w) in terms.items()), (hidden, weight)) for v in (values, expected)
    )
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("divergence", FAMILY, ids=str)
def test_padding_slots_change_nothing_whatever_their_id(tail, divergence):
    s, t = logits()
    s.requires_grad_()
    short = sparse(t, 3, tail)
    outside = short.ids.new_tensor([[next(v for v in range(V) if v not in row)] for row in short.ids.tolist()])
    ids = torch.cat([short.ids, short.ids[:, :1], outside, outside * 0 + 10**6], -1)
    log_probs = torch.cat([short.log_probs, torch.full((N, 3), -torch.inf, dtype=torch.float64)], -1)
    log_probs[:, -1] = -9.0  # an id beyond the student's vocabulary
    ours, right = (one_term(s, x, divergence, reduction="none") for x in (SparseLogits(ids, log_probs, tail), short))
    torch.testing.assert_close(ours, right)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), s)[0] for x in (ours, right)))


@pytest.mark.parametrize("tail", ["bucket", "renorm", "ignore"])
def test_a_row_of_padding_only_is_zero(tail):
    s = logits()[0].float().requires_grad_()
    teacher = SparseLogits(torch.zeros(N, 2, dtype=torch.long), torch.full((N, 2), -torch.inf), tail)
    value = one_term(s, teacher, ForwardKL())
    value.backward()
    assert value.abs() < 1e-5 and s.grad.abs().max() < 1e-5


def test_renorm_of_one_entry_warns_that_it_is_always_zero():
    s, t = logits()
    s.requires_grad_()
    with pytest.warns(UserWarning, match="k=1"):
        value = topk_divergence(s, t, None, 1, tail="renorm")
    assert value == 0 and (torch.autograd.grad(value, s)[0] == 0).all()


def test_topk_divergence_against_its_definition():
    s, t = logits()
    s, t, mask = s[:4].reshape(2, 2, V), t[:4].reshape(2, 2, V), torch.tensor([[True, False], [True, True]])
    for support, side in (("teacher", t), ("student", s)):
        for tail in ("bucket", "renorm"):
            for beta in (0.0, 0.4, 1.0):
                small = [reduced(x, side.topk(3).indices, 1.0, tail) for x in (s, t)]
                expected = generalized_jsd(*small, mask=mask, beta=beta)
                torch.testing.assert_close(topk_divergence(s, t, mask, 3, support, tail, beta), expected)
    torch.testing.assert_close(topk_divergence(s, t, mask, V), forward_kl(s, t, mask=mask), rtol=1e-5, atol=1e-6)
    for wrong in (dict(k=0), dict(k=V + 1), dict(k=2, support="both"), dict(k=2, tail="none")):
        with pytest.raises(ValueError, match="must"):
            topk_divergence(s, t, mask, **wrong)


def test_metrics_of_a_sparse_teacher():
    s, t = logits()
    seen = observe(s, sparse(t, 3), {"agreement": Agreement(), "entropy": TeacherEntropy()})
    torch.testing.assert_close(seen["agreement"], (s.argmax(-1) == t.argmax(-1)).double())
    p = reduced(t, sparse(t, 3).ids, 1.0, "bucket")
    torch.testing.assert_close(seen["entropy"], -(p.exp() * p).sum(-1))


def test_confident_models_stay_finite_in_float32():
    s = torch.tensor([[1e4, 0.0, -1e4, 0.0], [0.0, 100.0, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[0.0, 1e4, 0.0, 0.0], [0.0, 100.0, 0.0, 0.0]])
    for divergence in FAMILY:
        value = one_term(s, sparse(t, 2), divergence, reduction="none")
        gradient = torch.autograd.grad(value.sum(), s)[0]
        assert value.isfinite().all() and gradient.isfinite().all(), divergence


def draws(log_p, k, generator):
    """k draws per row from p^(1/2), as SampledLogits."""
    proposal = (log_p / 2).softmax(-1)
    ids = torch.multinomial(proposal, k, replacement=True, generator=generator)
    kept = log_p.gather(-1, ids)
    return SampledLogits(ids, kept.exp() / proposal.gather(-1, ids) / k, kept)


def test_draws_give_the_forward_kl_and_its_gradient_without_bias_and_top_k_does_not():
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(30, 3, dtype=torch.float64)
    log_p = (torch.randn(4, 30, dtype=torch.float64) * 2).log_softmax(-1)
    terms = {"kl": (ForwardKL(), 1.0)}

    def run(teacher):
        value = run_terms(HeadLogits(hidden, weight), teacher, terms)["kl"]
        return torch.cat([value.detach()[None], torch.autograd.grad(value, hidden)[0].flatten()])

    exact, generator = run(log_p), torch.Generator().manual_seed(1)
    seen = torch.stack([run(draws(log_p, 6, generator)) for _ in range(2000)])
    error = (seen.mean(0) - exact).abs() / (seen.std(0) / 2000**0.5)
    assert (error < 3.5).all() and error.mean() < 1.5
    top = log_p.topk(6)
    biased = run(SparseLogits(top.indices, top.values, "ignore"))
    assert ((biased - exact).abs() > 10 * seen.std(0) / 2000**0.5).any()


def test_of_draws_only_what_is_linear_in_the_teacher_is_taken():
    log_p = torch.randn(2, 7).log_softmax(-1)
    drawn = draws(log_p, 3, None)
    for divergence in (ReverseKL(), GeneralizedJSD(0.5), TVD()):
        with pytest.raises(ValueError, match="would be biased"):
            run_terms(torch.randn(2, 7), drawn, {"d": (divergence, 1.0)})
    label = {"kl": (ForwardKL(), 1.0), "label": (LabelCrossEntropy(), 1.0), "s": (StudentEntropy(), 0.0)}
    run_terms(torch.randn(2, 7), drawn, label, labels=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="one shape"):
        SampledLogits(drawn.ids, drawn.weights[:1], drawn.log_probs)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_pure_function_takes_another_temperature(support, temperature):
    s, t = logits()
    mask = torch.tensor([True, True, False, True, True])
    found = topk_divergence(s, t, mask, 3, support=support, temperature=temperature)
    total = 0.0
    for row in mask.nonzero().flatten().tolist():
        p, q = ((x[row] / temperature).softmax(-1) for x in (t, s))
        ids = (t if support == "teacher" else s)[row].topk(3).indices
        p, q = (torch.cat([x[ids], (1 - x[ids].sum())[None]]) for x in (p, q))
        total += (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(found, total / 4)


def test_an_id_beyond_the_student_s_vocabulary_counts():
    s, t = logits()
    wide = torch.cat([t, torch.full((N, 1), 5.0, dtype=t.dtype)], -1)  # the teacher's own padding, likely on purpose
    top = wide.log_softmax(-1).topk(4)
    padded = SparseLogits(top.indices, top.values)
    assert (top.indices == V).any(1).all()
    known = [[i for i in row if i < V] for row in top.indices.tolist()]
    value = observe(s, padded, {"kl": ForwardKL()})["kl"]
    for row, ids in enumerate(known):
        p, q = wide[row].softmax(-1)[ids], s[row].softmax(-1)[ids]
        p, q = (torch.cat([x, (1 - x.sum())[None]]) for x in (p, q))
        torch.testing.assert_close(value[row], (p * (p.log() - q.log())).sum())


def test_agreement_with_a_sparse_teacher_is_not_that_of_its_best_entry():
    s, t = logits()
    teacher = sparse(t, 4)
    shuffled = SparseLogits(teacher.ids[:, [2, 0, 3, 1]], teacher.log_probs[:, [2, 0, 3, 1]])
    wanted = (s.argmax(-1) == t.argmax(-1)).to(s.dtype)
    torch.testing.assert_close(observe(s, shuffled, {"a": Agreement()})["a"], wanted)


def test_one_entry_renormalised_is_silent():
    s, t = logits()
    with pytest.warns(UserWarning, match="compares 1 with 1"):
        one_term(s, sparse(t, 1, tail="renorm"), ForwardKL())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_term(s, sparse(t, 1, tail="bucket"), ForwardKL())
        one_term(s, sparse(t, 2, tail="renorm"), ForwardKL())
