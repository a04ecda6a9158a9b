"""PLD: its value and gradient against loops and limits, and short runs."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_distill.methods.pld import PLD, PLDConfig, build_trainer, pld_loss
from hf_distill.signals import Signals
from tests.baselines.models import INDEXED, dataset, vit
from tests.baselines.models import bert as tiny_bert
from tests.helpers import SGD, plain_arguments


def logits(rows: int = 6, classes: int = 5, scale: float = 2.0, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(rows, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t, torch.arange(rows) % classes


def ranking(t, y) -> list[int]:
    return [y] + sorted((c for c in range(len(t)) if c != y), key=lambda c: -t[c])


def by_loop(s, t, y, temperature=1.0, alpha_of=None) -> torch.Tensor:
    """The page's double sum, row by row."""
    total = 0.0
    for i in range(len(s)):
        order = ranking(t[i].tolist(), int(y[i]))
        q = [math.exp(v / temperature) for v in t[i].tolist()]
        for k, c in enumerate(order):
            alpha = q[c] / sum(q) if alpha_of is None else alpha_of(k, len(order))
            rest = sum(torch.exp(s[i, other]) for other in order[k:])
            total = total + alpha * (torch.log(rest) - s[i, c])
    return total / len(s)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_or_gradient_are_not_the_double_sums(temperature):
    s, t, y = logits()
    value = pld_loss(s, t, y, temperature)
    reference = by_loop(s, t, y, temperature)
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (value, reference)))


