"""DDK: the data mixture moves towards the domains in which the student is furthest behind its teacher.

Every `ddk_interval` optimizer steps the student's perplexity is measured on a small validation set of each domain and
divided by the teacher's, which is measured once. The weights of domains move smoothly by these ratios:

    r_0 = softmax(ppl_S / ppl_T)        psi = r_t · exp(ppl_S / ppl_T)
    r_{t+1} = alpha · psi / Σ psi + (1 - alpha) / N        L = CE(labels) + gamma · KL(teacher ‖ student; T)

The first interval is drawn in natural proportions, the others by r. No official code was found [reconstruction from
the paper]: the direction of KL is read from the text, and how rows of a domain are ordered is ours.

    accelerate launch recipes/ddk.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_distill.curricula.domains import MixtureObjective, hold_out, split_by_domain, with_domains
from hf_distill.losses import ForwardKL, LabelCrossEntropy, ReverseKL, run_terms
from hf_distill.methods._card import MethodCard

CARD = MethodCard(
    slug="ddk",
    title="DDK: Distilling Domain Knowledge for Efficient Large Language Models",
    arxiv="2407.16154",
    year=2024,
    kind="data",
    modality="text",
    citation="""@inproceedings{liu2024ddk,
  title = {{DDK}: Distilling Domain Knowledge for Efficient Large Language Models},
  author = {Jiaheng Liu and Chenchen Zhang and Jinyang Guo and Yuanxing Zhang and Haoran Que and Ken Deng and
            Zhiqi Bai and Jie Liu and Ge Zhang and Jiakai Wang and Yanan Wu and Congnan Liu and Jiamang Wang and
            Lin Qu and Wenbo Su and Bo Zheng},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}""",
)
INITS = ("eq1", "uniform", "natural")
DIRECTIONS = {"forward": ForwardKL, "reverse": ReverseKL}


@dataclass
class DDKConfig:
    """Numbers are those of the paper, sections 3.3 and 4.1."""

    ddk_interval: int = field(default=1000, metadata={"help": "Optimizer steps between updates of the mixture, K."})
    ddk_alpha: float = field(
        default=0.5, metadata={"help": "Share of the discrepancies in the mixture; the rest is spread evenly."}
    )
    distil_gamma: float = field(default=0.2, metadata={"help": "Weight of the divergence beside the labels."})
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of both models; no T² factor."})
    ddk_domain_column: str = field(default="domain", metadata={"help": "Column that names each row's domain."})
    ddk_eval_samples: int = field(
        default=500, metadata={"help": "Rows of each domain's validation set; held out where no eval set is given."}
    )
    ddk_init: str = field(
        default="eq1", metadata={"help": f"What the first update starts from: one of {', '.join(INITS)}."}
    )
    ddk_direction: str = field(default="forward", metadata={"help": f"Of the KL: one of {', '.join(DIRECTIONS)}."})

    def __post_init__(self):
        for name in ("ddk_interval", "ddk_eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ddk_alpha <= 1:
            raise ValueError(f"ddk_alpha must lie between 0 and 1, got {self.ddk_alpha}")
        if not 0 <= self.distil_gamma < math.inf:
            raise ValueError(f"distil_gamma must be finite and not negative, got {self.distil_gamma}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name, known in (("ddk_init", INITS), ("ddk_direction", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


# ---- pure functions --------------------------------------------------------------------------------------------------
def initial_domain_weights(student_ppl: Tensor, teacher_ppl: Tensor) -> Tensor:
    """(N,) weights softmax(student_ppl / teacher_ppl): equation 1, exponentials of ratios of perplexities.

    Args:
        student_ppl, teacher_ppl: (N,) perplexities (not losses), of any float type; the result has float32 or more.

    Raises:
        ValueError: different shapes, perplexities that are not finite and positive.

    Example:
        >>> initial_domain_weights(torch.tensor([8.0, 8.0]), torch.tensor([8.0, 8.0])).tolist()
        [0.5, 0.5]
    """
    return _ratios(student_ppl, teacher_ppl).softmax(-1)


def update_domain_weights(weights: Tensor, student_ppl: Tensor, teacher_ppl: Tensor, alpha: float = 0.5) -> Tensor:
    """(N,) next weights: alpha · normalised(weights · exp(student_ppl / teacher_ppl)) + (1 - alpha) / N: equation 2.

    They sum to 1, and none is below (1 - alpha) / N. Ratios of any size do not overflow.

    Args:
        weights: (N,) present weights, not negative; a 0 stays at the floor.
        student_ppl, teacher_ppl: (N,) perplexities.

    Raises:
        ValueError: as `initial_domain_weights`; alpha outside 0 to 1.

    Example:
        >>> w = update_domain_weights(torch.tensor([0.5, 0.5]), torch.tensor([30.0, 10.0]), torch.tensor([10.0, 10.0]))
        >>> [round(x, 4) for x in w.tolist()]
        [0.6904, 0.3096]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    ratios = _ratios(student_ppl, teacher_ppl)
    if weights.shape != ratios.shape or not (weights >= 0).all() or not weights.sum() > 0:
        raise ValueError(f"weights must be {tuple(ratios.shape)}, not negative and not all 0, got {weights}")
    return alpha * (weights.to(ratios).log() + ratios).softmax(-1) + (1 - alpha) / len(ratios)


