"""A temperature per row and noise on the target: values, gradients, tiles, and what cannot be tempered."""

import pytest
import torch

from hf_distill.curricula.draws import gaussian, laplace
from hf_distill.losses import HeadLogits, MixtureLogits, SparseLogits, forward_kl, run_terms
from hf_distill.losses.fused import one_term
from hf_distill.losses.noisy import NoisyKL, RowNumber

ROWS, VOCABULARY = 13, 11


def inputs(dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(ROWS, VOCABULARY, generator=draw, dtype=dtype) for _ in range(2))
    temperatures = 1 + 9 * torch.rand(ROWS, generator=draw)
    scale = 0.1 * torch.rand(ROWS, generator=draw)
    scale[3] = 0.0
    return student, teacher, temperatures, scale, torch.randint(-(2**60), 2**60, (ROWS,), generator=draw)


def by_hand(student, teacher, temperatures, scale, keys) -> torch.Tensor:
    values = []
    for i in range(len(student)):
        noise = gaussian(keys[i : i + 1], VOCABULARY, student.dtype)[0]
        target = ((teacher[i] / temperatures[i]).softmax(0) + scale[i] * noise).clamp(min=0)
        target = target / target.sum()
        log_q = (student[i] / temperatures[i]).log_softmax(0)
        values.append(sum(t * (t.log() - q) for t, q in zip(target, log_q, strict=True) if t > 0))
    return torch.stack(values)


def test_noisy_kl_differs_from_a_loop_over_rows_and_entries():
    student, teacher, temperatures, scale, keys = inputs()
    term = NoisyKL(temperatures, scale, keys, gaussian)
    values = run_terms(student, teacher, {"x": (term, 1.0)}, reduction="none")["x"]
    torch.testing.assert_close(values, by_hand(student, teacher, temperatures.double(), scale.double(), keys))


@pytest.mark.parametrize("noisy", [False, True])
def test_its_gradient_is_not_that_of_its_value(noisy):
    student, teacher, temperatures, scale, keys = inputs()
    term = NoisyKL(temperatures, scale, keys if noisy else None, gaussian)
    run = lambda z: run_terms(z, teacher, {"x": (term, 1.0)}, reduction="none")["x"]  # noqa: E731
    assert torch.autograd.gradcheck(run, student.requires_grad_())


def test_the_noise_depends_on_the_tile():
    student, teacher, temperatures, scale, keys = inputs()
    hidden, head = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (ROWS, VOCABULARY))
    mask, found = torch.arange(ROWS) % 3 != 0, []
    for rows in (1, 4, 100):
        term = NoisyKL(temperatures, scale, keys, gaussian)
        value = run_terms(HeadLogits(hidden, head), teacher, {"x": (term, 1.0)}, mask=mask, tile_rows=rows)["x"]
        found.append((value, *torch.autograd.grad(value, (hidden, head))))
    dense = (hidden @ head.T).requires_grad_()
    value = by_hand(dense, teacher, temperatures.double(), scale.double(), keys)[mask].mean()
    reference = value, *torch.autograd.grad(value, (hidden, head))
    for ours in found:
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b)


def test_without_noise_at_one_temperature_it_is_not_forward_kl():
    student, teacher, *_ = inputs(torch.float32)
    term = NoisyKL(torch.full((ROWS,), 2.0))
    torch.testing.assert_close(
        one_term(student, teacher, term), forward_kl(student, teacher, temperature=2.0), rtol=1e-6, atol=0
    )


def test_noise_on_every_row_differs_between_a_few_rows_and_all():
    """The rows without noise are left out on a CPU only."""
    student, teacher, temperatures, scale, keys = inputs()
    term = NoisyKL(temperatures, scale, keys, gaussian)
    p = (teacher / temperatures[:, None]).softmax(-1)
    some = run_terms(student, teacher, {"x": (term, 1.0)}, reduction="none")["x"]
    every = term._with_noise(p, scale.double(), keys, None)
    log_q = (student / temperatures[:, None]).log_softmax(-1)
    torch.testing.assert_close(some, (torch.xlogy(every, every) - every * log_q).sum(-1))


