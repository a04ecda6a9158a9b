"""Mixup in KD: only a part of each batch is mixed, and every row of logits has its own standard deviation as its
temperature, so that mixing and temperature do not smooth twice.

    L = gamma · mean CE(y, s / sd(s)) + alpha · mean KL(softmax(t / sd(t)) ‖ softmax(s / sd(s)))

Student and teacher see the same mixed pictures. A teacher that was trained without mixup is said to make the better
students (from memory of the paper, not verified).

    accelerate launch recipes/mix_kd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

Images only: the mixing of embeddings that text would need is not built, and MixupCollator refuses token ids.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_distill.curricula.mixup import MixupCollator, MixupEpoch, check_mixing
from hf_distill.curricula.mixup import mixup_labels as mixup_labels
from hf_distill.heads import base_model_of
from hf_distill.losses import forward_kl, kd_loss
from hf_distill.losses.classification import check_logits
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals

logger = logging.getLogger(__name__)

MIXES = "mixes the examples of a batch"

CARD = MethodCard(
    slug="mix_kd",
    title="Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study",
    arxiv="2211.03946",
    year=2022,
    kind="data",
    modality="image",
    citation="""@inproceedings{choi2023understanding,
  title = {Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study},
  author = {Hongjun Choi and Eun Som Jeon and Ankita Shukla and Pavan Turaga},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision}, year = {2023}
}""",
    couples_batch=MIXES,
)


@dataclass
class MixKDConfig:
    """Defaults are the official code's losses with a tenth of each batch mixed."""

    mixup_alpha: float = field(default=1.0, metadata={"help": "Of the Beta distribution; 0.2, 0.4 and 1 were studied."})
    mixup_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the examples that are mixed; 1 is full mixup. The paper's PMU 10% is 0.1."},
    )
    pmu_sampling: str = field(
        default="exact",
        metadata={"help": "exact: as many as said; official: as the official code draws, with replacement (more)."},
    )
    std_temperature: bool = field(
        default=True, metadata={"help": "Each row's standard deviation as its temperature; else mix_temperature."}
    )
    mix_temperature: float = field(
        default=4.0, metadata={"help": "Of the KL, times its square, with std_temperature off; the labels' is then 1."}
    )
    gamma: float = field(default=0.1, metadata={"help": "Weight of the cross-entropy with the mixed labels."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the KL with the teacher."})

    def __post_init__(self):
        check_mixing(self.mixup_alpha, self.mixup_fraction, self.pmu_sampling)
        for name in ("gamma", "alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.mix_temperature < math.inf:
            raise ValueError(f"mix_temperature must be positive, got {self.mix_temperature}")


@exactly
def mixstd_loss(
    student_logits: Tensor, teacher_logits: Tensor, soft_labels: Tensor, gamma: float = 0.1, alpha: float = 0.9
) -> tuple[Tensor, Tensor]:
    """(loss_cls, loss_kd), means over the batch with gamma and alpha inside and without T².

    Every row z is divided by its unbiased standard deviation over the classes, + 1e-7, through which the student's
    gradient flows. So nothing changes when a row is scaled or shifted. With two classes what is left is a sign: the
    scaled logits are always √2 apart.

    Args:
        student_logits, teacher_logits: (B, C), C at least 2; the teacher's are a constant.
        soft_labels: (B, C) probabilities, or (B,) classes.

    Raises:
        ValueError: two shapes, or one class.
    """
    check_logits(student_logits, teacher_logits, 1.0, classes=2)
    ours, theirs = (z / (z.std(-1, keepdim=True) + 1e-7) for z in (student_logits, teacher_logits.detach()))
    return gamma * cross_entropy(ours, soft_labels), alpha * forward_kl(ours, theirs)


class MixKD(Objective):
    """The terms `cls` and `kd`, their weights inside; labels are classes or probabilities.

    With weight 0 it logs `mix_fraction`, the share of examples that were mixed, and `student_logit_std`.
    """

    per = "sample"
    paper = CARD
    couples_batch = MIXES

    def __init__(self, config: MixKDConfig | None = None):
        super().__init__()
        self.config = config or MixKDConfig()

    def setup(self, student: nn.Module, teacher) -> None:
        if teacher.readers:
            raise ValueError(
                f"{teacher.name} is cached, and what it said of clean pictures is not what it says of mixed ones: use "
                "the live teacher"
            )
        classes = getattr(student.config, "num_labels", None)
        if self.config.std_temperature and classes is not None and classes <= 3:
            logger.warning(
                "%s classes divided by their standard deviation leave little or nothing of the logits' size to learn: "
                "set std_temperature to False",
                classes,
            )

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        for signals in (student, teacher):
            if not torch.is_tensor(signals.logits) or signals.rows is not None:
                raise ValueError("MixKD compares one row of class logits per example: it is for classification")
        c, ours, theirs = self.config, student.logits, teacher.logits
        if c.std_temperature:
            cls, kd = mixstd_loss(ours, theirs, student.labels, c.gamma, c.alpha)
        else:
            cls = c.gamma * cross_entropy(ours.float(), student.labels)
            kd = c.alpha * kd_loss(ours, theirs, c.mix_temperature)
        lam = student.batch.get("mix_lambda")
        mixed = ours.new_zeros(()) if lam is None else (lam < 1).float().mean()
        return {"cls": cls, "kd": kd, "mix_fraction": mixed, "student_logit_std": ours.detach().float().std(-1).mean()}

    def weights(self, progress: float) -> dict[str, float]:
        return {"cls": 1.0, "kd": 1.0, "mix_fraction": 0.0, "student_logit_std": 0.0}


def build_trainer(student, teacher, train_dataset, config: MixKDConfig, args, **trainer_arguments):
    """A trainer for this method: its training batches are mixed, those of evaluation are not."""
    from hf_distill.training.trainers import trainer_for

    if args.dataloader_persistent_workers:
        raise ValueError("mixup draws anew in each epoch, which persistent workers do not hear of: switch them off")
    trainer = trainer_for(args)(
        student, teacher=teacher, objective=MixKD(config), args=args, train_dataset=train_dataset, **trainer_arguments
    )
    model = base_model_of(trainer.model)
    if model.main_input_name == "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads token ids, which cannot be mixed: mix_kd is for image classification"
        )
    collator = MixupCollator(
        trainer.data_collator,
        config.mixup_alpha,
        config.mixup_fraction,
        trainer.model.config.num_labels,
        sampling=config.pmu_sampling,
        seed=args.seed,
    )
    trainer.data_collator = collator
    trainer.add_callback(MixupEpoch(collator))
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
