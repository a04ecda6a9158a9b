"""HARD: the augmenter finds what the student cannot do yet, and nothing but the augmenter learns in its step."""

import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers.modeling_outputs import ImageClassifierOutput

from hf_distill import EnsembleTeacher, FrozenTeacher, PrivilegedTeacher, Teacher
from hf_distill.losses import kd_loss
from hf_distill.methods import hard_augment
from hf_distill.methods.hard_augment import (
    HardAugmentConfig,
    disagreement,
    hard_augmentor_loss,
    hard_student_loss,
    pixel_range,
)
from tests.baselines.models import dataset, resnet, vit
from tests.helpers import SGD, plain_arguments

torch.set_num_threads(1)
B, C = 5, 4


def logits(seed: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- pure functions --------------------------------------------------------------------------------------------------
def test_the_augmenter_s_loss_is_not_that_of_a_loop():
    clean, theirs, ours = logits(0, 1.5), logits(1, 1.5), logits(2)
    kinks = 0
    for kappa in (0.0, 2.0, 1e9):
        expected = 0.0
        for i in range(B):
            p, q, r = ((z[i] / 4).softmax(0) for z in (theirs, ours, clean))
            student = 16 * sum(p[c] * (p[c] / q[c]).log() for c in range(C))
            shift = 16 * sum(r[c] * (r[c] / p[c]).log() for c in range(C))
            expected += (0.7 * max(shift - kappa, 0.0) - 0.3 * student) / B
            kinks += int(kappa == 2.0 and shift < kappa)
        given = dict(lambda_s=0.3, lambda_t=0.7, max_teacher_shift=kappa)
        torch.testing.assert_close(hard_augmentor_loss(clean, theirs, ours, **given), torch.as_tensor(expected))
    assert 0 < kinks < B, "the limit must hold for some examples and not for others"


def test_limits_of_the_losses_are_wrong():
    clean, theirs, ours = logits(0), logits(1), logits(2)
    torch.testing.assert_close(hard_student_loss(theirs, ours), kd_loss(ours, theirs, 4.0))
    assert hard_student_loss(theirs, theirs) == 0
    torch.testing.assert_close(
        hard_augmentor_loss(theirs, theirs, ours, max_teacher_shift=0.0), -disagreement(theirs, ours).mean()
    )
    assert hard_augmentor_loss(clean, theirs, theirs, max_teacher_shift=1e9) == 0


def test_gradients_of_the_losses_are_wrong():
    clean, theirs, ours = (logits(i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda t, s: hard_augmentor_loss(clean, t, s), (theirs, ours))
    hard_augmentor_loss(clean, theirs, ours).backward()
    assert clean.grad is None and theirs.grad.abs().sum() > 0 and ours.grad.abs().sum() > 0
    theirs.grad = ours.grad = None
    hard_student_loss(theirs, ours).backward()
    assert theirs.grad is None and ours.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda s: hard_student_loss(theirs, s), ours)


# ---- one step of the augmenter ---------------------------------------------------------------------------------------
def trainer_of(folder, config: HardAugmentConfig | None = None, *, student=None, teacher=None, n: int = 8, **settings):
    own = {k: settings.pop(k) for k in ("processing_class",) if k in settings}
    return hard_augment.build_trainer(
        vit(seed=1) if student is None else student,
        FrozenTeacher(vit(12, 3, seed=2)) if teacher is None else teacher,
        dataset("vit", n),
        config or HardAugmentConfig(hard_start_step=0, hard_grid_steps=0),
        plain_arguments(folder, **SGD | dict(per_device_train_batch_size=4, max_steps=2) | settings),
        **own,
    )


class Once:
    """A trainer at its first step, whose augmenter can be stepped by hand on the first four examples."""

    def __init__(self, folder, **given):
        self.trainer = trainer_of(folder, **given)
        self.trainer.create_optimizer()
        self.batch = {k: v for k, v in self.trainer.train_dataset[:4].items() if k != "index"}
        self.objective = self.trainer.objective

    def step(self, batches=None) -> None:
        self.trainer._before_optimizer_step([self.batch] if batches is None else batches)

    def measure(self, draw: int = 1) -> tuple[float, float]:
        """Mean disagreement and teacher's shift on the draw that the augmenter learned from."""
        trainer = self.trainer
        with torch.no_grad():
            seen = self.objective.augmented(self.batch, draw)[0]
            clean, theirs = (trainer.teacher(b).logits for b in (self.batch, seen))
            ours = trainer.model(seen["pixel_values"]).logits
        return disagreement(theirs, ours).mean().item(), disagreement(clean, theirs).mean().item()


@pytest.mark.parametrize("family", ["affine", "pixel_mix"])
def test_a_step_of_the_augmenter_makes_the_student_agree(tmp_path, family):
    settings = dict(hard_family=family, hard_start_step=0, hard_augmentor_lr=1e-3, hard_max_teacher_shift=1e6)
    once = Once(tmp_path, config=HardAugmentConfig(**settings))
    before, start = once.measure()[0], {k: v.clone() for k, v in once.objective.state.items()}
    once.step()
    assert once.measure()[0] > before
    assert not once.objective.state["augmenter.widths"].equal(start["augmenter.widths"])
    assert once.objective.logs()["disagreement"] == pytest.approx(before, rel=1e-4)


def test_the_teacher_s_shift_is_not_held_down(tmp_path):
    """With a tight limit widths shrink; without one they grow to where the teacher moves more."""
    shifts = []
    for kappa in (0.01, 1e6):
        config = HardAugmentConfig(hard_start_step=0, hard_max_teacher_shift=kappa, hard_lambda_t=10.0)
        once = Once(tmp_path / str(kappa), config=config)
        for _ in range(30):
            once.step()
        shifts.append(once.measure()[1])
    assert shifts[0] < 0.5 * shifts[1], shifts


def test_models_learn_or_change_in_the_augmenter_s_step(tmp_path):
    student, teacher = resnet(seed=1), resnet(6, 2, seed=2)
    once = Once(tmp_path, student=student, teacher=FrozenTeacher(teacher))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (student, teacher)]
    state = torch.get_rng_state()
    once.step()
    assert torch.equal(torch.get_rng_state(), state)
    for model, old in zip((student, teacher), before, strict=True):
        assert all(p.grad is None for p in model.parameters())
        assert all(v.equal(old[k]) for k, v in model.state_dict().items() if not k.startswith("distill_objective"))
    assert all(p.requires_grad for p in student.parameters())
    assert (once.objective.state["augmenter.widths.mean"] != 0).all()


