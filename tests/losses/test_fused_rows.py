"""Weights, masks and dimensions of the rows that one projection is made for."""

import pytest
import torch

from hf_distill.losses import TVD, ForwardKL, observe, one_term, run_terms
from tests.losses.test_fused import V, heads


def test_one_term_is_weighted():
    leaves, student, teacher = heads()
    torch.testing.assert_close(one_term(student, teacher, ForwardKL()), run_terms(
        student, teacher, {"value": (ForwardKL(), 1.0)})["value"])  # fmt: skip
    gradient = torch.autograd.grad(one_term(student, teacher, ForwardKL()), leaves[0])[0]
    rows = student.hidden @ student.weight.T + student.bias
    dense = one_term(rows, teacher.hidden @ teacher.weight.T, ForwardKL())
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, leaves[0])[0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_negative_weight_of_a_row_is_left_out(reduction):
    torch.manual_seed(0)
    s, t = (torch.randn(3, V, dtype=torch.float64) for _ in range(2))
    weight = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    each = observe(s, t, {"kl": ForwardKL()})["kl"]
    found = run_terms(s, t, {"kl": (ForwardKL(), 1.0)}, row_weights={"kl": weight}, reduction=reduction)["kl"]
    torch.testing.assert_close(found, (each * weight).sum() / (3 if reduction == "mean" else 1))


def test_a_mask_of_fewer_rows_is_taken():
    s, t = torch.zeros(3, V), torch.zeros(3, V)
    for shape in ((2,), (4,), (3, 1)):
        with pytest.raises(ValueError):
            run_terms(s, t, {"kl": (ForwardKL(), 1.0)}, mask=torch.ones(shape))


def test_several_dimensions_of_rows_are_summed_over_terms():
    torch.manual_seed(0)
    s, t = (torch.randn(2, 3, V, dtype=torch.float64) for _ in range(2))
    terms = {"kl": (ForwardKL(), 1.0), "tvd": (TVD(), 1.0)}
    whole = run_terms(s, t, terms, reduction="sum")
    for name, (divergence, _) in terms.items():
        torch.testing.assert_close(whole[name], observe(s, t, {name: divergence})[name].sum())