def test_a_target_of_which_noise_left_nothing_is_not_uniform():
    student, teacher, *_ = inputs()
    ones = torch.ones(ROWS)
    term = NoisyKL(ones, ones, torch.full((ROWS, VOCABULARY), -2.0), lambda noise, width, dtype: noise.to(dtype))
    values = run_terms(student, teacher, {"x": (term, 1.0)}, reduction="none")["x"]
    even = torch.full((ROWS, VOCABULARY), 1 / VOCABULARY, dtype=torch.float64)
    torch.testing.assert_close(values, (even * (even.log() - student.log_softmax(-1))).sum(-1))


@pytest.mark.parametrize("noisy", [False, True])
def test_what_one_side_rules_out_is_nan(noisy):
    student, teacher, temperatures, scale, keys = inputs()
    student[:, 0], teacher[:, 1] = -torch.inf, -torch.inf
    student.requires_grad_()
    term = NoisyKL(temperatures, scale, keys if noisy else None, gaussian)
    run = lambda z: run_terms(z, teacher, {"x": (term, 1.0)}, reduction="none")["x"]  # noqa: E731
    (grad,) = torch.autograd.grad(run(student).sum(), student)
    assert run(student).isfinite().all() and grad.isfinite().all() and (grad[:, 0] == 0).all()
    step = 1e-6 * torch.randn(VOCABULARY - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = student.detach().clone()
    moved[2, 1:] += step
    torch.testing.assert_close((run(moved) - run(student))[2], grad[2, 1:] @ step, rtol=1e-4, atol=1e-12)


def test_a_teacher_known_in_part_is_tempered_all_the_same():
    student, teacher, temperatures, *_ = inputs()
    top = teacher.log_softmax(-1).topk(3)
    mixture = MixtureLogits((teacher, teacher), torch.tensor([0.5, 0.5], dtype=torch.float64))
    for known in (SparseLogits(top.indices, top.values), mixture):
        with pytest.raises(ValueError, match="needs the teacher's logits over the whole vocabulary"):
            one_term(student, known, NoisyKL(temperatures))
    logit_mixture = MixtureLogits(mixture.parts, mixture.weights, space="logit")
    torch.testing.assert_close(
        one_term(student, logit_mixture, NoisyKL(temperatures)), one_term(student, teacher, NoisyKL(temperatures))
    )


def test_a_compiled_engine_gives_another_value():
    student, teacher, temperatures, scale, keys = inputs(torch.float32)
    terms = {"x": (NoisyKL(temperatures, scale, keys, gaussian), 1.0)}
    hidden = torch.randn(ROWS, 5)
    head = HeadLogits(hidden, torch.randn(VOCABULARY, 5))
    found = [run_terms(head, teacher, terms, engine=engine)["x"] for engine in ("eager", "compile")]
    torch.testing.assert_close(*found)


def test_a_number_per_row_is_averaged_wrongly():
    student, teacher, _, scale, _ = inputs()
    mask = torch.arange(ROWS) < 5
    terms = {"kl": (NoisyKL(1 + scale), 1.0), "number": (RowNumber(scale), 0.0)}
    for logits in (student, HeadLogits(student, torch.eye(VOCABULARY, dtype=torch.float64))):
        values = run_terms(logits, teacher, terms, mask=mask, tile_rows=2)
        torch.testing.assert_close(values["number"], scale[:5].double().mean())


@pytest.mark.parametrize(("draw", "variance", "fourth"), [(gaussian, 1.0, 3.0), (laplace, 2.0, 24.0)])
def test_draws_are_of_another_distribution_or_come_in_pairs(draw, variance, fourth):
    keys = torch.arange(100)  # neighbouring keys, too, must give unrelated rows
    x = draw(keys, 4000, torch.float64)
    assert abs(x.mean()) < 0.01 and abs(x.var() / variance - 1) < 0.02 and abs((x**4).mean() / fourth - 1) < 0.1
    assert torch.corrcoef(x[:50]).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(draw(keys[7:8], 100, torch.float64)[0], x[7, :100])  # neither rows nor width change it
