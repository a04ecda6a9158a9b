"""BD-KD: teacher and student learn together. Per example the student's loss leans on the forward KL, which spreads it,
where it is surer than its teacher, and on the reverse KL, which sharpens it, where it is less sure.

    u   = 1[H(p_s) > H(p_t)],  w_f = 1 + (w - 1)(1 - u),  w_r = 1 + (w - 1) u
    L_s = CE(s, y) + T² mean_i [w_f KL(p_t ‖ p_s) + w_r KL(p_s ‖ p_t)]      p_t constant
    L_t = CE(t, y) + w_t T² mean_i KL(p_s ‖ p_t)                            p_s constant

    accelerate launch recipes/bdkd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

The structure is the paper's (abstract and summary; no official code was found). That the weights are 1 and w = 2, that
the entropies are those of the softened distributions, and w_t = 1 are our choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_distill.losses import forward_kl, reverse_kl
from hf_distill.losses.classification import check_logits
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals
from hf_distill.teachers import FrozenTeacher, PeerTeacher, Teacher

CARD = MethodCard(
    slug="bdkd",
    title="BD-KD: Balancing the Divergences for Online Knowledge Distillation",
    arxiv="2212.12965",
    year=2022,
    kind="logits",
    modality="image",
    citation="""@misc{amara2022bdkd,
  title = {{BD-KD}: Balancing the Divergences for Online Knowledge Distillation},
  author = {Ibtihel Amara and Nazanin Sepahvand and Brett H. Meyer and Warren J. Gross and James J. Clark},
  year = {2022}, eprint = {2212.12965}, archivePrefix = {arXiv}
}""",
)

ENTROPIES = ("soft", "hard")


@dataclass
class BDKDConfig:
    """The temperature is the usual one of CIFAR; the other numbers are ours, see the file's head."""

    temperature: float = field(default=4.0, metadata={"help": "Softmax temperature of both models' divergences."})
    bdkd_emphasis: float = field(
        default=2.0, metadata={"help": "Weight w of the divergence that is leaned on; 1 weighs both the same."}
    )
    bdkd_entropy: str = field(
        default="soft", metadata={"help": "Entropies at the temperature (soft) or at temperature 1 (hard)."}
    )
    teacher_kd_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pull on the teacher; lower it where the student drags it down."}
    )
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the teacher. Default: the student's."}
    )

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("bdkd_emphasis", "teacher_kd_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.teacher_learning_rate is not None and not 0 < self.teacher_learning_rate < math.inf:
            raise ValueError(f"teacher_learning_rate must be positive, got {self.teacher_learning_rate}")
        _check_entropy(self.bdkd_entropy)


@exactly
def bdkd_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    emphasis: float = 2.0,
    entropy: str = "soft",
    teacher_kd_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both networks' losses with their cross-entropies, means over the batch; each leaves the other without gradient.

    Args:
        student_logits, teacher_logits: (B, C).
        labels: (B,) classes, or (B, C) probabilities.
        temperature: of the divergences, which are multiplied by its square.
        emphasis: w, of the divergence that is leaned on.
        entropy: "soft" compares entropies at the temperature, "hard" at 1.
        teacher_kd_weight: of KL(p_s ‖ p_t) in the teacher's loss.

    Returns:
        (student_loss, teacher_loss, under_confident): the last is u, (B,) bool, True where the student is less sure.

    Raises:
        ValueError: two shapes, a temperature not positive, an unknown entropy.
    """
    check_logits(student_logits, teacher_logits, temperature)
    _check_entropy(entropy)
    ours, theirs = student_logits.detach(), teacher_logits.detach()
    at = temperature if entropy == "soft" else 1.0
    under_confident = entropy_of(ours, at) > entropy_of(theirs, at)
    u = under_confident.to(ours)
    spread = (1 + (emphasis - 1) * (1 - u)) * _per_row(forward_kl, student_logits, theirs, temperature)
    sharpen = (1 + (emphasis - 1) * u) * _per_row(reverse_kl, student_logits, theirs, temperature)
    student_loss = cross_entropy(student_logits, labels) + temperature**2 * (spread + sharpen).mean()
    # KL(p_s ‖ p_t) with the teacher as the one that learns is its forward KL
    pull = _per_row(forward_kl, teacher_logits, ours, temperature).mean()
    teacher_loss = cross_entropy(teacher_logits, labels) + teacher_kd_weight * temperature**2 * pull
    return student_loss, teacher_loss, under_confident


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Per row of logits (..., C), -Σ p log p of p = softmax(z / temperature)."""
    return torch.special.entr((logits / temperature).softmax(-1)).sum(-1)


def _per_row(divergence, learns: Tensor, constant: Tensor, temperature: float) -> Tensor:
    return divergence(learns, constant, temperature=temperature, reduction="none")


def _check_entropy(entropy: str) -> None:
    if entropy not in ENTROPIES:
        raise ValueError(f"entropy must be one of {', '.join(ENTROPIES)}, got {entropy!r}")


class BDKD(Objective):
    """The two losses, terms `student` and `teacher`, for a PeerTeacher.

    With weight 0 it logs `under_confident`, the share of examples on which the student is less sure, and the mean
    entropies of both that decide it. `eval_loss` holds the teacher's loss too: to choose the best model take
    `eval_student` or `eval_cross_entropy`.

    Raises:
        ValueError: a teacher that does not learn; models without one row of class logits per example.
    """

    per = "sample"
    paper = CARD

    def __init__(self, config: BDKDConfig | None = None):
        super().__init__()
        self.config = config or BDKDConfig()

    def setup(self, student: nn.Module, teacher: Teacher) -> None:
        if teacher.trained_module() is None:
            raise ValueError(f"BD-KD trains both models, {type(teacher).__name__} does not learn: use PeerTeacher")

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        for signals in (student, teacher):
            if not torch.is_tensor(signals.logits) or signals.rows is not None:
                raise ValueError("BD-KD compares one row of class logits per example: it is for classification")
        if student.labels is None:
            raise ValueError(f"BD-KD needs labels in the batch, got {', '.join(student.batch) or 'none'}")
        c = self.config
        own, peer, under_confident = bdkd_losses(
            student.logits,
            teacher.logits,
            student.labels,
            c.temperature,
            c.bdkd_emphasis,
            c.bdkd_entropy,
            c.teacher_kd_weight,
        )
        at = c.temperature if c.bdkd_entropy == "soft" else 1.0
        ours, theirs = (entropy_of(signals.logits.detach().float(), at) for signals in (student, teacher))
        return {
            "student": own,
            "teacher": peer,
            "under_confident": under_confident.float().mean(),
            "student_entropy": ours.mean(),
            "teacher_entropy": theirs.mean(),
        }

    def weights(self, progress: float) -> dict[str, float]:
        observed = dict.fromkeys(("under_confident", "student_entropy", "teacher_entropy"), 0.0)
        return {"student": 1.0, "teacher": 1.0} | observed


def as_peer(teacher, learning_rate: float | None = None) -> PeerTeacher:
    """A PeerTeacher of a model or of a FrozenTeacher, whose weights learn from here on, in float32.

    Raises:
        ValueError: a quantised teacher, or one without weights of its own; a peer with another learning rate.
    """
    if isinstance(teacher, PeerTeacher):
        if learning_rate is not None and teacher.learning_rate != learning_rate:
            raise ValueError(f"the peer has learning_rate {teacher.learning_rate}, the config {learning_rate}")
        return teacher
    if not isinstance(teacher, FrozenTeacher):
        raise ValueError(f"BD-KD trains its teacher, {type(teacher).__name__} has no weights to train: give a model")
    model = teacher.model
    if getattr(model, "is_quantized", False):
        raise ValueError(f"BD-KD trains its teacher, but {teacher.name} is quantised: load it unquantised")
    model = model.float().requires_grad_(True)
    return PeerTeacher(model, teacher.tokenizer, learning_rate=learning_rate, name=teacher.name)


def build_trainer(student, teacher, train_dataset, config: BDKDConfig, args, **trainer_arguments):
    """A trainer for this method. The teacher is a PeerTeacher, a model, or what loads one: it learns."""
    from hf_distill.training.trainers import teacher_from, trainer_for

    if isinstance(teacher, nn.Module):  # as it is: with adapters only these learn
        peer = PeerTeacher(teacher, learning_rate=config.teacher_learning_rate)
    else:
        peer = as_peer(teacher_from(teacher, args), config.teacher_learning_rate)
    return trainer_for(args)(
        student, teacher=peer, objective=BDKD(config), args=args, train_dataset=train_dataset, **trainer_arguments
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
