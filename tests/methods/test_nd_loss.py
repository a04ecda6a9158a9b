"""ND: its value against a loop and its limits, class means from a pass, projectors, and what it does to a student."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_distill import LogitKD
from hf_distill.baselines import DIST, DKD, HintonKD
from hf_distill.losses import kd_loss
from hf_distill.methods.nd_loss import (
    BASES,
    EmbeddingProjector,
    NDLoss,
    NDLossConfig,
    build_objective,
    build_trainer,
    class_sums,
    measure_class_means,
    nd_loss,
)
from hf_distill.signals import Signals
from tests.baselines.models import CLASSES, INDEXED, bert, dataset, vit
from tests.baselines.models import trainer as classifier_trainer
from tests.helpers import SGD, plain_arguments, relative_difference


def case(rows: int = 6, width: int = 4, classes: int = 3):
    draw = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.randn(rows, width, generator=draw, dtype=torch.float64) for _ in range(2))
    means = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    return f_s.requires_grad_(), f_t, torch.arange(rows) % classes, means


def by_loop(f_s, f_t, y, means) -> torch.Tensor:
    total, count = 0.0, 0
    for s, t, label in zip(f_s, f_t, y, strict=True):
        c = means[label]
        if c.norm() == 0:
            continue
        norm = max((s * s).sum().sqrt(), (t * t).sum().sqrt())
        total, count = total + 1 - (s * c).sum() / (c * c).sum().sqrt() / norm, count + 1
    return total / count


def test_value_or_gradient_are_not_the_loops():
    given = case()
    value, reference = nd_loss(*given), by_loop(*given)
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(*(torch.autograd.grad(x, given[0])[0] for x in (value, reference)))
    longer = given[0].norm(dim=-1) > given[1].norm(dim=-1)
    assert longer.any() and not longer.all()  # per sample, not per batch


def test_gradcheck():
    f_s, *rest = case()
    assert torch.autograd.gradcheck(lambda f: nd_loss(f, *rest), f_s)


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9, 1.0, 1.5, 4.0])
def test_a_multiple_of_the_mean_costs_more_than_what_it_lacks(a):
    c = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    f_s = (a * c).requires_grad_()
    value = nd_loss(f_s, c, torch.tensor([0]), c)
    assert value.item() == pytest.approx(max(1 - a, 0), abs=1e-12)
    if a != 1:
        (grad,) = torch.autograd.grad(value, f_s)
        expected = -c / 25 if a < 1 else torch.zeros_like(c)
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-9)


def test_direction_or_length_alone_suffice():
    c = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    y, rotated = torch.tensor([0]), torch.tensor([[-4.0, 3.0]], dtype=torch.float64)
    assert nd_loss(0.5 * c, c, y, c).item() == pytest.approx(0.5)  # a cosine alone: 0
    assert nd_loss(rotated, c, y, c).item() == pytest.approx(1.0)  # lengths alone: 0
    assert nd_loss(-c, c, y, c).item() == pytest.approx(2.0)


def test_an_embedding_of_zeros_gives_nan():
    f_t = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    c = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for teacher, expected in ((f_t, [[0.0, -0.2]]), (0 * f_t, [[0.0, -1.0]])):
        zero = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        value = nd_loss(zero, teacher, torch.tensor([0]), c)
        value.backward()
        assert value == 1 and zero.grad.tolist() == expected


def test_a_class_without_a_mean_counts():
    f_s, f_t, y, means = case()
    means[1] = 0
    torch.testing.assert_close(nd_loss(f_s, f_t, y, means), by_loop(f_s, f_t, y, means))
    torch.testing.assert_close(nd_loss(f_s, f_t, y, means), nd_loss(f_s[y != 1], f_t[y != 1], y[y != 1], means))
    nothing = nd_loss(f_s, f_t, y, 0 * means)
    nothing.backward()
    assert nothing == 0 and (f_s.grad == 0).all()


def test_soft_labels_do_not_weigh_the_means():
    f_s, f_t, y, means = case()
    hard = nn.functional.one_hot(y, 3).double()
    torch.testing.assert_close(nd_loss(f_s, f_t, hard, means), nd_loss(f_s, f_t, y, means))
    soft = 0.3 * hard + 0.7 * hard.roll(1, 0)
    rows = [nd_loss(f_s[[i]], f_t[[i]], torch.tensor([0]), (soft[i] @ means)[None]) for i in range(6)]
    torch.testing.assert_close(nd_loss(f_s, f_t, soft, means), sum(rows) / 6)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_very_short_or_long_embeddings_lose_it(size):
    f_s, f_t, y, means = (x.detach().float() if x.is_floating_point() else x for x in case())
    torch.testing.assert_close(nd_loss(size * f_s, size * f_t, y, means), nd_loss(f_s, f_t, y, means))


def test_teacher_or_means_get_a_gradient():
    f_s, f_t, y, means = case()
    f_t.requires_grad_(), means.requires_grad_()
    nd_loss(f_s, f_t, y, means).backward()
    assert f_t.grad is None and means.grad is None


def test_bfloat16_is_not_computed_in_float32():
    given = [x.detach().bfloat16() if x.is_floating_point() else x for x in case()]
    torch.testing.assert_close(nd_loss(*given), nd_loss(*(x.float() if x.is_floating_point() else x for x in given)))


def test_shapes_that_do_not_fit_are_taken():
    f_s, f_t, y, means = case()
    with pytest.raises(ValueError, match="project the student's first"):
        nd_loss(f_s[:, :2], f_t, y, means)
    with pytest.raises(ValueError, match=r"class means must be \(classes, 4\)"):
        nd_loss(f_s, f_t, y, means[:, :2])


def test_class_sums_are_not_a_loops():
    f, _, y, _ = case()
    sums = class_sums(f, y, 4)
    for c in range(4):
        torch.testing.assert_close(sums["sum"][c], f[y == c].sum(0))
    assert sums["count"].tolist() == [2, 2, 2, 0]
    torch.testing.assert_close(class_sums(f, nn.functional.one_hot(y, 4).double(), 4), sums)


# ---- the objective ---------------------------------------------------------------------------------------------------
BAD = {
    "nd_weight": (-1, math.nan),
    "kd_weight": (-1.0, math.nan),
    "warmup": (1.5, math.nan),
    "temperature": (0.0, math.nan),
    "label_weight": (math.inf,),
    "base": ("crd", "none"),
    "projector": ("none",),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_setting_is_taken(name, value):
    with pytest.raises(ValueError, match=name.removeprefix("kd_")):
        NDLossConfig(**{name: float(value) if isinstance(value, int) else value})


@pytest.mark.parametrize("base", BASES)
def test_a_base_does_not_compose(base):
    objective = build_objective(NDLossConfig(base=base, nd_weight=0.5))
    first, second = objective.parts
    assert isinstance(second, NDLoss) and objective.factors == [1.0, 0.5]
    weights = first.weights(1.0)
    assert weights["label"] == 1.0 and first.warmup == pytest.approx(20 / 240)


def test_settings_of_a_base_are_lost():
    dkd = build_objective(NDLossConfig(base="dkd", dkd_alpha=2.0, dkd_beta=6.0, temperature=3.0, kd_weight=1.5)).parts[
        0
    ]
    assert isinstance(dkd, DKD) and (dkd.alpha, dkd.beta, dkd.temperature, dkd.weight) == (2.0, 6.0, 3.0, 1.5)
    kd = build_objective(NDLossConfig()).parts[0]
    assert isinstance(kd, HintonKD) and (kd.weight, kd.temperature, kd.label_weight) == (1.0, 4.0, 1.0)
    assert isinstance(build_objective(NDLossConfig(base="dist")).parts[0], DIST)


def test_the_warmup_holds_nd_back():
    objective = build_objective(NDLossConfig(warmup=0.5))
    ours = {prefix + n: f * w for prefix, f, leaf in objective.leaves() for n, w in leaf.weights(0.0).items()}
    assert ours["hintonkd/kd"] == 0 and ours["ndloss/nd"] == 2.0 and ours["hintonkd/label"] == 1.0


def teacher_of(family):
    teacher = {"vit": vit, "bert": bert}[family](12, 3, seed=2)
    if family == "vit":  # fresh LayerNorms make both models' embeddings equally long, where the gradient jumps
        torch.nn.init.uniform_(teacher.vit.layernorm.weight, 0.5, 2.0)
    return teacher


def made(folder, family="vit", n=9, config=None, student=None, **settings):
    models = {"vit": vit, "bert": bert}[family]
    return build_trainer(
        models(seed=1) if student is None else student,
        teacher_of(family),
        dataset(family, n),
        config or NDLossConfig(projector="linear", warmup=0.0),
        plain_arguments(folder, **SGD | dict(max_steps=6, per_device_train_batch_size=4) | settings),
        eval_dataset=dataset(family, 5),
        data_collator=INDEXED,
    )


def nd_of(trainer) -> NDLoss:
    return trainer.objective.parts[1]


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_total_is_not_kd_plus_nd(tmp_path, family):
    trainer = made(tmp_path, family)
    trainer.train()
    nd, logs = nd_of(trainer), trainer.state.log_history[0]
    assert nd.state["class_means"].shape == (CLASSES, 12) and nd.state["class_means"].dtype == torch.float32
    terms = {name: logs[f"loss/{name}"] for name in ("hintonkd/label", "hintonkd/kd", "ndloss/nd")}
    expected = terms["hintonkd/label"] + terms["hintonkd/kd"] + 2 * terms["ndloss/nd"]
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert {"loss/ndloss/student_norm", "loss/ndloss/teacher_norm", "loss/ndloss/cosine"} <= logs.keys()
    student = trainer.student()
    assert not any("distill" in n or "projector" in n for n, _ in student.named_modules())


def test_a_step_is_not_that_of_plain_models(tmp_path):
    """One step of SGD by hand: teacher's pooled features by a hook, class means by a loop."""
    student = vit(12, 2, seed=1)
    trainer = made(tmp_path, student=student, max_steps=1, per_device_train_batch_size=9)
    batch = INDEXED(list(trainer.train_dataset))
    seen = {}

    def logits(model, key):
        hook = model.classifier.register_forward_pre_hook(lambda _, args: seen.update({key: args[0]}))
        out = model(pixel_values=batch["pixel_values"]).logits
        hook.remove()
        return out

    reference = vit(12, 2, seed=1)
    with torch.no_grad():
        theirs = logits(trainer.teacher.model, "teacher")
    y, f_t = batch["labels"], seen["teacher"]
    means = torch.stack([f_t[y == c].mean(0) for c in range(CLASSES)])
    torch.testing.assert_close(nd_of(trainer).state["class_means"], means)
    ours = logits(reference, "student")
    loss = cross_entropy(ours, y) + kd_loss(ours, theirs) + 2 * by_loop(seen["student"], f_t, y, means).float()
    loss.backward()
    trainer.train()
    moved = {n: p.detach() for n, p in trainer.student().named_parameters()}
    by_hand = {n: p.detach() - 0.1 * p.grad for n, p in reference.named_parameters() if p.grad is not None}
    assert relative_difference({n: moved[n] for n in by_hand}, by_hand) < 1e-5


