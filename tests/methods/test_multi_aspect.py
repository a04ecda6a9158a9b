"""MaKD: aspects teach the trunk, never the class rows, and only if they tell something of the picture."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, one_hot
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_distill import FrozenTeacher
from hf_distill.losses import kd_loss
from hf_distill.methods import multi_aspect
from hf_distill.methods.multi_aspect import (
    MultiAspectConfig,
    aspect_auc,
    aspect_entropy,
    informative,
    makd_loss,
    read_answers,
    yes_probability,
)
from tests.baselines.models import vit
from tests.helpers import SGD, plain_arguments

torch.set_num_threads(1)
B, C, Q = 6, 3, 4
DRAW = torch.Generator().manual_seed(0)
OUTPUTS = torch.randn(B, C + Q, generator=DRAW, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ANSWERS = torch.rand(B, Q, generator=DRAW, dtype=torch.float64)


# ---- pure functions --------------------------------------------------------------------------------------------------
def test_the_loss_is_not_that_of_a_loop():
    total, ce, aspect = makd_loss(OUTPUTS, LABELS, ANSWERS, C, alpha=0.7, ce_weight=0.3)
    expected = [0.0, 0.0]
    for i in range(B):
        z = OUTPUTS[i, :C]
        expected[0] += (z.exp().sum().log() - z[LABELS[i]]) / B
        for q in range(Q):
            p, a = 1 / (1 + math.exp(-OUTPUTS[i, C + q])), ANSWERS[i, q]
            expected[1] -= (a * math.log(p) + (1 - a) * math.log(1 - p)) / (B * Q)
    torch.testing.assert_close(ce, expected[0])
    torch.testing.assert_close(aspect, expected[1])
    torch.testing.assert_close(total, 0.3 * expected[0] + 0.7 * expected[1])


def test_limits_of_the_loss_are_wrong():
    total, _, _ = makd_loss(OUTPUTS, LABELS, ANSWERS, C, alpha=0.0)
    assert torch.equal(total, cross_entropy(OUTPUTS[:, :C], LABELS))
    best = torch.cat([OUTPUTS[:, :C], ANSWERS.logit()], 1).requires_grad_()
    _, _, aspect = makd_loss(best, LABELS, ANSWERS, C)
    torch.testing.assert_close(aspect, binary_cross_entropy(ANSWERS, ANSWERS))  # the answers' own entropy
    assert aspect > 0.1 and torch.autograd.grad(aspect, best)[0].abs().max() < 1e-15


def test_gradients_of_the_loss_are_wrong():
    outputs = OUTPUTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda o: makd_loss(o, LABELS, ANSWERS, C), outputs)
    grads = [torch.autograd.grad(makd_loss(outputs, LABELS, a, C)[0], outputs)[0] for a in (ANSWERS, 1 - ANSWERS)]
    assert torch.equal(grads[0][:, :C], grads[1][:, :C]) and not torch.isclose(*(g[:, C:] for g in grads)).any()


def test_yes_depends_on_other_tokens_or_a_constant():
    yes, no = torch.randn(5), torch.randn(5)
    expected = torch.stack([yes, no]).softmax(0)[0]
    torch.testing.assert_close(yes_probability(yes, no), expected)
    torch.testing.assert_close(yes_probability(yes + 7, no + 7), expected)
    assert yes_probability(yes.bfloat16(), no.bfloat16()).dtype == torch.float32


def test_a_constant_aspect_is_kept(caplog):
    answers = torch.tensor([[0.9, 0.5, 0.0, 1.0], [0.9, 0.5, 1.0, 0.7]])
    entropy, information = aspect_entropy(answers)
    assert entropy.tolist() == pytest.approx([0.3251, math.log(2), math.log(2), 0.4227], abs=1e-4)
    assert information.tolist() == pytest.approx([0, 0, math.log(2), 0.1173], abs=1e-4)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        assert informative(answers, 1e-4).tolist() == [2, 3]
    assert "aspect 1: entropy 0.6931 nats, 0.0000 about the picture, constant: dropped" in caplog.text
    with pytest.raises(ValueError, match="all 2 aspects get one answer"):
        informative(answers[:, :2], 1e-4)


def test_the_area_is_not_scikit_learn_s():
    scores = torch.randn(40, 3, generator=DRAW).round(decimals=1)
    answers = torch.rand(40, 3, generator=DRAW)
    answers[:, 2] = 0.9
    found = aspect_auc(scores, answers)
    for q in range(2):
        assert found[q].item() == pytest.approx(roc_auc_score(answers[:, q] > 0.5, scores[:, q]))
    assert found[2].isnan()


# ---- in a trainer ----------------------------------------------------------------------------------------------------
def annotated(n: int = 12, seed: int = 5, aspects: int = Q, size: int = 16) -> Dataset:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, size, size, generator=draw)
    answers = torch.rand(n, aspects, generator=draw)
    columns = {"pixel_values": pixels.numpy(), "labels": [i % C for i in range(n)], "aspect_probs": answers.tolist()}
    return Dataset.from_dict(columns).with_format("torch")


def trainer_of(folder, config: MultiAspectConfig | None = None, *, data=None, teacher=None, **given):
    settings = {k: given.pop(k) for k in [*given] if k not in ("eval_dataset", "student", "compute_metrics")}
    student = given.pop("student", None)
    return multi_aspect.build_trainer(
        vit(seed=1) if student is None else student,
        teacher,
        annotated() if data is None else data,
        config or MultiAspectConfig(),
        plain_arguments(folder, **SGD | dict(per_device_train_batch_size=4, max_steps=2) | settings),
        **given,
    )


def one_batch(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def test_the_trainer_s_terms_are_not_those_of_one_wide_classifier(tmp_path):
    config = MultiAspectConfig(aspect_alpha=0.7, aspect_ce_weight=0.3, aspect_kd_weight=0.2)
    trainer = trainer_of(tmp_path, config, teacher=FrozenTeacher(vit(12, seed=2)))
    batch, model = one_batch(trainer), trainer.model
    student, teacher, terms = trainer._signals(model, batch)
    assert student.logits.shape == (4, C)
    pooled = model.vit(batch["pixel_values"]).last_hidden_state[:, 0]
    head = trainer.objective.aspect_classifier
    wide = torch.cat([model.classifier.weight, head.weight]), torch.cat([model.classifier.bias, head.bias])
    _, ce, aspect = makd_loss(pooled @ wide[0].T + wide[1], batch["labels"], batch["cached_aspect_probs"], C)
    torch.testing.assert_close(terms["ce"].value, ce)
    torch.testing.assert_close(terms["aspect"].value, aspect)
    torch.testing.assert_close(terms["kd"].value, kd_loss(student.logits, teacher.logits, 4.0))
    assert {n: t.weight for n, t in terms.items()} == {"ce": 0.3, "aspect": 0.7, "kd": 0.2}


def test_answers_move_the_class_rows_or_not_the_trunk(tmp_path):
    trainer = trainer_of(tmp_path)
    batch, grads = one_batch(trainer), []
    for answers in (batch["cached_aspect_probs"], 1 - batch["cached_aspect_probs"]):
        trainer.model.zero_grad()
        _, _, terms = trainer._signals(trainer.model, batch | {"cached_aspect_probs": answers})
        sum(term.value * term.weight for term in terms.values()).backward()
        grads.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    same = {name for name in grads[0] if torch.equal(grads[0][name], grads[1][name])}
    assert same == {"classifier.weight", "classifier.bias"}


def test_the_student_leaves_with_aspects(tmp_path):
    student = vit(seed=1)
    names = list(student.state_dict())
    trainer = trainer_of(tmp_path, student=student, eval_dataset=annotated(9, 6))
    trainer.train()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_aspect_auc"] <= 1 and not trainer.objective.seen
    result = trainer.student()
    assert list(result.state_dict()) == names and result.config.num_labels == C
    assert trainer.teacher is None and trainer.objective.aspect_classifier.out_features == Q


def test_a_class_is_lost_to_a_large_aspect_logit(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=annotated(9, 6), compute_metrics=lambda prediction: {})
    with torch.no_grad():
        trainer.objective.aspect_classifier.bias += 1e4
    said = trainer.predict(trainer.eval_dataset).predictions
    assert said.shape == (9, C)


def test_the_area_of_an_evaluation_is_not_that_of_its_rows(tmp_path):
    data = annotated(9, 6)
    trainer = trainer_of(tmp_path, eval_dataset=data, per_device_eval_batch_size=2)
    with torch.no_grad():
        pooled = trainer.model.eval().vit(data["pixel_values"][:]).last_hidden_state[:, 0]
        expected = aspect_auc(trainer.objective.aspect_classifier(pooled), data["aspect_probs"][:]).nanmean()
    for _ in range(2):
        assert trainer.evaluate()["eval_aspect_auc"] == pytest.approx(expected.item())
    plain = data.remove_columns("aspect_probs")
    metrics = trainer.evaluate(plain)
    assert "eval_aspect_auc" not in metrics and metrics["eval_aspect"] == 0


def test_constants_are_learned(tmp_path):
    data = annotated()
    answers = data["aspect_probs"][:]
    answers[:, 1] = 0.97
    data = data.with_format(None).remove_columns("aspect_probs").add_column("aspect_probs", answers.tolist())
    trainer = trainer_of(tmp_path, data=data.with_format("torch"))
    assert trainer.objective.aspect_classifier.out_features == Q - 1
    assert trainer.objective.state["kept"].tolist() == [0, 2, 3]
    batch = one_batch(trainer)
    student, _, terms = trainer._signals(trainer.model, batch)
    logits = trainer.objective.aspect_classifier(student.features["embedding"])
    expected = makd_loss(
        torch.cat([student.logits, logits], 1), batch["labels"], batch["cached_aspect_probs"][:, [0, 2, 3]], C
    )
    torch.testing.assert_close(terms["aspect"].value, expected[2])


def test_bad_data_is_taken(tmp_path):
    good = annotated()
    with pytest.raises(ValueError, match="no column 'aspect_probs' among pixel_values, labels: annotate it"):
        trainer_of(tmp_path, data=good.remove_columns("aspect_probs"))
    rows = good.with_format(None).remove_columns("aspect_probs")
    for answers, message in (
        ([[0.1, 1.5]] * 12, "probabilities, got 1.5 in row 0"),
        ([[0.1, math.nan]] * 12, "probabilities, got nan in row 0"),
        ([[0.1]] * 11 + [[0.1, 0.2]], r"rows of \[1, 2\] answers"),
        ([[]] * 12, r"rows of \[0\] answers"),
    ):
        with pytest.raises(ValueError, match=message):
            read_answers(rows.add_column("aspect_probs", answers))
    trainer = trainer_of(tmp_path)
    batch = one_batch(trainer)
    del batch["cached_aspect_probs"]
    with pytest.raises(ValueError, match="MultiAspect needs 4 answers per example"):
        trainer._signals(trainer.model.train(), batch)
    for bad in (
        {"aspect_alpha": -1.0}, {"aspect_ce_weight": math.nan}, {"aspect_kd_weight": math.inf}, {"temperature": 0.0}
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            MultiAspectConfig(**bad)


# ---- the page's toy --------------------------------------------------------------------------------------------------
class MLPConfig(PretrainedConfig):
    model_type = "aspects_of_a_test"


class MLP(PreTrainedModel):
    config_class = MLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.classifier = nn.Linear(64, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        """As torch makes them."""

    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutput(logits=self.classifier(self.body(pixel_values)))


def shapes_and_colours(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of 10 shapes x 10 colours (100 classes) in noise, and their true attributes (20)."""
    fixed, draw = torch.Generator().manual_seed(5), torch.Generator().manual_seed(seed)
    masks, colours = (torch.rand(10, 8, 8, generator=fixed) > 0.6).float(), torch.rand(10, 3, generator=fixed)
    labels = torch.arange(n) % 100
    shape, colour = labels // 10, labels % 10
    pixels = masks[shape][:, None] * colours[colour][:, :, None, None]
    attributes = torch.cat([one_hot(shape, 10), one_hot(colour, 10)], 1).float()
    return pixels + 0.2 * torch.randn(n, 3, 8, 8, generator=draw), labels, attributes


