"""PLD: one list-wise loss instead of cross-entropy plus KD. The student learns a ranking of the classes: the label
first, the others as the teacher ranks them, each place weighted by the teacher's probability of its class.

    PLD = mean_i Σ_k α_k [logsumexp_{l ≥ k} s[π_l] - s[π_k]],  π = (y, others by falling t),  α_k = softmax(t / T)[π_k]

    accelerate launch recipes/pld.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

The weights "plistmle", α_k ∝ 2^-k, are ours: the paper's own were not found.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.baselines import Baseline
from hf_distill.losses.classification import check_logits, one_hot
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.signals import Signals

logger = logging.getLogger(__name__)

CARD = MethodCard(
    slug="pld",
    title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
    arxiv="2506.12542",
    year=2025,
    kind="logits",
    modality="image",
    citation="""@inproceedings{pld2025,
  title = {{PLD}: A Choice-Theoretic List-Wise Knowledge Distillation},
  author = {Ejafa Bassam and Dawei Zhu and Kaigui Bian},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2025},
  eprint = {2506.12542}, archivePrefix = {arXiv}
}""",
)

WEIGHTS = ("teacher", "listmle", "plistmle", "ce")


@dataclass
class PLDConfig:
    """Defaults are ImageNet's; on CIFAR-100 the temperature is 4."""

    pld_temperature: float = field(
        default=1.0, metadata={"help": "Softens the teacher's weights only: not the student, and not the ranking."}
    )
    pld_weights: str = field(
        default="teacher", metadata={"help": f"Weights of the places, one of {', '.join(WEIGHTS)}."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "Weight of a cross-entropy beside it; the method has none."}
    )

    def __post_init__(self):
        if not 0 < self.pld_temperature < math.inf:
            raise ValueError(f"pld_temperature must be positive, got {self.pld_temperature}")
        if not 0 <= self.ce_weight < math.inf:
            raise ValueError(f"ce_weight must not be negative, got {self.ce_weight}")
        _check_weights(self.pld_weights)


@exactly
def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    weights: str = "teacher",
) -> Tensor:
    """The list-wise loss, a mean over rows; convex in the student's logits.

    Args:
        student_logits, teacher_logits: (..., C); the teacher's are a constant.
        labels: (...,) classes, where -100 leaves a row out, or (..., C) probabilities, of which the largest is y.
        temperature: of the teacher's weights.
        weights: of the places: "teacher"; "listmle", 1 / C each; "plistmle", 2^-k with sum 1; "ce", the label's alone,
            which is the cross-entropy.

    Raises:
        ValueError: two shapes, labels of another, a temperature not positive, unknown weights.

    Example:
        >>> s, t = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
        >>> round(pld_loss(s, t, torch.tensor([1])).item(), 4)
        1.0635
    """
    _check_weights(weights)
    classes = student_logits.shape[-1]
    student, teacher = (z.reshape(-1, z.shape[-1]) for z in (student_logits, teacher_logits.detach()))
    check_logits(student, teacher, temperature)
    labels = labels.reshape(-1, classes) if labels.is_floating_point() else labels.flatten()
    target = one_hot(labels, student)
    order = teacher.masked_fill(target, torch.inf).argsort(dim=-1, descending=True, stable=True)
    if weights == "teacher":
        alpha = (teacher / temperature).softmax(-1).gather(-1, order)
    else:
        alpha = _fixed_weights(weights, classes).to(student)
    ranked = student.gather(-1, order)
    rest = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    losses = (alpha * (rest - ranked)).sum(-1)
    counts = target.any(-1)
    return losses.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


def _fixed_weights(weights: str, classes: int) -> Tensor:
    place = torch.arange(classes, dtype=torch.float64)
    return {
        "listmle": torch.full_like(place, 1 / classes),
        "plistmle": torch.softmax(-math.log(2) * place, -1),
        "ce": (place == 0).double(),
    }[weights]


def _check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")


class PLD(Baseline):
    """`pld_loss`, and a cross-entropy (`label`) whose weight is 0 by default.

    Where the teacher is wrong, the label stands first but weighs little: `top1_weight`, the mean of the teacher's
    probability of the label, is logged with weight 0.
    """

    paper = CARD

    def __init__(self, config: PLDConfig | None = None):
        self.config = config or PLDConfig()
        super().__init__(weight=1.0, label_weight=self.config.ce_weight)

    def term_weights(self) -> dict[str, float]:
        return {"pld": 1.0, "top1_weight": 0.0}

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        ours, theirs = self.class_logits(student), self.class_logits(teacher)
        temperature = self.config.pld_temperature
        with torch.no_grad():
            probability = (theirs.float() / temperature).softmax(-1)
            top1 = (probability * one_hot(student.labels, theirs)).sum(-1).mean()
        return {
            "pld": pld_loss(ours, theirs, student.labels, temperature, self.config.pld_weights),
            "top1_weight": top1,
        }


def build_trainer(student, teacher, train_dataset, config: PLDConfig, args, **trainer_arguments):
    """A trainer for this method, for models with one row of class logits per example."""
    from hf_distill.training.trainers import trainer_for

    if config.ce_weight > 0:
        logger.warning("PLD stands in place of the cross-entropy; ce_weight=%s adds one to it", config.ce_weight)
    return trainer_for(args)(
        student, teacher=teacher, objective=PLD(config), args=args, train_dataset=train_dataset, **trainer_arguments
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
