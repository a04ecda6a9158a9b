"""ND: the student's embedding grows long in the direction of the teacher's mean embedding of its class.

    ND = mean_i [1 - (f_s · c_y / |c_y|) / max(|f_s|, |f_t|)]

is added to any loss of classification: on KD it gives KD++, on DKD DKD++, on DIST DIST++. The class means c are taken
in one pass of the teacher over the training set. f is the input of the last linear layer ("embedding" of
`hf_distill.taps`): BERT's pooled output after dropout, ViT's normed [CLS], a ResNet's flattened average. The length of
what a LayerNorm puts out (ViT) is nearly fixed by its gains, so there ND mostly turns the student.

    accelerate launch recipes/nd_loss.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

In Python it is added to whatever there is: `objective = OBJECTIVES["review"]() + 2.0 * NDLoss()`, and once the trainer
is made, `measure_class_means(trainer)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, one_hot

from hf_distill.baselines import CRD, OBJECTIVES, Baseline
from hf_distill.baselines.probe import probe
from hf_distill.curricula.passes import run_pass
from hf_distill.losses.precision import exactly, unit
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals
from hf_distill.taps import EMBEDDING, tap

NORMALISES = "its projector normalises over the batch (BatchNorm)"

CARD = MethodCard(
    slug="nd_loss",
    title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
    arxiv="2305.17007",
    year=2023,
    kind="features",
    modality="image",
    citation="""@misc{wang2023improving,
  title = {Improving Knowledge Distillation via Regularizing Feature Norm and Direction},
  author = {Yuzhu Wang and Lechao Cheng and Manni Duan and Yongheng Wang and Zunlei Feng and Shu Kong},
  year = {2023}, eprint = {2305.17007}, archivePrefix = {arXiv}
}""",
    couples_batch=NORMALISES + ", where the embeddings differ in width",
)

BASES = tuple(name for name, kind in OBJECTIVES.items() if issubclass(kind, Baseline) and kind is not CRD)
PROJECTORS = ("auto", "linear")
# which base takes which setting
OPTIONS = {
    "kd": {"temperature": "temperature"},
    "dkd": {"temperature": "temperature", "alpha": "dkd_alpha", "beta": "dkd_beta"},
    "dist": {"temperature": "temperature"},
    "nkd": {"temperature": "temperature"},
}
WITH_MEAN = "with_mean"  # the unit of examples whose class has a mean


@dataclass
class NDLossConfig:
    """Defaults are KD++ of ResNet56 to ResNet20 on CIFAR-100; on ImageNet temperature 1, warmup 5 / 100."""

    nd_weight: float = field(default=2.0, metadata={"help": "Weight of ND; 0.5 to 4 in the paper."})
    base: str = field(default="kd", metadata={"help": f"The loss it is added to, one of {', '.join(BASES)}."})
    kd_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the base's terms. Default: 1 for kd (1 to 4 in the paper), else its own."},
    )
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    warmup: float = field(
        default=20 / 240, metadata={"help": "Share of training over which the base's terms (not ND) grow from 0."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Of kd, dkd, dist and nkd. Default: the base's own (4; nkd 1)."}
    )
    dkd_alpha: float = field(default=1.0, metadata={"help": "dkd: weight of the target part (DKD++: 2)."})
    dkd_beta: float = field(default=8.0, metadata={"help": "dkd: weight of the non-target part."})
    projector: str = field(
        default="auto",
        metadata={"help": "Where widths differ: auto (the paper's BatchNorm, dropout 0.5, linear) or linear alone."},
    )
    student_layer: str = field(default=EMBEDDING, metadata={"help": "Tap of the student's embedding."})
    teacher_layer: str = field(default=EMBEDDING, metadata={"help": "Tap of the teacher's embedding."})

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, not negative, got {value}")
        if self.base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {self.base!r}")
        build_objective(self)  # what else is wrong is said before any model is loaded


@exactly
def nd_loss(student_embedding: Tensor, teacher_embedding: Tensor, labels: Tensor, class_means: Tensor) -> Tensor:
    """Mean over the batch of 1 - (f_s · c_y / |c_y|) / max(|f_s|, |f_t|), without a weight.

    A short student is drawn to grow along the class mean; one as long as its teacher only turns towards it. Examples
    of a class without a mean (a zero row) do not count; without any other the loss is 0.

    Args:
        student_embedding, teacher_embedding: (B, D); the teacher's is a constant.
        labels: (B,) classes, or (B, C) probabilities, which weigh the class means (mixup).
        class_means: (C, D), a constant.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> f = torch.tensor([[3.0, 0.0]])
        >>> nd_loss(f / 2, f, torch.tensor([0]), torch.tensor([[5.0, 0.0]])).item()
        0.5
    """
    if student_embedding.dim() != 2 or student_embedding.shape != teacher_embedding.shape:
        raise ValueError(
            f"the embeddings must both be (batch, width), got {tuple(student_embedding.shape)} and "
            f"{tuple(teacher_embedding.shape)}: project the student's first"
        )
    if class_means.dim() != 2 or class_means.shape[1] != student_embedding.shape[1]:
        raise ValueError(f"class means must be (classes, {student_embedding.shape[1]}), got {tuple(class_means.shape)}")
    centre = unit(_centres(labels, class_means.detach()))
    longest = torch.maximum(student_embedding.norm(dim=-1), teacher_embedding.detach().norm(dim=-1))
    cosine = (student_embedding * centre).sum(-1) / longest.where(longest > 0, 1.0)
    counts = (centre != 0).any(-1)
    return (1 - cosine).where(counts, 0.0).sum() / counts.sum().clamp(min=1)


def class_sums(embedding: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Per class the sum (C, D) of embeddings (B, D), and how many there are (C,), in float64; soft labels weigh."""
    member = (labels if labels.is_floating_point() else one_hot(labels, classes)).double()
    return {"sum": member.T @ embedding.double(), "count": member.sum(0)}


