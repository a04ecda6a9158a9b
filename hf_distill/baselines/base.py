"""What the baselines of classification share: cross-entropy with the labels beside the paper's terms, and a warm-up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_distill.objectives import Objective
from hf_distill.signals import Signals, upcast

RELATION = "relation"  # the unit of terms that compare the examples of a batch: batches of two and more


class Baseline(Objective):
    """loss = label_weight · CE(labels) + weight · ramp · Σ terms; a subclass gives `terms` and `term_weights`.

    For models with one row of class logits per example. Labels are classes (B,) or probabilities (B, C).

    Args:
        weight: of the paper's terms together.
        label_weight: of the cross-entropy.
        warmup: share of training over which `weight` grows from 0, at an even pace.

    Raises:
        ValueError: a negative weight, no positive one, a warmup outside [0, 1].
    """

    needs = frozenset({"logits"})
    per = "sample"

    def __init__(self, *, weight: float, label_weight: float, warmup: float = 0.0):
        super().__init__()
        if not (weight >= 0 and label_weight >= 0 and weight + label_weight > 0):
            raise ValueError(f"weights must not be negative, nor all 0, got {weight=} and {label_weight=}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of training, 0 to 1, got {warmup}")
        self.weight, self.label_weight, self.warmup = weight, label_weight, warmup
        self.label_smoothing = 0.0
        self.register_buffer("class_weights", None, persistent=False)

    def weigh_labels(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        """Change the label loss.

        Args:
            class_weights: (C,) factors of an example's loss by its class. The sum is divided by the examples, not by
                their weights, so that no result depends on which of them meet; a mean weight of 1 keeps its size.
            label_smoothing: share of each label that is spread over all classes.
        """
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        """The paper's terms, unweighted."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(student, teacher)")

    def term_weights(self) -> dict[str, float]:
        """Weights of `terms` among each other; 1.0 where none is named."""
        return {}

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        logits = self.class_logits(student)
        if student.labels is None:
            raise ValueError(
                f"{type(self).__name__} needs labels in the batch, got {', '.join(student.batch) or 'none'}"
            )
        return {"label": self.label_loss(upcast(logits), student.labels)} | self.terms(student, teacher)

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, with the class weights and the smoothing of `weigh_labels`."""
        own = None if self.class_weights is None else self.class_weights.to(logits)
        options = {"weight": own, "label_smoothing": self.label_smoothing}
        return cross_entropy(logits, labels, reduction="sum", **options) / len(logits)

    def weights(self, progress: float) -> dict[str, float]:
        ramp = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        own = {name: 1.0 for name in self.names()} | self.term_weights()
        return {"label": self.label_weight} | {name: self.weight * ramp * value for name, value in own.items()}

    def names(self) -> tuple[str, ...]:
        """Of `terms`."""
        return tuple(self.term_weights())

    def class_logits(self, signals: Signals) -> Tensor:
        if not torch.is_tensor(signals.logits) or signals.rows is not None:
            raise ValueError(
                f"{type(self).__name__} compares one row of class logits per example; for a model with a label per "
                "token use LogitKD"
            )
        return signals.logits


class StudentAlone(Baseline):
    """Cross-entropy with the labels: what a student learns without a teacher."""

    needs = frozenset({"student.logits"})
    uses_teacher = False

    def __init__(self):
        super().__init__(weight=0.0, label_weight=1.0)

    def terms(self, student: Signals, teacher: Signals | None) -> dict[str, Tensor]:
        return {}


class ComparesExamples(Baseline):
    """A baseline with terms that relate the examples of a batch to each other.

    Such terms are means over batches of two and more examples; a last batch of one does not count for them.

    Raises:
        ValueError: two batches of one example in a row, in training.
    """

    couples_batch = "relates the examples of a batch to each other"
    _alone = False

    def count(self, batch: dict) -> dict[str, int]:
        labels = batch.get("labels")
        several = labels is not None and len(labels) > 1 and not batch.get("only_repeats")
        return {RELATION: int(several)}

    def at_least_two(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors (B, …); a single example stands beside itself, for terms that do not count then."""
        alone = len(tensors[0]) == 1
        if self.training:
            if alone and self._alone:
                raise ValueError(
                    f"{type(self).__name__} {self.couples_batch}, but batches hold one example: set "
                    "per_device_train_batch_size to at least 2"
                )
            self._alone = alone
        return [torch.cat([x, x]) for x in tensors] if alone else list(tensors)