def _ratios(student_ppl: Tensor, teacher_ppl: Tensor) -> Tensor:
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student_ppl, teacher_ppl))
    if student.shape != teacher.shape or student.dim() != 1:
        raise ValueError(
            f"perplexities must be two (N,) tensors, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not ((student > 0) & (teacher > 0) & student.isfinite() & teacher.isfinite()).all():
        raise ValueError(f"perplexities must be positive and finite, got {student.tolist()} and {teacher.tolist()}")
    return student / teacher


def ddk_loss(
    student_logits,
    teacher_logits,
    labels: Tensor,
    gamma: float = 0.2,
    temperature: float = 1.0,
    direction: str = "forward",
) -> Tensor:
    """Mean over tokens of CE(labels) + gamma · KL of the softmaxes at `temperature`: equation 3, no T² factor.

    Args:
        student_logits, teacher_logits: (..., V), of any float type; no gradient goes to the teacher.
        labels: (...) aligned with the logits (not shifted), -100 counts nothing. No label at all gives 0.
        direction: "forward" is KL(teacher ‖ student), "reverse" the other way round.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> [round(ddk_loss(z, t, torch.tensor([0])).item(), 4) for t in (z, z.flip(-1))]
        [0.1269, 0.4316]
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    terms = {"label": (LabelCrossEntropy(), 1.0), "kd": (DIRECTIONS[direction](temperature), gamma)}
    values = run_terms(student_logits, teacher_logits, terms, labels=labels, mask=labels >= 0)
    return values["label"] + gamma * values["kd"]


# ---- training --------------------------------------------------------------------------------------------------------
class DDK(MixtureObjective):
    """Equation 3 on every batch, equation 2 at the end of every interval.

    Args:
        domains: their names, in the order of all vectors.
    """

    paper = CARD

    def __init__(self, config: DDKConfig, domains: tuple[str, ...]):
        super().__init__(
            domains,
            config.ddk_interval,
            divergence=DIRECTIONS[config.ddk_direction](config.temperature),
            kd_weight=config.distil_gamma,
            label_weight=1.0,
        )
        self.config = config
        self.state["factors"] = torch.zeros(len(domains))  # r_t; interval 0 is drawn in natural proportions

    def start(self, natural: Tensor) -> None:
        choices = {
            "eq1": lambda: initial_domain_weights(self.state["student_ppl"], self.state["teacher_ppl"]),
            "uniform": lambda: torch.full_like(natural, 1 / len(natural)),
            "natural": lambda: natural,
        }
        self.state["factors"] = choices[self.config.ddk_init]()

    def next_weights(self) -> Tensor:
        state = self.state
        state["factors"] = update_domain_weights(
            state["factors"], state["student_ppl"], state["teacher_ppl"], self.config.ddk_alpha
        )
        return state["factors"]


def build_trainer(student, teacher, train_dataset, config: DDKConfig, args, *, eval_dataset=None, **trainer_arguments):
    """A DomainMixtureTrainer for this method; `args` is a DistillSFTConfig.

    Args:
        train_dataset: with the column `ddk_domain_column`.
        eval_dataset: {domain: rows}, or rows with that column, of which the first `ddk_eval_samples` of each domain
            count. None holds out `ddk_eval_samples` rows of each domain, by the run's seed, and says so.
    """
    from hf_distill.training.domains import DomainMixtureTrainer

    column = config.ddk_domain_column
    train = split_by_domain(train_dataset, column)
    if eval_dataset is None:
        train, eval_dataset = hold_out(train, config.ddk_eval_samples, 42 if args is None else args.seed)
        train_dataset = with_domains(train, column)
    elif not isinstance(eval_dataset, dict):
        parts = split_by_domain(eval_dataset, column, "eval")
        eval_dataset = {name: d.select(range(min(len(d), config.ddk_eval_samples))) for name, d in parts.items()}
    return DomainMixtureTrainer(
        student,
        teacher=teacher,
        objective=DDK(config, tuple(train)),
        domain_column=column,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        **trainer_arguments,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
