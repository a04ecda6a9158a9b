"""TGeo-KD: the controller's gradient is that of the two-stage procedure, and it learns whom to trust."""

import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_distill import FrozenTeacher
from hf_distill.losses import kd_loss
from hf_distill.methods import tgeo_kd
from hf_distill.methods.tgeo_kd import (
    TGeoKDConfig,
    teacher_class_average,
    tgeo_hypergradient,
    tgeo_inner_loss,
    tgeo_state,
    window_hypergradient,
)
from tests.baselines.models import vit
from tests.helpers import SGD, plain_arguments

torch.set_num_threads(1)
B, C = 7, 4


def logits(seed: int, rows: int = B, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(rows, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 0])


# ---- pure functions --------------------------------------------------------------------------------------------------
def test_the_state_is_not_that_of_a_loop():
    s, t, table = logits(0), logits(1), teacher_class_average(logits(2), LABELS)
    state = tgeo_state(s, t, LABELS, table)
    assert state.shape == (B, 9 * C) and state.dtype == torch.float64
    for i in range(B):
        ours, theirs, average = s[i].softmax(0), t[i].softmax(0), table[LABELS[i]]
        label = torch.tensor([float(c == LABELS[i]) for c in range(C)], dtype=torch.float64)
        pairs = [(average, ours), (label, ours), (theirs, ours), (theirs, label), (average, label)]
        expected = [ours, theirs, label, average] + [(a - b) ** 2 for a, b in pairs]
        torch.testing.assert_close(state[i], torch.cat(expected))


def test_the_class_average_is_not_that_of_a_loop():
    t = logits(3)
    table = teacher_class_average(t, LABELS)
    for c in range(C):
        torch.testing.assert_close(table[c], torch.stack([t[i].softmax(0) for i in range(B) if LABELS[i] == c]).mean(0))
    absent = teacher_class_average(t[:1], LABELS[:1])
    torch.testing.assert_close(absent[1:], torch.full((3, C), 0.25, dtype=torch.float64))


def test_the_inner_loss_is_not_that_of_a_loop_and_its_limits_are_wrong():
    s, t, alpha = logits(0), logits(1), torch.rand(B, dtype=torch.float64)
    expected = 0.0
    for i in range(B):
        p, q = (t[i] / 1.5).softmax(0), (s[i] / 1.5).softmax(0)
        kl = sum(p[c] * (p[c] / q[c]).log() for c in range(C))
        expected += (alpha[i] * 1.5**2 * kl - (1 - alpha[i]) * s[i].log_softmax(0)[LABELS[i]]) / B
    torch.testing.assert_close(tgeo_inner_loss(s, t, LABELS, alpha), expected)
    torch.testing.assert_close(tgeo_inner_loss(s, t, LABELS, 0.0), cross_entropy(s, LABELS))
    torch.testing.assert_close(tgeo_inner_loss(s, t, LABELS, torch.ones(B)), kd_loss(s, t, 1.5))


def test_the_inner_loss_s_gradients_are_wrong():
    t, alpha = logits(1), torch.rand(B, dtype=torch.float64).requires_grad_()
    s = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, a: tgeo_inner_loss(s, t, LABELS, a), (s, alpha))
    assert torch.autograd.gradgradcheck(lambda s, a: tgeo_inner_loss(s, t, LABELS, a), (s, alpha))
    teacher = logits(1).requires_grad_()
    tgeo_inner_loss(s, teacher, LABELS, alpha).backward()
    assert teacher.grad is None


# ---- the hypergradient -----------------------------------------------------------------------------------------------
def problem(student=None) -> dict:
    draw = torch.Generator().manual_seed(4)
    torch.manual_seed(0)
    return dict(
        student=(nn.Linear(3, C) if student is None else student).double(),
        inputs=torch.randn(B, 3, generator=draw, dtype=torch.float64),
        teacher_logits=logits(1),
        labels=LABELS,
        val_inputs=torch.randn(5, 3, generator=draw, dtype=torch.float64),
        val_labels=torch.tensor([3, 1, 0, 2, 2]),
        alpha=torch.rand(B, generator=draw, dtype=torch.float64),
        temperature=1.5,
        lr=0.5,
    )


def two_stages(p: dict, alpha: torch.Tensor) -> float:
    """The held-out loss after the student's step, computed with nothing but a plain optimizer."""
    student = nn.Linear(3, C).double()
    student.load_state_dict(p["student"].state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=p["lr"])
    tgeo_inner_loss(student(p["inputs"]), p["teacher_logits"], p["labels"], alpha, p["temperature"]).backward()
    optimizer.step()
    return cross_entropy(student(p["val_inputs"]), p["val_labels"]).item()