def test_true_aspects_do_not_help_or_shuffled_ones_do(tmp_path):
    """Page: shape x colour classes, one label each: aspects give 5 points and more, shuffled ones nothing."""
    test, labels, _ = shapes_and_colours(600, 99)

    def accuracy(name: str, answers: torch.Tensor, alpha: float, seed: int) -> float:
        torch.manual_seed(seed)
        pixels, classes, _ = shapes_and_colours(100, seed)
        columns = zip(pixels, classes.tolist(), answers, strict=True)
        rows = [{"pixel_values": x, "labels": y, "aspect_probs": a} for x, y, a in columns]
        trainer = multi_aspect.build_trainer(
            MLP(MLPConfig(num_labels=100)), None, rows, MultiAspectConfig(aspect_alpha=alpha),
            plain_arguments(
                tmp_path / name, per_device_train_batch_size=100, max_steps=300, learning_rate=3e-3, seed=seed,
                lr_scheduler_type="constant", logging_steps=300, max_grad_norm=0.0,
            ),
        )  # fmt: skip
        trainer.train()
        with torch.no_grad():
            return (trainer.student()(test).logits.argmax(-1) == labels).float().mean().item()

    results = []
    for seed in range(2):
        true = shapes_and_colours(100, seed)[2]
        shuffled = true[torch.randperm(100, generator=torch.Generator().manual_seed(seed))]
        given = {"plain": (true, 0.0), "true": (true, 4.0), "shuffled": (shuffled, 4.0)}
        results.append([accuracy(f"{name}-{seed}", *pair, seed) for name, pair in given.items()])
    plain, helped, misled = torch.tensor(results).mean(0).tolist()
    assert helped >= plain + 0.05, results
    assert misled < plain + 0.05 and misled < helped - 0.05, results
