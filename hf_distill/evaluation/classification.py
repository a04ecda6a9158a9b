"""What a classifier does on held-out examples, as pure functions, and `compute_metrics` for the trainers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy

from hf_distill.signals import upcast

BINS = 15


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's.

    Args:
        logits: (N, C).
        labels: (N,) classes.

    Raises:
        ValueError: shapes that do not fit, labels outside 0 to C - 1, or no examples; so does every function here.
    """
    _check(logits, labels)
    return (logits.argmax(-1) == labels).double().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), in nats."""
    _check(logits, labels)
    return torch_cross_entropy(upcast(logits), labels).item()


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """Share of examples on which both models have the same largest logit."""
    if student_logits.shape != teacher_logits.shape or not len(student_logits):
        raise ValueError(
            f"agreement compares logits of one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean().item()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(C, C) int64: how many examples of class i (row) were taken for class j (column)."""
    _check(logits, labels)
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(-1), minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True)
class ClassScores:
    """Of one class; a share of nothing is 0."""

    precision: float
    recall: float
    f1: float
    examples: int


def class_scores(logits: Tensor, labels: Tensor) -> list[ClassScores]:
    """Precision, recall, F1 and number of examples of every class."""
    counts = confusion(logits, labels).double()
    right, taken, there = counts.diagonal(), counts.sum(0), counts.sum(1)
    scores = (right / taken.clamp(min=1), right / there.clamp(min=1), 2 * right / (taken + there).clamp(min=1))
    return [ClassScores(*row, int(n)) for *row, n in torch.stack([*scores, there], -1).tolist()]


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that an example has or that one was taken for, as scikit-learn counts them."""
    counts = confusion(logits, labels)
    seen = (counts.sum(0) + counts.sum(1)) > 0
    scores = class_scores(logits, labels)
    return sum(score.f1 for score, there in zip(scores, seen.tolist(), strict=True) if there) / int(seen.sum())


@dataclass(frozen=True)
class Reliability:
    """How often predictions of each confidence are right.

    Attributes:
        confidence, accuracy: (bins,) float64, means over the bin's examples; 0 in an empty bin.
        count: (bins,) int64 examples.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_b n_b / N · |accuracy_b - confidence_b|."""
        return ((self.accuracy - self.confidence).abs() * self.count).sum().item() / self.count.sum().item()


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Examples sorted by the probability of the predicted class into equal bins (b / bins, (b + 1) / bins]."""
    _check(logits, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    top = logits.double().softmax(-1).max(-1)
    place = (top.values * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    sums = [
        torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, place, value)
        for value in (top.values, (top.indices == labels).double())
    ]
    confidence, right = (total / count.clamp(min=1) for total in sums)
    return Reliability(confidence, right, count)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """See `Reliability.error`."""
    return reliability(logits, labels, bins).error


def compute_metrics(prediction) -> dict[str, float]:
    """Accuracy, macro-F1 and calibration error of a transformers EvalPrediction, for a trainer's `compute_metrics`."""
    logits, labels = (torch.as_tensor(x) for x in (prediction.predictions, prediction.label_ids))
    labels = labels.argmax(-1) if labels.is_floating_point() else labels
    measures = {"accuracy": accuracy, "macro_f1": macro_f1, "ece": expected_calibration_error}
    return {name: measure(logits, labels) for name, measure in measures.items()}


def class_table(logits: Tensor, labels: Tensor, names: list[str] | None = None) -> str:
    """`class_scores` as text, a line per class."""
    scores = class_scores(logits, labels)
    names = [str(i) for i in range(len(scores))] if names is None else names
    width = max(map(len, names), default=5)
    lines = [f"{'class':{width}s} precision   recall       F1 examples"]
    for name, s in zip(names, scores, strict=True):
        lines.append(f"{name:{width}s} {s.precision:9.4f}{s.recall:9.4f}{s.f1:9.4f}{s.examples:9d}")
    return "\n".join(lines)


def reliability_picture(rows: dict[str, Reliability], path: str, title: str = "") -> None:
    """Accuracy over confidence, a line per model. Needs matplotlib (the extra `report`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linestyle="--", label="calibrated")
    for name, row in rows.items():
        there = row.count > 0
        label = f"{name}, error {row.error:.3f}"
        axis.plot(row.confidence[there].tolist(), row.accuracy[there].tolist(), "o-", alpha=0.8, label=label)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=title)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels) or labels.is_floating_point():
        raise ValueError(
            f"logits must be (examples, classes) and labels (examples,) classes, at least one example, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)} of {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must lie between 0 and {logits.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