def test_a_split_batch_moves_otherwise(tmp_path):
    runs = []
    for size, accumulation in ((8, 1), (2, 4), (3, 3)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1)
        trainer = made(tmp_path / str(size), n=8, **settings)
        nd_of(trainer).set_class_means(nd_of(trainer).state["class_means"] * torch.tensor([[1.0], [0.0], [1.0]]))
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        runs.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters()})
    for other in runs[1:]:
        assert relative_difference(other, runs[0], floor=1e-5) < 1e-4


class TestProjector:
    def test_kinds(self, tmp_path):
        auto = made(tmp_path / "a", config=NDLossConfig(), max_steps=2)
        assert isinstance(nd_of(auto).projector, EmbeddingProjector) and "BatchNorm" in auto.objective.couples_batch
        linear = made(tmp_path / "b")
        assert isinstance(nd_of(linear).projector, nn.Linear) and linear.objective.couples_batch is None
        equal = made(tmp_path / "c", config=NDLossConfig(), student=vit(12, 2, seed=1))
        assert isinstance(nd_of(equal).projector, nn.Identity) and equal.objective.couples_batch is None
        before = nd_of(auto).projector.linear.weight.detach().clone()
        auto.train()
        assert not torch.equal(nd_of(auto).projector.linear.weight, before)

    def test_a_batch_of_one_fails(self, tmp_path):
        made(tmp_path, config=NDLossConfig(), n=5, max_steps=2).train()  # 4 + 1
        projector = EmbeddingProjector(3, 4)
        state = {n: v.clone() for n, v in projector.state_dict().items()}
        assert projector(torch.randn(1, 3)).isfinite().all()
        assert all(torch.equal(v, state[n]) for n, v in projector.state_dict().items())


