"""SinKD: the student's distributions of a whole batch are moved onto the teacher's, as a set, at the least cost.

Where two distributions hardly overlap, KL divergences give a gradient that is huge or none; a transport cost between
sets does not, and it sees the relations between the examples. Beside the usual KD:

    D_ij = Σ_c |x_ic - y_jc|,  x, y = softmax(student / tau), softmax(teacher / tau)
    P    = exp(-D / eps), 20 times rows and then columns brought to sum 1       SD = Σ_ij P_ij D_ij
    L    = alpha · CE(teacher, student; T) + (1 - alpha) · CE(labels) + beta · s · SD

    accelerate launch recipes/sinkd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
    accelerate launch recipes/sinkd_language.py ...                     # language models

Encoder-decoders go through `build_trainer` with a DistillConfig. The numbers are those of the paper's scripts for GLUE
(for T0 and GPT-Neo: `--kd_weight 0.1 --label_weight 1 --kd_temperature 1 --sinkhorn_weight 1 --sinkhorn_scale 0.0008`).
Ours: T = 2 (they choose 1 to 4 per task); which rows and entries of language models are compared; kd_anneal in runs
that are counted in steps; an MSE on the labels of a regression.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from hf_distill.baselines.contrastive import gather_rows
from hf_distill.curricula.draws import GOLDEN, mix
from hf_distill.heads import base_model_of, has_row_labels
from hf_distill.losses import Divergence, LabelCrossEntropy, SoftCrossEntropy, soft_cross_entropy
from hf_distill.losses.precision import exactly
from hf_distill.losses.source import pick
from hf_distill.losses.transport import (
    log_probs_of,
    row_error,
    sinkhorn_cost,
    sinkhorn_distance,
    sinkhorn_plan,
    top_entries,
    topk_cost,
)
from hf_distill.methods._card import MethodCard
from hf_distill.methods.trg import with_other_ranks
from hf_distill.objectives import Objective
from hf_distill.signals import SampledLogits, Signals, SparseLogits

logger = logging.getLogger(__name__)

COUPLES = "moves the rows of a micro-batch onto each other (optimal transport): its sum depends on which of them meet"
CARD = MethodCard(
    slug="sinkd",
    title="Sinkhorn Distance Minimization for Knowledge Distillation",
    arxiv="2402.17110",
    year=2024,
    kind="logits",
    modality="text-classification",
    couples_batch=COUPLES,
    citation="""@inproceedings{cui2024sinkd,
  title = {Sinkhorn Distance Minimization for Knowledge Distillation},
  author = {Xiao Cui and Yulei Qin and Yuting Gao and Enwei Zhang and Zihan Xu and Tong Wu and Ke Li and Xing Sun and
            Wengang Zhou and Houqiang Li},
  booktitle = {Joint International Conference on Computational Linguistics, Language Resources and Evaluation},
  year = {2024}, eprint = {2402.17110}, archivePrefix = {arXiv}
}""",
)
REDUCTIONS = ("sum", "mean")
MEASURES = ("sinkhorn_cost_diagonal", "sinkhorn_plan_diagonal", "sinkhorn_row_error")


@dataclass
class SinKDConfig:
    """Numbers of the paper's GLUE scripts where not said otherwise."""

    sinkhorn_weight: float = field(default=0.8, metadata={"help": "Weight beta of the transport cost."})
    sinkhorn_scale: float = field(
        default=1e-3, metadata={"help": "Factor s of the cost, a sum over rows: times the batch is what compares."}
    )
    sinkhorn_temperature: float = field(default=2.0, metadata={"help": "Softmax temperature tau of the cost."})
    sinkhorn_epsilon: float = field(default=0.1, metadata={"help": "Entropy of the plan; the cost is 0 to 2."})
    sinkhorn_iters: int = field(default=20, metadata={"help": "Sinkhorn iterations."})
    sinkhorn_reduction: str = field(
        default="sum", metadata={"help": "sum over rows, as the official code, or mean: divided by their number."}
    )
    sinkhorn_top_k: int = field(
        default=64,
        metadata={"help": "Language models: entries of each teacher row that are compared; the rest is one entry."},
    )
    sinkhorn_max_rows: int = field(
        default=256, metadata={"help": "Rows of a micro-batch (of all ranks, if gathered) that are compared, drawn."}
    )
    sinkhorn_seed: int = field(default=0, metadata={"help": "Seed of the drawn rows."})
    sinkhorn_tolerance: float = field(
        default=0.1, metadata={"help": "Warn once where the plan's rows miss sum 1 by more than this on average."}
    )
    gather_across_ranks: bool = field(
        default=False, metadata={"help": "Compare the rows of all ranks; a sum is divided by the number of ranks."}
    )
    kd_weight: float = field(default=0.9, metadata={"help": "Weight alpha of the cross-entropy with the teacher."})
    label_weight: float | None = field(
        default=None, metadata={"help": "Weight of the cross-entropy with the labels. Default: 1 - kd_weight."}
    )
    kd_temperature: float = field(
        default=2.0,
        metadata={"help": "Temperature T of the cross-entropy with the teacher, without T² (paper: 1 to 4)."},
    )
    kd_anneal: bool = field(default=False, metadata={"help": "Bring T to 1 over training, epoch by epoch."})

    def __post_init__(self):
        for name in ("sinkhorn_temperature", "sinkhorn_epsilon", "kd_temperature", "sinkhorn_tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("sinkhorn_weight", "sinkhorn_scale", "kd_weight", "label_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name in ("sinkhorn_iters", "sinkhorn_top_k", "sinkhorn_max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sinkhorn_reduction not in REDUCTIONS:
            raise ValueError(f"sinkhorn_reduction must be sum or mean, got {self.sinkhorn_reduction!r}")
        if self.label_weight is None and self.kd_weight > 1:
            raise ValueError(f"kd_weight={self.kd_weight} leaves 1 - kd_weight for the labels: give label_weight")
        if not any((self.kd_weight, self.weight_of_labels, self.sinkhorn_weight * self.sinkhorn_scale)):
            raise ValueError("all weights are zero: give kd_weight, label_weight or sinkhorn_weight a positive value")

    @property
    def weight_of_labels(self) -> float:
        return 1 - self.kd_weight if self.label_weight is None else self.label_weight


@exactly
def sinkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    kd_weight: float = 0.9,
    sinkhorn_weight: float = 0.8,
    kd_temperature: float = 2.0,
    sinkhorn_scale: float = 1e-3,
    sinkhorn_temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """alpha · CE(teacher, student; T) + (1 - alpha) · CE(labels) + beta · s · SD; the first two are means over rows.

    With one output, a regression: alpha · MSE(student, teacher) / T + (1 - alpha) · MSE(labels), without SD.

    Args:
        student_logits, teacher_logits: (B, C); the teacher's are a constant.
        labels: (B,) classes, or values of a regression.

    Raises:
        ValueError: as `sinkhorn_distance`.
    """
    if student_logits.shape[-1] == 1:
        label, kd = regression_losses(student_logits, teacher_logits, labels, kd_temperature)
        return kd_weight * kd + (1 - kd_weight) * label
    distance = sinkhorn_distance(student_logits, teacher_logits, sinkhorn_temperature, epsilon, iterations)
    kd = soft_cross_entropy(student_logits, teacher_logits, temperature=kd_temperature)
    label = cross_entropy(student_logits, labels)
    return kd_weight * kd + (1 - kd_weight) * label + sinkhorn_weight * sinkhorn_scale * distance


@exactly
def regression_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(MSE with the labels, MSE with the teacher over T) of single outputs (B, 1)."""
    ours = student_logits.flatten()
    label = mse_loss(ours, labels.flatten().to(ours))
    return label, mse_loss(ours, teacher_logits.detach().flatten()) / temperature


class SinKD(Objective):
    """Both cross-entropies, and the transport cost of each micro-batch.

    Classifiers are compared on all classes. Rows of language models are tokens; `sinkhorn_max_rows` of them are drawn
    by (seed, step), the same places in every micro-batch and rank, and each teacher row is compared on its own
    `sinkhorn_top_k` entries and the rest, so a cached top-k teacher of the same temperature says as much as a live one.

    The cost couples a micro-batch: two of half the size are not one. With `gather_across_ranks` the rows of all ranks
    are one set, and each rank gives the gradient by its own (a repeated example of a ragged end counts as a row).

    With weight 0 it logs the mean cost and the mean plan of a row and its own teacher row, and `sinkhorn_row_error`.

    Args:
        epochs: E of kd_anneal, T(e) = T + (1 - T) · e / (E - 1); None moves T at every step.

    Raises:
        ValueError: a teacher whose logits give no distances (draws, top-k of another temperature).
    """

    paper = CARD
    couples_batch = COUPLES
    per = {"sinkhorn": "batch"} | dict.fromkeys(MEASURES, "batch")

    def __init__(self, config: SinKDConfig | None = None, epochs: int | None = None):
        super().__init__()
        self.config, self.epochs, self.regression = config or SinKDConfig(), epochs, False
        self.state = {"step": torch.zeros((), dtype=torch.int64)}
        self._row_error, self._steps, self._warned = 0.0, 0, False  # sum and count since the last log
        self._temperature = self.temperature_at(0.0)

    def setup(self, student: nn.Module, teacher) -> None:
        self.regression = not has_row_labels(student) and base_model_of(student).config.num_labels == 1

    def temperature_at(self, progress: float) -> float:
        """T of the cross-entropy with the teacher."""
        start = self.config.kd_temperature
        if not self.config.kd_anneal:
            return start
        if self.epochs is None:
            return start + (1 - start) * progress
        epoch = min(int(progress * self.epochs + 1e-6), self.epochs - 1)
        return start + (1 - start) * epoch / max(self.epochs - 1, 1)

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        if self.regression:
            return {}
        return {"label": LabelCrossEntropy(), "kd": SoftCrossEntropy(self.temperature_at(progress))}

    def weights(self, progress: float) -> dict[str, float]:
        c = self.config
        own = {"label": c.weight_of_labels, "kd": c.kd_weight, "sinkhorn": c.sinkhorn_weight * c.sinkhorn_scale}
        return own | dict.fromkeys(MEASURES, 0.0)

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        self._temperature = self.temperature_at(progress)
        if self.regression:
            given = student.logits, teacher.logits, student.labels
            return dict(zip(("label", "kd"), regression_losses(*given, self._temperature), strict=True))
        cost = self._cost(student, teacher)
        return self._transport(with_other_ranks(cost) if self.config.gather_across_ranks else cost)

    @property
    def _ranks(self) -> int:
        """Whose rows are one set."""
        distributed = torch.distributed
        gathers = self.config.gather_across_ranks and distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size() if gathers else 1

    def _cost(self, student: Signals, teacher: Signals) -> Tensor:
        """(rows here, rows compared with) costs."""
        c = self.config
        ours, theirs = student.logits, teacher.logits
        gather = gather_rows if c.gather_across_ranks else lambda x: x
        index = self._drawn(student)
        if index is not None:
            ours, theirs = pick(ours, index), pick(theirs, index)
        if student.rows is None and not isinstance(theirs, (SparseLogits, SampledLogits)):
            if not torch.is_tensor(theirs):  # several teachers
                theirs = log_probs_of(theirs, slice(None), c.sinkhorn_temperature) * c.sinkhorn_temperature
            return sinkhorn_cost(ours, gather(theirs), c.sinkhorn_temperature)
        width, tile_bytes = ours.shape[-1], self.engine.get("tile_bytes")
        if not isinstance(theirs, SparseLogits):
            width = min(width, theirs.shape[-1])
        support = top_entries(theirs, c.sinkhorn_top_k, c.sinkhorn_temperature, width, tile_bytes)
        support = SparseLogits(gather(support.ids), gather(support.log_probs))
        return topk_cost(ours, support, c.sinkhorn_temperature, width, tile_bytes)

    def _drawn(self, student: Signals) -> Tensor | None:
        """Places of the rows that are compared, in their order; None for all."""
        most = max(self.config.sinkhorn_max_rows // self._ranks, 1)
        index = None if student.mask is None else student.mask.nonzero().flatten()
        count = student.logits.shape[0] if index is None else len(index)
        if count <= most:
            return index
        step = self.state["step"] * int(self.training)  # evaluation draws the same at every step
        key = mix(step + self.config.sinkhorn_seed * GOLDEN)
        places = mix(key + GOLDEN * torch.arange(1, count + 1, device=key.device)).argsort()[:most].sort().values
        return places if index is None else index[places]

    @exactly
    def _transport(self, cost: Tensor) -> dict[str, Tensor]:
        c, ranks = self.config, self._ranks
        plan = sinkhorn_plan(cost, c.sinkhorn_epsilon, c.sinkhorn_iters)
        value = (plan * cost).sum() / (ranks if c.sinkhorn_reduction == "sum" else max(len(cost), 1))
        # the mean over ranks is a ranks-th of the sum of their gradients, each by its own rows only
        value = value + (ranks - 1) * (value - value.detach())
        measured = cost.detach().diagonal().mean(), plan.detach().diagonal().mean(), row_error(plan)
        return {"sinkhorn": value} | dict(zip(MEASURES, measured, strict=True))

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        self.state["step"] = self.state["step"] + 1
        if "sinkhorn_row_error" in terms:
            self._row_error, self._steps = self._row_error + terms["sinkhorn_row_error"], self._steps + 1

    def logs(self) -> dict[str, float]:
        error, c = float(self._row_error) / max(self._steps, 1), self.config
        self._row_error, self._steps = 0.0, 0
        if error > c.sinkhorn_tolerance and not self._warned:
            self._warned = True
            logger.warning(
                "Sinkhorn has not converged after %d iterations: rows of the plan miss sum 1 by %.3f on average "
                "(sinkhorn_tolerance %g). Raise sinkhorn_iters or sinkhorn_epsilon; training goes on",
                *(c.sinkhorn_iters, error, c.sinkhorn_tolerance),
            )
        return {"kd_temperature": self._temperature} if self.config.kd_anneal else {}


def build_trainer(student, teacher, train_dataset, config: SinKDConfig, args, **trainer_arguments):
    """A trainer for this method: DistillTrainer for DistillConfig, DistillSFTTrainer for DistillSFTConfig."""
    from hf_distill.training.trainers import trainer_for

    epochs = None if args.max_steps > 0 else math.ceil(args.num_train_epochs)
    return trainer_for(args)(
        student,
        teacher=teacher,
        objective=SinKD(config, epochs),
        args=args,
        train_dataset=train_dataset,
        **trainer_arguments,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
