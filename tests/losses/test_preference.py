"""Preference losses against loops over pairs, at their limits, and their gradients."""

import math

import pytest
import torch

from hf_distill.losses import preference_loss

BETA = 0.3


def four(n: int = 5, seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return tuple((-5 * torch.rand(n, dtype=torch.float64)).to(dtype) for _ in range(4))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sigmoid_loss_differs_from_a_loop_over_pairs(smoothing):
    logps, expected = four(), 0.0
    for pc, pr, rc, rr in zip(*(x.tolist() for x in logps), strict=True):
        margin = BETA * ((pc - rc) - (pr - rr))
        expected -= ((1 - smoothing) * math.log(sigma(margin)) + smoothing * math.log(sigma(-margin))) / 5
    loss, rewards = preference_loss(*logps, beta=BETA, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(rewards["rewards_chosen"], BETA * (logps[0] - logps[2]))
    torch.testing.assert_close(rewards["rewards_rejected"], BETA * (logps[1] - logps[3]))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (4.0, 0.0), (0.0, 4.0), (4.0, 3.0), (-9.0, -9.0)])
def test_kto_pair_differs_from_a_loop_over_answers(shift):
    """Shifts that put either K at 0, or neither."""
    pc, pr, rc, rr = four()
    pc, pr = pc + shift[0], pr + shift[1]
    a, b = (pc - rc).tolist(), (pr - rr).tolist()
    above, below = max(0.0, sum(a) / 5), max(0.0, sum(b) / 5)
    rows = [1 - sigma(BETA * (x - below)) for x in a] + [1 - sigma(BETA * (above - x)) for x in b]
    loss, _ = preference_loss(pc, pr, rc, rr, beta=BETA, loss_type="kto_pair")
    assert loss.item() == pytest.approx(sum(rows) / 10, rel=1e-12)


def test_each_half_is_held_against_its_own_k():
    """Rejected answers that became likelier raise the bar of the chosen ones, and the other way round."""
    zero = torch.zeros(2, dtype=torch.float64)
    likelier, _ = preference_loss(zero, zero + 2, zero, zero, beta=1.0, loss_type="kto_pair")
    assert likelier.item() == pytest.approx(((1 - sigma(-2)) + (1 - sigma(-2))) / 2)
    likelier, _ = preference_loss(zero + 2, zero, zero, zero, beta=1.0, loss_type="kto_pair")
    assert likelier.item() == pytest.approx(((1 - sigma(2)) + (1 - sigma(2))) / 2)
    less, _ = preference_loss(zero, zero - 2, zero, zero, beta=1.0, loss_type="kto_pair")
    assert less.item() == pytest.approx((0.5 + (1 - sigma(2))) / 2), "a K below 0 counts"


def test_the_length_of_an_answer_decides_or_dpkd_is_not_dpo_of_means():
    logps, lengths = four(), torch.tensor([1, 4, 2, 9, 3])
    lengths = dict(chosen_lengths=lengths, rejected_lengths=lengths.flip(0))
    loss, rewards = preference_loss(*logps, beta=BETA, loss_type="sigmoid_norm", **lengths)
    per_token = [x / n for x, n in zip(logps, [*lengths.values()] * 2, strict=True)]
    torch.testing.assert_close(loss, preference_loss(*per_token, beta=BETA)[0])
    torch.testing.assert_close(rewards["rewards_chosen"], BETA * (logps[0] - logps[2]))


@pytest.mark.parametrize(
    ("kind", "limit"), [("sigmoid", math.log(2)), ("kto_pair", 0.5), ("sigmoid_norm", math.log(2))]
)
def test_equal_policies_are_not_undecided(kind, limit):
    chosen, rejected, *_ = four()
    lengths = dict(chosen_lengths=torch.ones(5), rejected_lengths=torch.ones(5))
    loss, _ = preference_loss(chosen, rejected, chosen, rejected, loss_type=kind, **lengths)
    assert loss.item() == pytest.approx(limit, abs=1e-12)
    assert preference_loss(*four(), loss_type=kind, **lengths)[0].item() != pytest.approx(limit, abs=1e-3)


@pytest.mark.parametrize("kind", ["sigmoid", "kto_pair"])
def test_the_gradient_is_not_that_of_the_loss_or_reaches_the_reference(kind):
    pc, pr, rc, rr = four(seed=1)
    pc, pr = (pc + 4).requires_grad_(), (pr + 4).requires_grad_()
    rc, rr = rc.requires_grad_(), rr.requires_grad_()
    assert (pc - rc).mean() > 0 and (pr - rr).mean() > 0
    loss, rewards = preference_loss(pc, pr, rc, rr, beta=BETA, loss_type=kind)
    loss.backward()
    assert rc.grad is None and rr.grad is None
    assert not any(reward.requires_grad for reward in rewards.values())
    given = (rc.detach(), rr.detach())
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, *given, beta=BETA, loss_type=kind)[0], (pc, pr))


def test_the_k_terms_lose_their_gradient():
    pc, pr, rc, rr = four(seed=1)
    pc, pr = (pc + 4).requires_grad_(), (pr + 4).requires_grad_()
    preference_loss(pc, pr, rc, rr, beta=BETA, loss_type="kto_pair")[0].backward()
    a, b = (pc - rc).detach(), (pr - rr).detach()
    slope_a = (BETA * (a - b.mean())).sigmoid() * (1 - (BETA * (a - b.mean())).sigmoid())
    slope_b = (BETA * (a.mean() - b)).sigmoid() * (1 - (BETA * (a.mean() - b)).sigmoid())
    torch.testing.assert_close(pc.grad, -BETA * (slope_a + slope_b.mean()) / 10)
    torch.testing.assert_close(pr.grad, BETA * (slope_b + slope_a.mean()) / 10)


def test_half_precision_is_summed_in_half_precision():
    logps = tuple(x * 100 for x in four(dtype=torch.bfloat16))
    loss, _ = preference_loss(*logps, beta=BETA)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, preference_loss(*(x.float() for x in logps), beta=BETA)[0])
    assert preference_loss(*(x * 1e4 for x in four()))[0].isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_type="hinge"), "loss_type must be one of sigmoid, kto_pair"),
        (dict(beta=0.0), "beta must be positive"),
        (dict(beta=float("nan")), "beta must be positive"),
        (dict(label_smoothing=0.5), "below 0.5"),
        (dict(label_smoothing=0.1, loss_type="kto_pair"), "takes no label_smoothing"),
        (dict(loss_type="sigmoid_norm"), "give chosen_lengths"),
    ],
)
def test_bad_settings_go_through(changes, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*four(), **changes)
    with pytest.raises(ValueError, match=r"one shape \(B,\)"):
        preference_loss(*four()[:3], four(1)[3])