@pytest.mark.parametrize("how", ["unrolled", "finite_difference"])
def test_the_hypergradient_is_not_that_of_the_two_stages(how):
    p = problem()
    before = [x.clone() for x in p["student"].parameters()]
    loss, gradient = tgeo_hypergradient(**p, hypergradient=how)
    assert loss.item() == pytest.approx(two_stages(p, p["alpha"]), abs=1e-12)
    for i in range(B):
        step = torch.zeros(B, dtype=torch.float64)
        step[i] = 1e-5
        expected = (two_stages(p, p["alpha"] + step) - two_stages(p, p["alpha"] - step)) / 2e-5
        assert abs(gradient[i].item() - expected) < 1e-6
    assert gradient.abs().max() > 1e-3  # the tolerance says something
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, p["student"].parameters(), strict=True))
    assert tgeo_hypergradient(**p | {"lr": 0.0}, hypergradient=how)[1].abs().max() == 0


@pytest.mark.parametrize("how", ["unrolled", "finite_difference"])
def test_micro_batches_change_the_hypergradient(how):
    p = problem(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C)))
    whole, expected = tgeo_hypergradient(**p, hypergradient=how)
    cut = lambda *names: [tuple(p[n][part] for n in names) for part in (slice(0, 3), slice(3, None))]  # noqa: E731
    loss, parts = window_hypergradient(
        lambda weights, x: torch.func.functional_call(p["student"], weights, (x,)),
        dict(p["student"].named_parameters()),
        cut("inputs", "teacher_logits", "labels", "alpha"),
        cut("val_inputs", "val_labels"),
        temperature=p["temperature"],
        lr=p["lr"],
        hypergradient=how,
    )
    torch.testing.assert_close(torch.cat(parts), expected)
    torch.testing.assert_close(loss, whole)


# ---- in a trainer ----------------------------------------------------------------------------------------------------
class MLPConfig(PretrainedConfig):
    model_type = "mlp_of_a_test"
    width, inputs = 32, 2


class MLP(PreTrainedModel):
    config_class = MLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Linear(config.inputs, config.width)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.classifier(self.hidden(pixel_values).relu()))


class Liar(PreTrainedModel):
    """Bayes' rule of Gaussian classes, two of which it confuses."""

    config_class = MLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config, means, spread: float, swapped: tuple[int, int]):
        super().__init__(config)
        own = means.clone()
        own[list(swapped)] = means[list(reversed(swapped))]
        self.means = nn.Parameter(own)
        self.spread = spread

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=-(torch.cdist(pixel_values, self.means) ** 2) / (2 * self.spread**2))


GENTLE = dict(tgeo_controller_lr=5e-3, tgeo_controller_weight_decay=0.0)
MEANS = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(6) * math.pi / 3])
SPREAD = 0.3


def gaussians(n: int, seed: int) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 6
    x = MEANS[labels] + SPREAD * torch.randn(n, 2, generator=draw)
    return Dataset.from_dict({"pixel_values": x.numpy(), "labels": labels.tolist()}).with_format("torch")


def trainer_of(folder, config: TGeoKDConfig, rows: int = 40, student=None, **settings):
    config_of_models = MLPConfig(num_labels=6)
    torch.manual_seed(0)
    settings = SGD | dict(max_steps=2, per_device_train_batch_size=6) | settings
    return tgeo_kd.build_trainer(
        MLP(config_of_models) if student is None else student,
        FrozenTeacher(Liar(config_of_models, MEANS, SPREAD, (0, 1))),
        gaussians(rows, 1),
        config,
        plain_arguments(folder, **settings),
        eval_dataset=gaussians(12, 9),
    )


def controller(trainer) -> dict:
    names = ("weight", "bias")
    return {k: v.clone() for k, v in trainer.objective.state.items() if k.endswith(names)}


@pytest.mark.parametrize("how", ["unrolled", "finite_difference"])
def test_the_controller_does_not_learn(tmp_path, how):
    still = dict(tgeo_hypergradient=how, tgeo_controller_weight_decay=0.0)
    trainer = trainer_of(tmp_path / "a", TGeoKDConfig(**still))
    before = controller(trainer)
    trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in controller(trainer).items())
    assert {"alpha_mean", "alpha_teacher_wrong", "loss_outer"} <= trainer.state.log_history[0].keys()
    trainer = trainer_of(tmp_path / "b", TGeoKDConfig(**still), learning_rate=0.0)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in controller(trainer).items())
    assert trainer.objective.state["controller.0.weight.square"].abs().max() == 0


def test_the_controller_learns_from_evaluation_or_training_rows(tmp_path):
    trainer = trainer_of(tmp_path, TGeoKDConfig(), rows=40)
    held = {tuple(row["pixel_values"].tolist()) for row in trainer.objective.held_out.dataset}
    rest = {tuple(row["pixel_values"].tolist()) for row in trainer.train_dataset}
    assert len(held) == 4 and len(rest) == 36 and not held & rest
    assert not held & {tuple(row["pixel_values"].tolist()) for row in trainer.eval_dataset}
    rows = trainer.train_dataset
    theirs = trainer.teacher({"pixel_values": rows["pixel_values"][:]}).logits
    torch.testing.assert_close(
        trainer.objective.state["class_average"], teacher_class_average(theirs, rows["labels"][:])
    )
    before = {name: value.nan_to_num(-1) for name, value in trainer.objective.state_tensors().items()}
    trainer.evaluate()
    assert all(value.nan_to_num(-1).equal(before[n]) for n, value in trainer.objective.state_tensors().items())