def measure_class_means(trainer) -> None:
    """Give the trainer's NDLoss its class means, from one pass of the teacher over the training set (kept on disk)."""
    classes = trainer.model.config.num_labels
    for _, _, objective in trainer.objective.leaves():
        if not isinstance(objective, NDLoss):
            continue
        path = objective.layers[1]

        def measure(signals: Signals, path=path) -> dict[str, Tensor]:
            return class_sums(_pooled(signals.features[path], path), signals.labels, classes)

        sums = run_pass(trainer, f"class_means_{classes}", measure, needs=frozenset({tap(path)}))
        means = sums["sum"] / sums["count"].clamp(min=1e-12)[:, None]
        objective.set_class_means(means.float().to(trainer.args.device))


class NDLoss(Objective):
    """ND as a term to add to any objective of classification; needs `measure_class_means` or `set_class_means`.

    Where the two widths differ, the student's embedding goes through a trained projector.

    Beside `nd` it logs, with weight 0, the mean lengths of both embeddings (the student's projected) and the mean
    cosine of the student's with its class mean.

    Args:
        projector: "auto", the paper's BatchNorm, dropout 0.5 and linear map; or "linear", which leaves examples apart.
        layers: taps of student and teacher.

    Raises:
        ValueError: an unknown projector; embeddings that are not (B, D); class means that were not measured.
    """

    per = {"nd": WITH_MEAN, "student_norm": "sample", "teacher_norm": "sample", "cosine": WITH_MEAN}
    paper = CARD

    def __init__(self, *, projector: str = "auto", layers: tuple[str, str] = (EMBEDDING, EMBEDDING)):
        super().__init__()
        if projector not in PROJECTORS:
            raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}, got {projector!r}")
        self.kind, self.layers = projector, tuple(layers)
        self.projector: nn.Module | None = None
        self._without_mean: Tensor | None = None  # classes, on the host

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(tap(path, side) for path, side in zip(self.layers, ("student", "teacher"), strict=True))

    def setup(self, student: nn.Module, teacher) -> None:
        if self.projector is not None:
            return
        ours, theirs = probe(student, teacher, *(self.needs_of(side) for side in ("student", "teacher")))
        pairs = zip((ours, theirs), self.layers, strict=True)
        narrow, wide = (_pooled(signals.features[path], path).shape[1] for signals, path in pairs)
        if narrow == wide:
            self.projector = nn.Identity()
        elif self.kind == "linear":
            self.projector = nn.Linear(narrow, wide)
        else:
            self.projector = EmbeddingProjector(narrow, wide)
            self.couples_batch = NORMALISES

    def set_class_means(self, means: Tensor) -> None:
        """Class means (C, D_t) on the model's device; a row of zeros stands for a class without examples."""
        self.state["class_means"] = means.float()
        empty = (means == 0).all(-1).nonzero().flatten().cpu()
        self._without_mean = empty if len(empty) else None

    def count(self, batch: dict) -> dict[str, int]:
        labels = batch.get("labels")
        if labels is None or batch.get("only_repeats"):
            return {WITH_MEAN: 0}
        if self._without_mean is None or labels.is_floating_point():
            return {WITH_MEAN: len(labels)}
        return {WITH_MEAN: int((~torch.isin(labels.cpu(), self._without_mean)).sum())}

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        if "class_means" not in self.state:
            raise ValueError("NDLoss has no class means: call measure_class_means(trainer) before training")
        if student.labels is None or student.rows is not None:
            raise ValueError("NDLoss needs one label per example in the batch: it is for classification")
        ours, theirs = (
            _pooled(signals.features[path], path) for signals, path in zip((student, teacher), self.layers, strict=True)
        )
        ours = self.projector(ours.to(next(self.parameters(), ours).dtype))
        means = self.state["class_means"]
        with torch.no_grad():
            centre = unit(_centres(student.labels, means))
            cosine = (unit(ours.float()) * centre).sum(-1).sum() / (centre != 0).any(-1).sum().clamp(min=1)
        return {
            "nd": nd_loss(ours, theirs, student.labels, means),
            "student_norm": ours.detach().float().norm(dim=-1).mean(),
            "teacher_norm": theirs.detach().float().norm(dim=-1).mean(),
            "cosine": cosine,
        }

    def weights(self, progress: float) -> dict[str, float]:
        return {"nd": 1.0, "student_norm": 0.0, "teacher_norm": 0.0, "cosine": 0.0}