def test_micro_batches_change_the_augmenter_s_step(tmp_path):
    whole, cut = Once(tmp_path / "a"), Once(tmp_path / "b")
    whole.step()
    cut.step([{k: v[part] for k, v in cut.batch.items()} for part in (slice(0, 1), slice(1, 4))])
    for name in ("augmenter.widths.mean", "measured"):
        torch.testing.assert_close(cut.objective.state[name], whole.objective.state[name], rtol=1e-4, atol=1e-6)


def test_half_of_the_signal_is_lost_at_the_teacher(tmp_path):
    """The gradient by the widths is that of finite differences through both models."""
    once = Once(tmp_path, config=HardAugmentConfig(hard_start_step=0, hard_max_teacher_shift=0.5))
    once.trainer.model.double(), once.trainer.teacher.model.double()
    once.batch["pixel_values"] = once.batch["pixel_values"].double()
    objective, start = once.objective, once.objective.state["augmenter.widths"].clone()

    def loss(widths) -> float:
        with torch.no_grad():
            seen = objective.augmented(once.batch, 1, {"widths": widths})[0]
            clean, theirs = (once.trainer.teacher(b).logits for b in (once.batch, seen))
            ours = once.trainer.model(seen["pixel_values"]).logits
            return hard_augmentor_loss(clean, theirs, ours, max_teacher_shift=0.5).item()

    once.step()
    found = 10 * objective.state["augmenter.widths.mean"]  # the first mean is a tenth of the gradient
    for i in range(5):
        h = torch.zeros(5, dtype=torch.float64)
        h[i] = 1e-4
        expected = (loss(start.double() + h) - loss(start.double() - h)) / 2e-4
        assert found[i].item() == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_rests_and_warm_up_are_ignored(tmp_path):
    def widths(**config) -> list[bool]:
        once, moved = Once(tmp_path / str(config), config=HardAugmentConfig(hard_grid_steps=0, **config)), []
        for step in range(4):
            once.trainer.state.global_step, before = step, once.objective.state["augmenter.widths"]
            once.step()
            moved.append(not torch.equal(before, once.objective.state["augmenter.widths"]))
        return moved

    assert widths(hard_start_step=2) == [False, False, True, True]
    assert widths(hard_start_step=0, hard_every=3) == [True, False, False, True]
    assert widths(hard_start_step=0, hard_max_disagreement=1e-9) == [False] * 4
    assert widths(hard_start_step=0, hard_max_disagreement=1e9) == [True] * 4