def test_a_second_trainer_asks_the_teacher_again(tmp_path, monkeypatch):
    first = nd_of(made(tmp_path)).state["class_means"]
    assert [p.name.startswith("class_means_3-") for p in (tmp_path / "_passes").iterdir()] == [True]
    monkeypatch.setattr("hf_distill.methods.nd_loss.class_sums", lambda *_: pytest.fail("measured again"))
    assert torch.equal(nd_of(made(tmp_path)).state["class_means"], first)


def test_missing_means_or_labels_are_taken(tmp_path):
    nd = NDLoss()
    with pytest.raises(ValueError, match="measure_class_means"):
        nd.other_terms(Signals(), Signals(), 0.0)
    nd.set_class_means(torch.ones(3, 4))
    with pytest.raises(ValueError, match="one label per example"):
        nd.other_terms(Signals(features={"embedding": torch.ones(2, 4)}), Signals(), 0.0)
    with pytest.raises(ValueError, match="not one embedding"):
        made(tmp_path, config=NDLossConfig(teacher_layer="hidden_states.-1"))


def test_it_can_be_added_to_any_objective(tmp_path):
    run = classifier_trainer(tmp_path, "vit", LogitKD(per="sample") + 2.0 * NDLoss(projector="linear"))
    measure_class_means(run)
    run.train()
    assert {"loss/logitkd/kd", "loss/ndloss/nd"} <= run.state.log_history[0].keys()