class EmbeddingProjector(nn.Module):
    """BatchNorm, dropout 0.5 and a linear map, (B, D_s) -> (B, D_t).

    A batch of one example has no spread: it is normalised by the running statistics and leaves them as they are.
    """

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.norm, self.dropout, self.linear = nn.BatchNorm1d(narrow), nn.Dropout(0.5), nn.Linear(narrow, wide)

    def forward(self, embedding: Tensor) -> Tensor:
        if len(embedding) > 1:
            normed = self.norm(embedding)
        else:
            norm = self.norm
            normed = batch_norm(embedding, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return self.linear(self.dropout(normed))


def _centres(labels: Tensor, class_means: Tensor) -> Tensor:
    return labels.to(class_means) @ class_means if labels.is_floating_point() else class_means[labels]


def _pooled(embedding: Tensor, path: str) -> Tensor:
    if embedding.dim() != 2:
        raise ValueError(f"{path!r} gives {tuple(embedding.shape)}, not one embedding (batch, width) per example")
    return embedding


def build_objective(config: NDLossConfig) -> Objective:
    """The base's objective and ND."""
    options = {name: getattr(config, ours) for name, ours in OPTIONS.get(config.base, {}).items()}
    weight = 1.0 if config.kd_weight is None and config.base == "kd" else config.kd_weight
    given = options | {"weight": weight}
    given = {name: value for name, value in given.items() if value is not None}
    base = OBJECTIVES[config.base](label_weight=config.label_weight, warmup=config.warmup, **given)
    layers = (config.student_layer, config.teacher_layer)
    return base + config.nd_weight * NDLoss(projector=config.projector, layers=layers)


def build_trainer(student, teacher, train_dataset, config: NDLossConfig, args, **trainer_arguments):
    """A trainer for this method; the class means are measured here, or read where they were before."""
    from hf_distill.training.trainers import trainer_for

    trainer = trainer_for(args)(
        student,
        teacher=teacher,
        objective=build_objective(config),
        args=args,
        train_dataset=train_dataset,
        **trainer_arguments,
    )
    measure_class_means(trainer)
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
