"""TAID: the student chases a target that moves from its own distribution to the teacher's, as fast as it can follow.

The target mixes logits, softmax((1 - t) · stopgrad(student) + t · teacher). t grows from t_start to t_end, never slower
than linearly, and faster while the loss falls quickly.

    accelerate launch recipes/taid.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.losses import Divergence, Interpolated, LabelCrossEntropy
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective

CARD = MethodCard(
    slug="taid",
    title="TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models",
    arxiv="2501.16937",
    year=2025,
    kind="logits",
    modality="text",
    citation="""@inproceedings{shing2025taid,
  title = {{TAID}: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models},
  author = {Makoto Shing and Kou Misaki and Han Bao and Sho Yokoi and Takuya Akiba},
  booktitle = {International Conference on Learning Representations}, year = {2025}
}""",
)


@dataclass
class TAIDConfig:
    """Defaults of the official code's arguments; its scripts use t_start 0.4 (Phi-3) and 0.2 (Llama-2, StableLM)."""

    t_start: float = field(default=0.4, metadata={"help": "Share of the teacher in the target at the start."})
    t_end: float = field(default=1.0, metadata={"help": "Share of the teacher in the target at the end."})
    alpha: float = field(default=5e-4, metadata={"help": "Size of the adaptive steps of t."})
    beta: float = field(default=0.99, metadata={"help": "Momentum of the relative change of the loss."})
    disable_adaptive: bool = field(default=False, metadata={"help": "Move t linearly."})
    distil_ratio: float = field(default=1.0, metadata={"help": "Weight of TAID's loss; the labels get 1 minus this."})

    def __post_init__(self):
        if not 0 <= self.t_start < self.t_end <= 1:
            raise ValueError(f"t must grow within 0 to 1, got t_start={self.t_start} and t_end={self.t_end}")
        for name in ("alpha", "beta", "distil_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


class TAID(Objective):
    """Cross-entropy with the interpolated target, and the schedule of t.

    Paper: the official code moves t in every forward, on every rank by itself, and in evaluation too; here it moves
    once per optimizer step, by the loss over all micro-batches and ranks, and never in evaluation.
    """

    paper = CARD

    def __init__(self, config: TAIDConfig | None = None):
        super().__init__()
        self.config = config or TAIDConfig()
        self.state = {
            "t": torch.tensor(self.config.t_start),
            "momentum": torch.tensor(0.0),
            "previous_loss": torch.tensor(torch.inf),
        }

    @property
    def t(self) -> Tensor:
        """The teacher's present share of the target, a 0-d float32 tensor."""
        return self.state["t"]

    @t.setter
    def t(self, value: float | Tensor) -> None:
        self.state["t"] = torch.as_tensor(value, dtype=torch.float32, device=self.state["t"].device)

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        return {"label": LabelCrossEntropy(), "taid": Interpolated(self.t)}

    def weights(self, progress: float) -> dict[str, float]:
        return {"label": 1 - self.config.distil_ratio, "taid": self.config.distil_ratio}

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        """Move t by the step's loss (algorithm 1); all on the device. The first loss only starts the record."""
        c, t, previous = self.config, self.state["t"], self.state["previous_loss"]
        loss = torch.as_tensor(terms["taid"]).detach().to(previous)
        first = previous.isinf()
        change = torch.where(first, 0.0, (previous - loss) / (previous + 1e-15)).nan_to_num()
        momentum = c.beta * self.state["momentum"] + (1 - c.beta) * change
        linear = c.t_start + (c.t_end - c.t_start) * progress
        adaptive = t + c.alpha * momentum.sigmoid() * (1 - t)
        moved = torch.full_like(t, linear) if c.disable_adaptive else adaptive.clamp(min=linear)
        self.state["t"] = torch.where(first, t, moved.clamp(max=c.t_end))
        self.state["momentum"] = torch.where(first, self.state["momentum"], momentum)
        self.state["previous_loss"] = loss

    def logs(self) -> dict[str, Tensor]:
        return {"taid_t": self.state["t"], "taid_momentum": self.state["momentum"]}


def build_trainer(student, teacher, train_dataset, config: TAIDConfig, args, **trainer_arguments):
    """A trainer for this method: DistillSFTTrainer for DistillSFTConfig, DistillTrainer for DistillConfig."""
    from hf_distill.training.trainers import trainer_for

    return trainer_for(args)(
        student, teacher=teacher, objective=TAID(config), args=args, train_dataset=train_dataset, **trainer_arguments
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