WEIGHTS = {
    "listmle": lambda k, n: 1 / n,
    "plistmle": lambda k, n: 2.0 ** -(k + 1) / (1 - 2.0**-n),
    "ce": lambda k, n: float(k == 0),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_other_weights_are_not_theirs(weights):
    s, t, y = logits()
    torch.testing.assert_close(pld_loss(s, t, y, weights=weights), by_loop(s, t, y, alpha_of=WEIGHTS[weights]))


def test_the_gradient_is_not_the_papers():
    """dL/ds_j = Σ_{k ≤ pos(j)} α_k σ_k(j) - α_pos(j)."""
    s, t, y = logits(rows=1)
    pld_loss(s, t, y).backward()
    order, q, e = ranking(t[0].tolist(), int(y[0])), t[0].softmax(-1), s[0].detach().exp()
    for place, j in enumerate(order):
        expected = sum(q[order[k]] * e[j] / e[order[k:]].sum() for k in range(place + 1)) - q[j]
        torch.testing.assert_close(s.grad[0, j], expected)


def test_weight_on_the_label_alone_is_not_the_cross_entropy():
    s, t, y = logits()
    torch.testing.assert_close(pld_loss(s, t, y, weights="ce"), cross_entropy(s, y))


def test_a_constant_added_to_the_student_changes_the_loss():
    s, t, y = logits()
    torch.testing.assert_close(pld_loss(s + torch.arange(6.0)[:, None].double(), t, y), pld_loss(s, t, y))


def test_two_classes_are_not_the_weighted_cross_entropy():
    s, t, y = logits(classes=2)
    expected = (t.softmax(-1).gather(1, y[:, None])[:, 0] * cross_entropy(s, y, reduction="none")).mean()
    torch.testing.assert_close(pld_loss(s, t, y), expected)


def test_low_ranks_do_not_count():
    s, t, y = logits(rows=1)
    *_, third, last = ranking(t[0].tolist(), int(y[0]))
    swapped = t.clone()
    swapped[0, [third, last]] = t[0, [last, third]]
    assert (pld_loss(s, swapped, y) - pld_loss(s, t, y)).abs() > 1e-3


def test_temperature_moves_more_than_the_weights():
    s, t, y = logits()
    assert not torch.allclose(pld_loss(s, t, y, 4.0), pld_loss(s, t, y, 1.0))
    for weights in WEIGHTS:
        torch.testing.assert_close(pld_loss(s, t, y, 4.0, weights), pld_loss(s, t, y, 1.0, weights))


@pytest.mark.parametrize("weights", ["teacher", "listmle"])
def test_gradcheck(weights):
    s, t, y = logits(rows=3)
    assert torch.autograd.gradcheck(lambda s: pld_loss(s, t, y, 2.0, weights), s)


def test_the_teacher_gets_a_gradient():
    s, t, y = logits()
    t.requires_grad_()
    pld_loss(s, t, y).backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_it_is_not_convex():
    s, t, y = logits()
    other = logits(seed=9)[0]
    for share in (0.25, 0.5, 0.75):
        between = pld_loss(share * s + (1 - share) * other, t, y)
        assert between <= share * pld_loss(s, t, y) + (1 - share) * pld_loss(other, t, y)


def test_the_best_logits_rank_otherwise():
    _, t, y = logits(rows=3, scale=1.0)
    s = torch.zeros_like(t, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.1)
    for _ in range(300):
        adam.zero_grad()
        pld_loss(s, t, y, 4.0).backward()
        adam.step()
    assert s.argsort(-1, descending=True).tolist() == [ranking(t[i].tolist(), int(y[i])) for i in range(3)]


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_overflow(scale):
    s, t, y = logits(scale=scale)
    s = s.detach().float().requires_grad_()
    value = pld_loss(s, t.float(), y)
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_bfloat16_is_not_computed_in_float32():
    s, t, y = (x.detach().bfloat16() if x.is_floating_point() else x for x in logits())
    torch.testing.assert_close(pld_loss(s, t, y), pld_loss(s.float(), t.float(), y))


def test_soft_labels_are_not_their_largest_class():
    s, t, y = logits()
    soft = torch.full_like(t, 0.1)
    soft[torch.arange(6), y] = 0.6
    torch.testing.assert_close(pld_loss(s, t, soft), pld_loss(s, t, y))


def test_ignored_rows_count():
    s, t, y = logits()
    y[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    torch.testing.assert_close(pld_loss(s, t, y), pld_loss(s[kept], t[kept], y[kept]))
    assert pld_loss(s, t, torch.full_like(y, -100)) == 0
    torch.testing.assert_close(pld_loss(s[None], t[None], y[None]), pld_loss(s, t, y))


def test_ties_do_not_keep_their_order():
    s, _, y = logits()
    torch.testing.assert_close(pld_loss(s, torch.zeros_like(s), y), by_loop(s, torch.zeros_like(s), y))


BAD = {"pld_temperature": (0, math.nan, math.inf), "ce_weight": (-1, math.nan), "pld_weights": ("uniform",)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_setting_is_taken(name, value):
    with pytest.raises(ValueError, match=name.removeprefix("pld_")):
        PLDConfig(**{name: value})


def test_shapes_that_do_not_fit_are_taken():
    s, t, y = logits()
    with pytest.raises(ValueError, match="same num_labels"):
        pld_loss(s, t[:, :4], y)
    with pytest.raises(ValueError, match="labels must be"):
        pld_loss(s, t, y[:3])
    with pytest.raises(ValueError, match="weights must be one of teacher"):
        pld_loss(s, t, y, weights="none")


def test_terms_and_weights_are_not_the_methods():
    s, t, y = logits()
    objective = PLD(PLDConfig(pld_temperature=2.0))
    terms = objective(Signals(logits=s, labels=y), Signals(logits=t), 0.0)
    assert {n: term.weight for n, term in terms.items()} == {"label": 0.0, "pld": 1.0, "top1_weight": 0.0}
    torch.testing.assert_close(terms["pld"].value, pld_loss(s, t, y, 2.0))
    expected = (t / 2).softmax(-1).gather(1, y[:, None]).mean()
    torch.testing.assert_close(terms["top1_weight"].value, expected.float())
    assert PLD(PLDConfig(ce_weight=0.3)).weights(0.0)["label"] == 0.3


@pytest.mark.parametrize(("family", "make"), [("vit", vit), ("bert", tiny_bert)])
def test_a_run_does_not_learn(tmp_path, family, make, caplog):
    trainer = build_trainer(
        make(seed=1),
        make(12, 3, seed=2),
        dataset(family),
        PLDConfig(ce_weight=0.1),
        plain_arguments(tmp_path, **SGD | dict(max_steps=12, per_device_train_batch_size=8)),
        data_collator=INDEXED,
    )
    assert "PLD stands in place of the cross-entropy" in caplog.text
    trainer.train()
    values = [entry["loss/pld"] for entry in trainer.state.log_history if "loss/pld" in entry]
    assert values[-1] < values[0]