# ---- what the models see ---------------------------------------------------------------------------------------------
def test_pictures_are_augmented_as_normalised(tmp_path):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=mean, image_std=std)
    objective = trainer_of(tmp_path, processing_class=processor).objective
    assert [list(x) for x in pixel_range(processor)] == [mean, std] and pixel_range(None) is None
    objective.teacher_range = ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    pictures = torch.rand(2, 3, 16, 16)
    m, s = (torch.tensor(x).reshape(3, 1, 1) for x in (mean, std))
    batch = {"pixel_values": (pictures - m) / s, "teacher_pixel_values": torch.zeros(2, 3, 32, 32)}
    objective.state["augmenter.widths"] = torch.full((5,), 3.0)
    seen, before, after = objective.augmented(batch, 0)
    torch.testing.assert_close(before, pictures)
    torch.testing.assert_close(seen["pixel_values"], (after - m) / s)
    assert after.min() == 0, "what comes from outside is black"
    objective.state["augmenter.widths"] = torch.full((5,), -40.0)
    seen = objective.augmented(batch, 0)[0]
    theirs = seen["teacher_pixel_values"] * 0.5 + torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    assert theirs.shape[-1] == 32
    torch.testing.assert_close(theirs, nn.functional.interpolate(pictures, size=32, mode="bilinear"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="HARD augments pixel_values"):
        objective.augmented({"input_ids": torch.ones(1, 3)}, 0)


def test_terms_are_not_those_of_two_forwards(tmp_path):
    trainer = trainer_of(tmp_path, HardAugmentConfig(hard_label_weight=0.5, hard_clean_weight=0.25, hard_grid_steps=0))
    batch = {k: v for k, v in trainer.train_dataset[:4].items() if k != "index"}
    seen = trainer.objective.augmented(batch, 0)[0]
    theirs, ours = trainer.teacher(seen).logits, trainer.model(seen["pixel_values"]).logits
    _, _, terms = trainer._signals(trainer.model, batch)
    clean, student = trainer.teacher(batch).logits, trainer.model(batch["pixel_values"]).logits
    torch.testing.assert_close(terms["augmented"].value, kd_loss(ours, theirs, 4.0))
    torch.testing.assert_close(terms["clean"].value, kd_loss(student, clean, 4.0))
    assert {n: t.weight for n, t in terms.items()} == {"augmented": 1.0, "clean": 0.25, "label": 0.5}


def test_pictures_and_widths_are_not_shown(tmp_path):
    trainer = trainer_of(tmp_path, HardAugmentConfig(hard_start_step=0, hard_grid_steps=1))
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["augmented-0.png", "augmented-1.png"]
    log = trainer.state.log_history[0]
    assert {"disagreement", "teacher_shift", "contrast_kept", "width_rotation"} <= log.keys()


# ---- teachers --------------------------------------------------------------------------------------------------------
def test_a_teacher_without_gradients_is_taken(tmp_path):
    class Own(Teacher):
        pass

    for teacher in (Own(), EnsembleTeacher({"a": vit(12, seed=2), "b": vit(12, seed=3)})):
        with pytest.raises(ValueError, match=f"which {type(teacher).__name__} does not give: use a FrozenTeacher"):
            trainer_of(tmp_path, teacher=teacher)
    four = FrozenTeacher(vit(12, seed=2))
    four.model.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="is loaded in 4 bit"):
        trainer_of(tmp_path, teacher=four)


def test_a_teacher_with_pixels_of_its_own_loses_its_gradient(tmp_path):
    """The same pictures under another name give the same step."""
    plain = Once(tmp_path / "a")
    own = Once(tmp_path / "b", teacher=PrivilegedTeacher(FrozenTeacher(vit(12, 3, seed=2)), ("pixel_values",)))
    own.batch["teacher_pixel_values"] = own.batch["pixel_values"].clone()
    plain.step(), own.step()
    for name in ("augmenter.widths.mean", "measured"):
        torch.testing.assert_close(own.objective.state[name], plain.objective.state[name])


