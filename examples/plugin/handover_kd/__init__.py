"""Handover: the teacher leads at first and hands over to the labels, as its words turn from help to ceiling.

loss = s · KL(teacher ‖ student) + (1 - s) · CE(labels), s falls from 1 to `last` along a cosine; where the student has
caught up (KL below `caught_up`), it falls at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_distill import DistillCallback, Objective
from hf_distill.losses import ForwardKL, LabelCrossEntropy
from hf_distill.methods import MethodCard
from hf_distill.objectives import scheduled

CARD = MethodCard(
    slug="handover_kd", title="Handover: a teacher that lets go", arxiv="", year=2026, kind="logits", modality="text"
)


@dataclass
class HandoverConfig:
    """All numbers are ours."""

    last: float = field(default=0.1, metadata={"help": "Share of the teacher at the end."})
    caught_up: float = field(default=0.0, metadata={"help": "KL below which the teacher's share is the last one."})

    def __post_init__(self):
        if not 0 <= self.last <= 1:
            raise ValueError(f"last is a share, 0 to 1, got {self.last}")
        if not 0 <= self.caught_up < float("inf"):
            raise ValueError(f"caught_up must be a number, not negative, got {self.caught_up}")


class Handover(Objective):
    """Both terms are declared, so that they share one projection; what must last is `state`, moved once per step."""

    paper = CARD

    def __init__(self, config: HandoverConfig):
        super().__init__()
        self.config = config
        self.state = {"distance": torch.tensor(torch.inf)}

    def logit_terms(self, progress):
        return {"kd": ForwardKL(), "label": LabelCrossEntropy()}

    def share(self, progress: float) -> torch.Tensor:
        falling = scheduled("cosine", 1.0, self.config.last, progress)
        return torch.where(self.state["distance"] < self.config.caught_up, self.config.last, falling)

    def weights(self, progress):
        share = self.share(progress)
        return {"kd": share, "label": 1 - share}

    def after_step(self, terms, progress):
        self.state["distance"] = torch.as_tensor(terms["kd"]).detach().float()


class ShareCallback(DistillCallback):
    """Logs how much the teacher still says."""

    def on_distill_log(self, args, state, control, *, logs, accelerator, objective=None, **kwargs):
        if self.objective is not None:
            logs["teacher_share"] = float(self.objective.share(state.global_step / max(state.max_steps, 1)))

    def on_distill_step(self, args, state, control, *, objective, **kwargs):
        self.objective = objective

    objective: Objective | None = None


def build_trainer(student, teacher, train_dataset, config: HandoverConfig, args, *, callbacks=None, **more):
    from hf_distill.training.trainers import trainer_for

    return trainer_for(args)(
        student,
        teacher=teacher,
        objective=Handover(config),
        args=args,
        train_dataset=train_dataset,
        callbacks=[*(callbacks or ()), ShareCallback()],
        **more,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
