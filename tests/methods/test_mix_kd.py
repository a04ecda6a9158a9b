"""Mixup in KD: its loss against loops and limits, and runs that mix in training only."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from hf_distill import DistillCallback
from hf_distill.curricula.mixup import MixupCollator
from hf_distill.losses import kd_loss
from hf_distill.methods.mix_kd import MixKD, MixKDConfig, build_trainer, mixstd_loss, mixup_labels
from hf_distill.signals import Signals
from tests.baselines.models import bert, dataset, vit
from tests.helpers import SGD, plain_arguments


def case(rows: int = 5, classes: int = 6):
    draw = torch.Generator().manual_seed(0)
    s, t = (2 * torch.randn(rows, classes, generator=draw, dtype=torch.float64) for _ in range(2))
    lam = torch.rand(rows, generator=draw, dtype=torch.float64)
    y = torch.arange(rows) % classes
    return s.requires_grad_(), t, mixup_labels(y, y.flip(0), lam, classes)


def by_loop(s, t, y, gamma=0.1, alpha=0.9):
    cls = kd = 0.0
    for a, b, soft in zip(s, t, y, strict=True):
        scaled = []
        for z in (a, b):
            mean = sum(z) / len(z)
            deviation = (sum((v - mean) ** 2 for v in z) / (len(z) - 1)) ** 0.5 + 1e-7
            e = [torch.exp(v / deviation) for v in z]
            scaled.append([v / sum(e) for v in e])
        q, p = scaled
        cls = cls - sum(w * torch.log(v) for w, v in zip(soft, q, strict=True))
        kd = kd + sum(v * (torch.log(v) - torch.log(w)) for v, w in zip(p, q, strict=True))
    return gamma * cls / len(s), alpha * kd / len(s)


@pytest.mark.parametrize("settings", [{}, {"gamma": 1.0, "alpha": 0.5}])
def test_values_or_gradients_are_not_the_loops(settings):
    s, t, y = case()
    for value, reference in zip(mixstd_loss(s, t, y, **settings), by_loop(s, t, y, **settings), strict=True):
        torch.testing.assert_close(value, reference)
        grads = (torch.autograd.grad(x, s, retain_graph=True)[0] for x in (value, reference))
        torch.testing.assert_close(*grads)


def test_gradcheck():
    s, t, y = case()
    assert torch.autograd.gradcheck(lambda s: mixstd_loss(s, t, y), s)


def test_scale_or_shift_of_a_row_matter():
    s, t, y = case()
    reference = mixstd_loss(s, t, y)
    size = torch.tensor([0.1, 1.0, 7.0, 100.0, 3.0], dtype=torch.float64)[:, None]
    for ours, theirs in ((size * s, t), (s, size * t), (s + size, t - 2 * size)):
        for value, expected in zip(mixstd_loss(ours, theirs, y), reference, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_the_teacher_gets_a_gradient():
    s, t, y = case()
    t.requires_grad_()
    sum(mixstd_loss(s, t, y)).backward()
    assert t.grad is None


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e4])
def test_constant_or_extreme_logits_give_nan(scale):
    s, t, y = (x.detach().float() for x in case())
    s = (scale * s).requires_grad_()
    cls, kd = mixstd_loss(s, scale * t, y)
    (cls + kd).backward()
    assert cls.isfinite() and kd.isfinite() and s.grad.isfinite().all()


def test_two_classes_keep_more_than_a_sign():
    """The page's pitfall: the scaled logits are √2 apart, so the loss has a fixed minimum."""
    s = torch.tensor([[3.0, 1.0], [0.1, 0.0]], dtype=torch.float64)
    cls, _ = mixstd_loss(s, s, torch.tensor([0, 0]), gamma=1.0)
    assert cls.item() == pytest.approx(math.log(1 + math.exp(-math.sqrt(2))), abs=1e-5)


def test_classes_are_not_one_hot_probabilities():
    s, t, _ = case()
    y = torch.arange(5)
    torch.testing.assert_close(mixstd_loss(s, t, y), mixstd_loss(s, t, one_hot(y, 6).double()))


def test_shapes_that_do_not_fit_are_taken():
    s, t, y = case()
    with pytest.raises(ValueError, match="same num_labels"):
        mixstd_loss(s, t[:, :3], y)
    with pytest.raises(ValueError, match="it needs 2, got 1"):
        mixstd_loss(s[:, :1], t[:, :1], y[:, :1])