def test_the_teacher_s_input_gradient_is_wrong():
    teacher = FrozenTeacher(vit(12, seed=2).double())
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not teacher({"pixel_values": pixels.clone().requires_grad_()}).logits.requires_grad
    with torch.no_grad():  # as inside a step that is otherwise without gradients
        pixels.requires_grad_()
        said = teacher.with_input_gradient({"pixel_values": pixels}).logits
    torch.testing.assert_close(said, teacher({"pixel_values": pixels}).logits)
    (found,) = torch.autograd.grad(said[0, 0], pixels)
    h = torch.zeros_like(pixels)
    h[0, 1, 3, 4] = 1e-5
    with torch.no_grad():
        ends = [teacher({"pixel_values": pixels + sign * h}).logits[0, 0].item() for sign in (1, -1)]
    assert found[0, 1, 3, 4].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


def test_bad_settings_are_taken():
    for bad in (
        {"hard_family": "cutout"},
        {"temperature": math.nan},
        {"hard_lambda_s": -1.0},
        {"hard_max_teacher_shift": math.nan},
        {"hard_max_disagreement": -1.0},
        {"hard_augmentor_lr": 0.0},
        {"hard_every": 0},
        {"hard_start_step": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HardAugmentConfig(**bad)


# ---- the page's toy --------------------------------------------------------------------------------------------------
class ToyConfig(PretrainedConfig):
    model_type = "toy_of_a_test"
    kind = "mlp"


class Toy(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        if config.kind == "mlp":
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        else:  # equivariant to shifts
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 6), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 8)
            )
        self.post_init()

    def _init_weights(self, module):
        """As torch makes them."""

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.body(pixel_values))


def patterns(n: int, seed: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth 6 x 6 patterns of eight classes on 16 x 16, off the centre by up to `shift` pixels, with little noise."""
    shapes = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(5))
    shapes = torch.nn.functional.interpolate(shapes, size=6, mode="bilinear", align_corners=True)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 8
    pictures = torch.zeros(n, 1, 16, 16)
    for i, (dx, dy) in enumerate(torch.randint(-shift, shift + 1, (n, 2), generator=draw).tolist()):
        pictures[i, :, 5 + dx : 11 + dx, 5 + dy : 11 + dy] = shapes[labels[i]]
    return pictures + 0.02 * torch.randn(n, 1, 16, 16, generator=draw), labels


def toy_teacher() -> Toy:
    torch.manual_seed(1)
    teacher = Toy(ToyConfig(kind="cnn", num_labels=8))
    pictures, labels = patterns(256, 0, 0)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(pictures).logits, labels).backward()
        optimizer.step()
    return teacher


def test_the_student_does_not_learn_to_shift(tmp_path):
    """Page, one seed: KD alone and unlearned widths stay far below, on patterns up to 3 pixels off the centre."""
    teacher, (test, labels) = toy_teacher(), patterns(400, 99, 3)
    pictures = patterns(256, 0, 0)[0]
    data = Dataset.from_dict({"pixel_values": pictures.numpy()}).with_format("torch")
    right = lambda model: (model(test).logits.argmax(-1) == labels).float().mean().item()  # noqa: E731
    assert right(teacher) > 0.97

    def shifted_accuracy(name: str, **config) -> tuple[float, object]:
        torch.manual_seed(0)
        trainer = hard_augment.build_trainer(
            Toy(ToyConfig(num_labels=8)), FrozenTeacher(teacher), data, HardAugmentConfig(hard_grid_steps=0, **config),
            plain_arguments(
                tmp_path / name, per_device_train_batch_size=64, max_steps=200, learning_rate=2e-3, optim="adamw_torch",
                lr_scheduler_type="constant", logging_steps=200, label_names=[],
            ),
        )  # fmt: skip
        if name == "plain":
            trainer.objective.state["augmenter.widths"] = torch.full((5,), -40.0)
        trainer.train()
        with torch.no_grad():
            return right(trainer.student()), trainer

    plain, _ = shifted_accuracy("plain", hard_start_step=10**6)
    fixed, _ = shifted_accuracy("fixed", hard_start_step=10**6)
    hard, trainer = shifted_accuracy("hard", hard_start_step=40)
    log = trainer.state.log_history[0]
    print(plain, fixed, hard, log)
    assert hard - plain >= 0.3 and hard - fixed >= 0.2, (plain, fixed, hard)
    assert log["width_shift_x"] > 0.3 and log["width_shift_y"] > 0.3
    assert log["loss/augmented"] > log["loss/clean"] and log["teacher_shift"] < 3.0