# ---- what it is for --------------------------------------------------------------------------------------------------
def test_embeddings_do_not_grow_towards_the_teachers_class_means():
    """Toy: with ND the student's embeddings are longer and nearer to the teacher's class means than with KD alone."""
    draw = torch.Generator().manual_seed(0)
    angle = torch.rand(600, generator=draw) * 2 * math.pi
    x = torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(600, 2, generator=draw)
    y = (angle / (2 * math.pi) * 6).long().clamp(max=5)

    def network(hidden):
        body = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 8), nn.ReLU())
        return nn.ModuleList([body, nn.Linear(8, 6)])

    def fit(network, loss, steps):
        adam = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(steps):
            f = network[0](x)
            adam.zero_grad()
            loss(f, network[1](f)).backward()
            adam.step()

    torch.manual_seed(0)
    teacher = network(64)
    fit(teacher, lambda f, z: cross_entropy(z, y), 300)
    f_t = teacher[0](x).detach()
    theirs = teacher[1](f_t).detach()
    sums = class_sums(f_t, y, 6)
    means = (sums["sum"] / sums["count"][:, None]).float()
    norms, accuracies = [], []
    for weight in (0.0, 2.0):
        torch.manual_seed(1)
        student = network(12)
        fit(
            student,
            lambda f, z, w=weight: cross_entropy(z, y) + kd_loss(z, theirs) + w * nd_loss(f, f_t, y, means),
            200,
        )
        f = student[0](x).detach()
        norms.append(f.norm(dim=-1).mean().item())
        accuracies.append((torch.cdist(f, means).argmin(-1) == y).float().mean().item())
    assert norms[1] > norms[0] and accuracies[1] > accuracies[0] + 0.1, (norms, accuracies)