BAD = {
    "mixup_alpha": (0.0, math.nan),
    "mixup_fraction": (-0.1, 1.1, math.nan),
    "pmu_sampling": ("half",),
    "gamma": (-1.0, math.nan),
    "alpha": (math.inf,),
    "mix_temperature": (0.0, math.nan),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_setting_is_taken(name, value):
    with pytest.raises(ValueError, match=name.split("_")[-1]):
        MixKDConfig(**{name: value})


def test_terms_are_not_the_functions():
    s, t, y = case()
    lam = torch.tensor([1.0, 0.5, 0.2, 1.0, 1.0])
    signals = Signals(logits=s, labels=y, batch={"mix_lambda": lam})
    terms = MixKD(MixKDConfig(gamma=0.3))(signals, Signals(logits=t), 0.0)
    assert {n: t.weight for n, t in terms.items()} == dict(cls=1, kd=1, mix_fraction=0, student_logit_std=0)
    torch.testing.assert_close((terms["cls"].value, terms["kd"].value), mixstd_loss(s, t, y, gamma=0.3))
    assert terms["mix_fraction"].value.item() == pytest.approx(0.4)
    fixed = MixKD(MixKDConfig(std_temperature=False, mix_temperature=3.0))(signals, Signals(logits=t), 0.0)
    torch.testing.assert_close(fixed["cls"].value, 0.1 * cross_entropy(s, y))
    torch.testing.assert_close(fixed["kd"].value, 0.9 * kd_loss(s, t, 3.0))


# ---- runs ------------------------------------------------------------------------------------------------------------
class Batches(DistillCallback):
    """Keeps what the teacher was asked."""

    def __init__(self):
        self.seen = []

    def on_teacher_forward(self, args, state, control, *, teacher, batch, **kwargs):
        self.seen.append({k: v.clone() for k, v in batch.items()})


def made(folder, config=None, **settings):
    data = dataset("vit").remove_columns("index")
    watch = Batches()
    trainer = build_trainer(
        vit(seed=1),
        vit(12, 3, seed=2),
        data,
        config or MixKDConfig(mixup_fraction=0.5),
        plain_arguments(folder, **SGD | dict(max_steps=10, per_device_train_batch_size=8) | settings),
        eval_dataset=data,
        callbacks=[watch],
    )
    return trainer, watch


def test_evaluation_is_mixed_or_training_is_not(tmp_path):
    trainer, watch = made(tmp_path, eval_strategy="steps", eval_steps=5)
    trainer.train()
    training = [b for b in watch.seen if "mix_lambda" in b]
    evaluation = [b for b in watch.seen if "mix_lambda" not in b]
    assert len(training) == 10 and len(evaluation) == 2
    assert all((b["mix_lambda"] < 1).sum() == 4 and b["labels"].shape == (8, 3) for b in training)
    clean = {tuple(x.flatten().tolist()) for x in evaluation[0]["pixel_values"]}
    assert clean == {tuple(x.flatten().tolist()) for x in trainer.train_dataset["pixel_values"]}
    logs = trainer.state.log_history
    assert logs[0]["loss/mix_fraction"] == 0.5 and "loss/student_logit_std" in logs[0]
    evaluated = [entry for entry in logs if "eval_loss" in entry]
    assert evaluated[0]["eval_mix_fraction"] == 0 and "eval_cross_entropy" in evaluated[0]


def test_every_epoch_mixes_the_same(tmp_path):
    trainer, watch = made(tmp_path, max_steps=3, train_sampling_strategy="sequential")
    trainer.train()  # one batch per epoch, of the same examples
    assert isinstance(trainer.data_collator, MixupCollator) and trainer.data_collator.epoch == 2
    assert len({tuple(b["mix_lambda"].tolist()) for b in watch.seen}) == 3


def test_the_student_does_not_learn(tmp_path):
    trainer, _ = made(tmp_path, max_steps=30)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_kd"] < before["eval_kd"]


def test_cached_teachers_or_texts_are_taken(tmp_path):
    class Cached:
        readers, name = ("reader",), "cache"

    with pytest.raises(ValueError, match="cache is cached"):
        MixKD().setup(vit(seed=1), Cached())
    with pytest.raises(ValueError, match="BertForSequenceClassification reads token ids, which cannot be mixed"):
        build_trainer(
            bert(seed=1),
            bert(12, 3, seed=2),
            dataset("bert").remove_columns("index"),
            MixKDConfig(),
            plain_arguments(tmp_path),
        )


def test_few_classes_go_unsaid(tmp_path, caplog):
    made(tmp_path)
    assert "3 classes divided by their standard deviation" in caplog.text
    caplog.clear()
    made(tmp_path, MixKDConfig(std_temperature=False))
    assert "standard deviation" not in caplog.text


def test_persistent_workers_are_taken(tmp_path):
    with pytest.raises(ValueError, match="persistent workers"):
        made(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=1)
