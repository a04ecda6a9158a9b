"""OFA-KD: exit branches on the student's stages, and the teacher's logits distilled into all of them.

Features of a CNN, a ViT and an MLP do not align, their logits do. So every chosen stage of the student gets an exit
branch of its own, trained with it and dropped when it leaves; of the teacher only the logits are read. One loss serves
the branches and the student's own head,

    L(z) = mean_i Σ_c -[(p_t + m)^eps - m]_c · log softmax(z / T)_c,    m one-hot of the label,

which at eps = 1 is the cross-entropy with the teacher, and with a larger eps lifts the target class the more, the surer
the teacher is. No T².

    accelerate launch recipes/ofa_kd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_distill.baselines.base import Baseline
from hf_distill.baselines.probe import model_of, probe_one
from hf_distill.heads import base_model_of
from hf_distill.losses.classification import check_logits, one_hot
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.signals import Signals
from hf_distill.students.branches import exit_branch
from hf_distill.students.projectors import form_of, prefix_tokens, width_of
from hf_distill.taps import HIDDEN, hidden_index, tap

CARD = MethodCard(
    slug="ofa_kd",
    title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
    arxiv="2310.19444",
    year=2023,
    kind="logits",
    modality="image",
    citation="""@inproceedings{hao2023ofa,
  title = {One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation},
  author = {Zhiwei Hao and Jianyuan Guo and Kai Han and Yehui Tang and Han Hu and Yunhe Wang and Chang Xu},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2023}
}""",
)

STAGES = ("1", "2", "3", "4")
DEPTHS = (2 / 12, 4 / 12, 10 / 12, 1.0)  # of the four stages in a network without stages: a ViT's blocks 2, 4, 10, 12


@dataclass
class OFAConfig:
    """Weights, temperature and stages of the official code; eps is 1.0 to 1.5 there, by the pair of models."""

    ofa_eps: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Exponent: one for all, or one per stage and a last one for the student's own head."},
    )
    ofa_stages: list[str] = field(
        default_factory=lambda: list(STAGES),
        metadata={
            "help": "Where the branches leave, from shallow to deep: stages 1 to 4 (without stages, after 2, 4, 10 and "
            "12 twelfths of the layers), 'uniform' (quarters of the layers), or paths of modules and hidden_states.<i>."
        },
    )
    ofa_temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of both; there is no T²."})
    ofa_loss_weight: float = field(default=1.0, metadata={"help": "Weight of each branch's loss."})
    kd_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the same loss on the student's head."})
    gt_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})

    def __post_init__(self):
        weights = (self.ofa_loss_weight, self.kd_loss_weight, self.gt_loss_weight)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"ofa_loss_weight, kd_loss_weight and gt_loss_weight must not be negative, nor all 0, got {weights}"
            )
        if not 0 < self.ofa_temperature < math.inf:
            raise ValueError(f"ofa_temperature must be positive, got {self.ofa_temperature}")
        if not self.ofa_stages or len(set(self.ofa_stages)) < len(self.ofa_stages):
            raise ValueError(f"ofa_stages must name different places, from shallow to deep, got {self.ofa_stages}")
        wrong = [s for s in self.ofa_stages if s.lstrip("-").isdigit() and s not in STAGES]
        mixed = {s in STAGES for s in self.ofa_stages} == {True, False}
        if wrong or mixed or ("uniform" in self.ofa_stages and len(self.ofa_stages) > 1):
            raise ValueError(
                f"ofa_stages are some of {', '.join(STAGES)}, or 'uniform', or paths such as hidden_states.3, not a "
                f"mixture, got {self.ofa_stages}"
            )
        branches = 4 if self.ofa_stages == ["uniform"] else len(self.ofa_stages)
        if len(self.ofa_eps) not in (1, branches + 1) or not all(0 < e < math.inf for e in self.ofa_eps):
            raise ValueError(
                f"ofa_eps must be one positive number, or {branches + 1}: one per stage, then the head's, got "
                f"{self.ofa_eps}"
            )


@exactly
def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of one branch with the teacher, its target class lifted; a mean over the batch, without T².

    The coefficient of -log p_s is p_t^eps for the other classes and (1 + p_t)^eps - 1 for the target.

    Args:
        student_logits, teacher_logits: (B, C); the teacher's are a constant.
        labels: (B,) classes, or (B, C) probabilities, of which the largest is the target.
        eps: positive; 1 is the cross-entropy with the teacher.

    Raises:
        ValueError: other shapes; eps or temperature not positive.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(ofa_loss(z, z, torch.tensor([0]), eps=2.0).item(), 4)
        0.3628
    """
    check_logits(student_logits, teacher_logits, temperature)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    target = one_hot(labels, student_logits)
    p = (teacher_logits.detach() / temperature).softmax(-1)
    lifted = torch.expm1(eps * torch.log1p(p))
    # Paper: the official code takes log(softmax), which is -inf where a probability underflows
    log_q = (student_logits / temperature).log_softmax(-1)
    return -(torch.where(target, lifted, p**eps) * log_q).sum(-1).mean()


