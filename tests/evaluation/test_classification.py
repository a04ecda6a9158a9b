"""Measures of classifiers against slow loops and scikit-learn, and in a trainer on a ragged end."""

import math

import pytest
import torch
from sklearn.metrics import classification_report, f1_score

from hf_distill.baselines import HintonKD
from hf_distill.evaluation.classification import (
    accuracy,
    agreement,
    class_scores,
    class_table,
    compute_metrics,
    confusion,
    cross_entropy,
    expected_calibration_error,
    macro_f1,
    reliability,
    reliability_picture,
)
from tests.baselines.models import trainer


def example(n: int = 101, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(n, classes), torch.randint(0, classes, (n,))


def test_accuracy_and_cross_entropy_differ_from_a_loop():
    logits, labels = example()
    right = sum(int(max(range(5), key=lambda c: row[c]) == y) for row, y in zip(logits.tolist(), labels, strict=True))
    assert accuracy(logits, labels) == right / 101
    loss = -sum(row.log_softmax(0)[y].item() for row, y in zip(logits.double(), labels, strict=True)) / 101
    assert cross_entropy(logits, labels) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("seen", [5, 3])
def test_f1_differs_from_scikit_learn(seen):
    logits, labels = example()
    labels = labels % seen
    logits[:, 4] -= 50  # a class that is never predicted, and for seen = 3 one that is nowhere
    predicted = logits.argmax(-1)
    assert macro_f1(logits, labels) == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    report = classification_report(labels, predicted, output_dict=True, zero_division=0)
    for c, scores in enumerate(class_scores(logits, labels)):
        if scores.examples:
            theirs = [report[str(c)][k] for k in ("precision", "recall", "f1-score", "support")]
            assert [scores.precision, scores.recall, scores.f1, scores.examples] == pytest.approx(theirs)
    assert confusion(logits, labels).sum() == 101
    assert "eel" in class_table(logits, labels, ["ant", "bee", "cat", "dog", "eel"])


def test_calibration_error_differs_from_a_loop_over_bins():
    logits, labels = example(400)
    top, taken = logits.double().softmax(-1).max(-1)
    expected = 0.0
    for b in range(15):
        inside = [i for i in range(400) if b / 15 < top[i] <= (b + 1) / 15]
        if inside:
            right = sum(int(taken[i] == labels[i]) for i in inside) / len(inside)
            expected += abs(right - sum(top[i].item() for i in inside) / len(inside)) * len(inside) / 400
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, rel=1e-9)
    assert reliability(logits, labels).count.sum() == 400


def test_a_sure_and_right_model_is_not_calibrated():
    labels = torch.arange(5)
    assert expected_calibration_error(1e3 * torch.eye(5), labels) == 0.0
    assert expected_calibration_error(1e3 * torch.eye(5), (labels + 1) % 5) == 1.0
    even = torch.zeros(4, 2)
    assert expected_calibration_error(even, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.0)


def test_agreement_compares_models_of_other_classes():
    logits, _ = example()
    assert agreement(logits, logits * 3 + 1) == 1.0
    with pytest.raises(ValueError, match="one shape"):
        agreement(logits, logits[:, :4])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one example"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "between 0 and 2, got -100 to 0"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "torch.float32"),
    ],
)
def test_what_cannot_be_measured_is_a_number(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        macro_f1(logits, labels)


def test_a_trainers_metrics_depend_on_the_ragged_end(tmp_path):
    found = []
    for size in (2, 5, 3):
        done = trainer(tmp_path / str(size), "vit", HintonKD(), per_device_eval_batch_size=size)
        done.compute_metrics = compute_metrics
        found.append(
            {k: v for k, v in done.evaluate().items() if k.removeprefix("eval_") in ("accuracy", "macro_f1", "ece")}
        )
    assert len(found[0]) == 3 and all(math.isfinite(v) for v in found[0].values())
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)


def test_the_picture_is_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    reliability_picture({"student": reliability(*example())}, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_confidence_on_an_edge_lies_in_the_upper_bin():
    assert reliability(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), bins=2).count.tolist() == [4, 0]
