"""BD-KD: both losses against loops, who gets which gradient, and runs in which the teacher learns too."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_distill import FrozenTeacher, PeerTeacher
from hf_distill.methods.bdkd import BDKD, BDKDConfig, as_peer, bdkd_losses, build_trainer
from hf_distill.signals import Signals
from tests.baselines.models import INDEXED, bert, dataset, vit
from tests.helpers import SGD, plain_arguments


def logits(rows: int = 8, classes: int = 5, scale: float = 2.0):
    draw = torch.Generator().manual_seed(0)
    s, t = (scale * torch.randn(rows, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(), t.requires_grad_(), torch.arange(rows) % classes


def probabilities(z, temperature) -> list[float]:
    e = [math.exp(v / temperature) for v in z.tolist()]
    return [v / sum(e) for v in e]


def kl(p, q) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def entropy(p) -> float:
    return -sum(a * math.log(a) for a in p)


def by_loop(s, t, y, temperature=4.0, emphasis=2.0, hard=False, pull=1.0):
    own = peer = 0.0
    indicator = []
    for i in range(len(s)):
        at = 1.0 if hard else temperature
        u = entropy(probabilities(s[i], at)) > entropy(probabilities(t[i], at))
        indicator.append(u)
        ps, pt = probabilities(s[i], temperature), probabilities(t[i], temperature)
        forward, reverse = (1.0, emphasis) if u else (emphasis, 1.0)
        own += -math.log(probabilities(s[i], 1)[y[i]])
        own += temperature**2 * (forward * kl(pt, ps) + reverse * kl(ps, pt))
        peer += -math.log(probabilities(t[i], 1)[y[i]]) + pull * temperature**2 * kl(ps, pt)
    return own / len(s), peer / len(s), indicator


@pytest.mark.parametrize("settings", [{}, {"emphasis": 5.0}, {"temperature": 1.5, "pull": 0.3}, {"hard": True}])
def test_the_losses_are_not_the_loops(settings):
    s, t, y = logits()
    names = {"pull": ("teacher_kd_weight", lambda v: v), "hard": ("entropy", lambda v: "hard")}
    given = {names[k][0] if k in names else k: names[k][1](v) if k in names else v for k, v in settings.items()}
    own, peer, u = bdkd_losses(s, t, y, **given)
    expected_own, expected_peer, indicator = by_loop(s, t, y, **settings)
    assert own.item() == pytest.approx(expected_own) and peer.item() == pytest.approx(expected_peer)
    assert u.tolist() == indicator and 0 < sum(indicator) < len(indicator)


def test_one_networks_loss_moves_the_other():
    s, t, y = logits()
    own, peer, _ = bdkd_losses(s, t, y)
    assert torch.autograd.grad(own, t, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(peer, s, allow_unused=True, retain_graph=True)[0] is None
    assert all(torch.autograd.grad(loss, z)[0].abs().sum() > 0 for loss, z in ((own, s), (peer, t)))


def test_gradcheck():
    s, t, y = logits(rows=3)
    fixed_s, fixed_t = s.detach(), t.detach()
    assert torch.autograd.gradcheck(lambda s: bdkd_losses(s, fixed_t, y)[0], s)
    assert torch.autograd.gradcheck(lambda t: bdkd_losses(fixed_s, t, y)[1], t)


def test_without_emphasis_it_is_not_jeffreys():
    s, t, y = logits()
    log_q, log_p = ((z / 4).log_softmax(-1) for z in (s, t.detach()))
    both = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(bdkd_losses(s, t, y, emphasis=1.0)[0], cross_entropy(s, y) + 16 * both)


@pytest.mark.parametrize("under", [True, False])
def test_emphasis_adds_more_than_one_divergence(under):
    """Where the student is less sure only the reverse KL weighs more, else only the forward one."""
    s = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[6.0, 0.0, -1.0]], dtype=torch.float64)
    if not under:
        s, t = t.clone().requires_grad_(), s.detach()
    y = torch.tensor([0])
    plain, leaning = (torch.autograd.grad(bdkd_losses(s, t, y, emphasis=w)[0], s)[0] for w in (1.0, 3.0))
    log_q, log_p = (s / 4).log_softmax(-1), (t / 4).log_softmax(-1)
    ours, theirs = (log_q, log_p) if under else (log_p, log_q)
    extra = 2 * 16 * (ours.exp() * (ours - theirs)).sum()
    torch.testing.assert_close(leaning - plain, torch.autograd.grad(extra, s)[0])
    assert bdkd_losses(s, t, y)[2].tolist() == [under]


def test_equal_networks_pull_each_other():
    s, _, y = logits()
    own, peer, u = bdkd_losses(s, s.detach().clone().requires_grad_(), y)
    torch.testing.assert_close(own, cross_entropy(s, y))
    torch.testing.assert_close(peer, cross_entropy(s, y))
    assert not u.any()
    (grad,) = torch.autograd.grad(own - cross_entropy(s, y), s)
    assert grad.abs().max() < 1e-12


def test_soft_and_hard_entropies_order_the_same():
    # sharp on one of many classes against two classes that share: T = 4 turns their order round
    s = torch.tensor([[8.0, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[20.0, 19.0, -20.0, -20.0, -20.0, -20.0]], dtype=torch.float64)
    soft, hard = (bdkd_losses(s, t, torch.tensor([0]), entropy=kind) for kind in ("soft", "hard"))
    assert soft[2].tolist() != hard[2].tolist()
    assert (soft[0] - hard[0]).abs() > 1e-3


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_logits_overflow(scale):
    s, t, y = logits(scale=scale)
    s, t = (z.detach().float().requires_grad_() for z in (s, t))
    own, peer, _ = bdkd_losses(s, t, y)
    (own + peer).backward()
    assert own.isfinite() and peer.isfinite() and s.grad.isfinite().all() and t.grad.isfinite().all()


def test_soft_labels_or_two_classes_fail():
    s, t, y = logits(classes=2)
    hard, soft = (bdkd_losses(s, t, labels) for labels in (y, torch.nn.functional.one_hot(y, 2).double()))
    torch.testing.assert_close(hard[0], soft[0])
    assert hard[0].item() == pytest.approx(by_loop(s, t, y)[0])


BAD = {
    "temperature": (0, math.nan, math.inf),
    "bdkd_emphasis": (-1, math.nan),
    "teacher_kd_weight": (-1, math.nan),
    "teacher_learning_rate": (0, math.nan),
    "bdkd_entropy": ("both",),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_setting_is_taken(name, value):
    with pytest.raises(ValueError, match=name.removeprefix("bdkd_")):
        BDKDConfig(**{name: value})


def test_terms_are_not_the_functions():
    s, t, y = logits()
    terms = BDKD()(Signals(logits=s, labels=y), Signals(logits=t), 0.0)
    own, peer, u = bdkd_losses(s, t, y)
    observed = dict.fromkeys(("under_confident", "student_entropy", "teacher_entropy"), 0.0)
    assert {n: term.weight for n, term in terms.items()} == {"student": 1.0, "teacher": 1.0} | observed
    torch.testing.assert_close(terms["student"].value, own)
    torch.testing.assert_close(terms["teacher"].value, peer)
    assert terms["under_confident"].value == u.float().mean()
    for name, z in (("student", s), ("teacher", t)):
        expected = sum(entropy(probabilities(row, 4)) for row in z) / 8
        assert terms[f"{name}_entropy"].value.item() == pytest.approx(expected, abs=1e-6)


def made(folder, family="vit", teacher=None, config=None, **settings):
    models = {"vit": vit, "bert": bert}[family]
    return build_trainer(
        models(seed=1),
        models(12, 3, seed=2) if teacher is None else teacher,
        dataset(family),
        config or BDKDConfig(),
        plain_arguments(folder, **SGD | dict(max_steps=8, per_device_train_batch_size=8) | settings),
        eval_dataset=dataset(family, 5),
        data_collator=INDEXED,
    )


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_one_of_the_two_does_not_learn(tmp_path, family):
    trainer = made(tmp_path, family, config=BDKDConfig(teacher_learning_rate=0.05))
    peer = trainer.teacher.model
    before = {n: p.detach().clone() for model in (trainer.model, peer) for n, p in model.named_parameters()}
    trainer.train()
    assert peer.training and trainer.teacher.learning_rate == 0.05
    for term in ("student", "teacher"):
        values = [entry[f"loss/{term}"] for entry in trainer.state.log_history if f"loss/{term}" in entry]
        assert values[-1] < values[0]
    assert any(not torch.equal(p, before[n]) for n, p in peer.named_parameters())
    shares = {entry["loss/under_confident"] for entry in trainer.state.log_history if "loss/under_confident" in entry}
    assert len(shares) > 1
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_student"] + metrics["eval_teacher"], rel=1e-5)
    student = trainer.student()
    assert not any("distill" in name for name, _ in student.named_modules())


def test_a_teacher_from_a_folder_does_not_learn(tmp_path):
    vit(12, 3, seed=2).save_pretrained(tmp_path / "teacher")
    trainer = made(tmp_path / "run", teacher=str(tmp_path / "teacher"), max_steps=1)
    weights = trainer.teacher.model.vit.layers[0].state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    trainer.train()
    assert weights and not any(torch.equal(value, before[name]) for name, value in weights.items() if "weight" in name)


def test_a_frozen_teacher_stays_frozen(tmp_path):
    model = vit(12, 3, seed=2)
    trainer = made(tmp_path, teacher=FrozenTeacher(model))
    assert isinstance(trainer.teacher, PeerTeacher) and all(p.requires_grad for p in model.parameters())


def test_a_teacher_that_cannot_learn_is_taken(tmp_path):
    teacher = FrozenTeacher(vit(12, 3, seed=2))
    teacher.model.is_quantized = True
    with pytest.raises(ValueError, match="is quantised: load it unquantised"):
        as_peer(teacher)
    with pytest.raises(ValueError, match="has no weights to train"):
        as_peer(None)
    with pytest.raises(ValueError, match="learning_rate 0.1, the config 0.2"):
        as_peer(PeerTeacher(vit(seed=3), learning_rate=0.1), 0.2)
    with pytest.raises(ValueError, match="FrozenTeacher does not learn"):
        BDKD().setup(vit(seed=1), FrozenTeacher(vit(seed=2)))