class OFA(Baseline):
    """gt · CE(labels) + kd · L(student head) + ofa · Σ_k L(branch k), and the branches, which are trained with it.

    Stages count by relative depth: of a network whose layers come in stages (their shapes differ) the k-th of four
    quarters, else the twelfths of DEPTHS. Where two fall on one layer of a shallow student, the deeper stage's branch
    is left [ours]. The i-th of n named paths gets the branch of stage 4 (i + 1) / n, rounded [ours].

    Raises:
        ValueError: in `setup`, pooled features, tokens that are no square grid, more than the student has.
    """

    paper = CARD

    def __init__(self, config: OFAConfig | None = None):
        self.config = config or OFAConfig()
        super().__init__(weight=1.0, label_weight=self.config.gt_loss_weight)
        self.places: dict[str, int] = {}  # path in `Signals.features` -> stage, 1 to 4
        self.prefix: int | None = 0
        self.branches = nn.ModuleList()
        if self.config.ofa_stages != ["uniform"] and not set(self.config.ofa_stages) <= set(STAGES):
            paths = self.config.ofa_stages
            self.places = {path: max(1, round(4 * (i + 1) / len(paths))) for i, path in enumerate(paths)}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits", *(tap(path, "student") for path in self.places)})

    def setup(self, student: nn.Module, teacher) -> None:
        if len(self.branches):
            return
        base = base_model_of(student)
        self.prefix = prefix_tokens(base)
        own = probe_one(student, self.needs_of("student") - {"logits"} | {"hidden_states"})
        shapes = [tuple(x.shape) for x in own.hidden_states]
        if not self.places:
            self.places = self._stages(shapes[1:])
        taken = {path: self._shape(path, own) for path in self.places}
        final = width_of(shapes[-1] if shapes else list(taken.values())[-1])
        wide = max(final, width_of_teacher(teacher) or 0)
        for path, stage in self.places.items():
            if form_of(taken[path]) == "pooled":
                raise ValueError(f"{path!r} gives pooled features {taken[path]}: take a branch before the pooling")
            width = wide if form_of(taken[path]) == "map" else final
            self.branches.append(exit_branch(taken[path], stage, width, base.config.num_labels, self.prefix))
        if any(isinstance(module, nn.BatchNorm2d) for module in self.branches.modules()):
            self.couples_batch = "its branches normalise over the batch (BatchNorm)"

    def _stages(self, shapes: list[tuple]) -> dict[str, int]:
        if not shapes:
            raise ValueError("the student gives no hidden states to count stages in: name modules in ofa_stages")
        even = self.config.ofa_stages == ["uniform"] or len(set(shapes)) > 1
        chosen = STAGES if self.config.ofa_stages == ["uniform"] else sorted(self.config.ofa_stages)
        depth = [k / 4 if even else DEPTHS[k - 1] for k in map(int, chosen)]
        layers = [max(1, round(share * len(shapes))) for share in depth]
        return {f"{HIDDEN}{layer}": int(k) for layer, k in zip(layers, chosen, strict=True)}

    def _shape(self, path: str, own: Signals) -> tuple:
        index = hidden_index(path)
        return tuple((own.features[path] if index is None else own.hidden_states[index]).shape)

    def names(self) -> tuple[str, ...]:
        return ("head", *(f"branch{i + 1}" for i in range(len(self.branches))))

    def term_weights(self) -> dict[str, float]:
        return {n: self.config.kd_loss_weight if n == "head" else self.config.ofa_loss_weight for n in self.names()}

    def _eps(self) -> list[float]:
        """Of the branches, then of the head."""
        eps = self.config.ofa_eps
        if len(eps) == 1:
            return eps * (len(self.branches) + 1)
        chosen = STAGES if self.config.ofa_stages == ["uniform"] else self.config.ofa_stages
        by_stage = dict(zip(chosen, eps[:-1], strict=True))
        if not set(chosen) <= set(STAGES):
            return eps
        return [by_stage[str(stage)] for stage in self.places.values()] + eps[-1:]

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        mask = student.batch.get("attention_mask") if self.prefix is None else None
        exits = [branch(student.features[path], mask) for path, branch in zip(self.places, self.branches, strict=True)]
        own, theirs = self.class_logits(student), self.class_logits(teacher)
        losses = [
            ofa_loss(logits, theirs, student.labels, eps, self.config.ofa_temperature)
            for logits, eps in zip([*exits, own], self._eps(), strict=True)
        ]
        return {"head": losses[-1]} | {f"branch{i + 1}": loss for i, loss in enumerate(losses[:-1])}


def width_of_teacher(teacher) -> int | None:
    """Width of its last stage, as far as its config tells (a cached teacher may have none)."""
    model = model_of(teacher)
    config = getattr(teacher if model is None else model, "config", None)
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else getattr(config, "hidden_size", None)


def build_trainer(student, teacher, train_dataset, config: OFAConfig, args, **trainer_arguments):
    """DistillTrainer for this method; `args` is a DistillConfig."""
    from hf_distill.training.trainers import trainer_for

    return trainer_for(args)(
        student, teacher=teacher, objective=OFA(config), args=args, train_dataset=train_dataset, **trainer_arguments
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