def test_the_student_s_loss_is_not_the_weighted_one(tmp_path):
    trainer = trainer_of(tmp_path, TGeoKDConfig())
    batch = {k: v[:6] for k, v in trainer.train_dataset[:6].items()}
    model, objective = trainer.model, trainer.objective
    student, teacher, terms = trainer._signals(model, batch)
    state = tgeo_state(student.logits, teacher.logits, batch["labels"], objective.state["class_average"])
    x = state
    for i in (0, 2, 4):  # the page's controller, written out
        x = x @ objective.state[f"controller.{i}.weight"].T + objective.state[f"controller.{i}.bias"]
        x = torch.where(x > 0, x, 0.01 * x) if i < 4 else x.sigmoid()
    assert [objective.state[f"controller.{i}.weight"].shape[0] for i in (0, 2, 4)] == [32, 16, 1]
    expected = tgeo_inner_loss(student.logits, teacher.logits, batch["labels"], x[:, 0])
    torch.testing.assert_close(terms["tgeo"].value, expected)


def test_an_attention_model_cannot_be_differentiated_twice(tmp_path):
    pixels = torch.randn(12, 3, 16, 16).numpy()
    data = Dataset.from_dict({"pixel_values": pixels, "labels": [i % 3 for i in range(12)]}).with_format("torch")
    made = lambda **given: tgeo_kd.build_trainer(  # noqa: E731
        vit(), FrozenTeacher(vit(12, seed=1)), data, TGeoKDConfig(**given),
        plain_arguments(tmp_path / str(len(given)), **SGD | dict(max_steps=1, per_device_train_batch_size=4)),
    )  # fmt: skip
    trainers = [made(), made(tgeo_hypergradient="finite_difference")]
    for trainer in trainers:
        trainer.train()
    unrolled, differences = (t.objective.state["controller.4.weight.mean"] for t in trainers)
    torch.testing.assert_close(differences, unrolled, rtol=0.05, atol=1e-6)
    assert unrolled.abs().max() > 1e-6


@pytest.mark.parametrize("seed", [0])
def test_a_wrong_teacher_is_trusted(tmp_path, seed):
    """Page: six Gaussian classes, a Bayes teacher with two classes swapped; constant alpha 0.5 learns its mistake."""
    test = gaussians(600, 77)

    def accuracy(config: TGeoKDConfig | float) -> tuple[float, float]:
        given = config if isinstance(config, TGeoKDConfig) else TGeoKDConfig(tgeo_outer_every=10**9)
        trainer = trainer_of(
            tmp_path / str(config)[:12], given, rows=360, learning_rate=0.2, max_steps=250,
            per_device_train_batch_size=48, seed=seed, logging_steps=250,
        )  # fmt: skip
        if not isinstance(config, TGeoKDConfig):
            trainer.objective.ratio = lambda state, weights=None: torch.full((len(state),), config)
            trainer.objective.before_step = lambda batches, run: None
        trainer.train()
        rows, objective, student = trainer.train_dataset[:], trainer.objective, trainer.student()
        with torch.no_grad():
            right = student(test["pixel_values"][:]).logits.argmax(-1) == test["labels"][:]
            ours, theirs = student(rows["pixel_values"]).logits, trainer.teacher(rows).logits
            alpha = objective.ratio(tgeo_state(ours, theirs, rows["labels"], objective.state["class_average"]))
        swapped = rows["labels"] < 2
        return right.float().mean().item(), (alpha[~swapped].mean() - alpha[swapped].mean()).item()

    learned, gap = accuracy(TGeoKDConfig(**GENTLE, tgeo_val_fraction=1 / 3))
    trusting, labels_only = accuracy(0.5)[0], accuracy(0.0)[0]
    assert gap >= 0.15, gap
    assert learned >= labels_only - 0.005 and learned >= trusting + 0.1, (learned, labels_only, trusting)


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_bad_settings_are_taken(tmp_path):
    for bad in (
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"tgeo_controller_lr": math.nan},
        {"tgeo_controller_weight_decay": -1.0},
        {"tgeo_val_fraction": 1.0},
        {"tgeo_outer_every": 0},
        {"tgeo_hidden": [0]},
        {"tgeo_hypergradient": "adjoint"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TGeoKDConfig(**bad)
    with pytest.raises(ValueError, match="lost in half precision"):
        trainer_of(tmp_path / "a", TGeoKDConfig(tgeo_hypergradient="finite_difference"), bf16=True)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        trainer_of(tmp_path / "b", TGeoKDConfig(), rows=1)
    student = vit()
    student.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        tgeo_kd.TGeoKD().setup(student, None)
