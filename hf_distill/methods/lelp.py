"""LELP: each class is split into S subclasses along directions of the teacher's last embedding.

For tasks of few classes: with two to five, a teacher's probabilities say little. One pass over the training set gives,
per class, the principal directions of the embeddings outside what the teacher's head reads; rotated at random to even
out their variances, they say how far an example belongs to each of S pseudo-subclasses. The student learns the S · C
probabilities by one cross-entropy; the teacher is not trained.

Two ways out for the student. "stock", the default: the S · C head is a part of the objective, the student's own head
follows the class probabilities it implies, without a gradient into the rest of the student, and what leaves is a plain
model with C outputs. "subclasses": the student keeps its S · C head and is exact, a class of its own that loads after
`import hf_distill.students` (see `students.heads`).

The order of steps is confirmed by several readings of the paper; seen in none and ours are S = 5, beta = 1, T = 1, the
signs of directions, the scale r_c of scores, and the following head.

    accelerate launch recipes/lelp.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_distill.baselines.probe import model_of
from hf_distill.heads import base_model_of
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals, upcast
from hf_distill.students.heads import (
    SubclassHead,
    check_last_layer,
    class_logits,
    pooled_rows,
    subclass_head,
    with_subclasses,
)
from hf_distill.taps import EMBEDDING, classifier_of, tap

CARD = MethodCard(
    slug="lelp",
    title="Linear Projections of Teacher Embeddings for Few-Class Distillation",
    arxiv="2409.20449",
    year=2024,
    kind="logits",
    modality="text-classification",
    citation="""@misc{loo2024lelp,
  title = {Linear Projections of Teacher Embeddings for Few-Class Distillation},
  author = {Noel Loo and Fotis Iliopoulos and Wei Hu and Erik Vee},
  year = {2024}, eprint = {2409.20449}, archivePrefix = {arXiv}
}""",
)
EXPORTS = ("stock", "subclasses")


@dataclass
class LELPConfig:
    """Numbers are ours: the paper tunes subclasses and beta per task, and finds that both matter."""

    lelp_num_subclasses: int = field(default=5, metadata={"help": "Subclasses per class, S."})
    lelp_beta: float = field(default=1.0, metadata={"help": "Temperature of the softmax over a class's subclasses."})
    lelp_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T of the student's outputs and the teacher's class logits."}
    )
    lelp_null_space: bool = field(
        default=True, metadata={"help": "Leave out of the embeddings what the teacher's head reads."}
    )
    lelp_rotation_seed: int = field(default=0, metadata={"help": "Seed of the rotation of each class's directions."})
    lelp_alpha: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    lelp_export: str = field(
        default="stock",
        metadata={"help": "stock: a plain model whose head follows; subclasses: the S * C head, exact."},
    )

    def __post_init__(self):
        if self.lelp_num_subclasses < 1:
            raise ValueError(f"lelp_num_subclasses must be at least 1, got {self.lelp_num_subclasses}")
        for name in ("lelp_beta", "lelp_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.lelp_alpha < math.inf:
            raise ValueError(f"lelp_alpha must not be negative, got {self.lelp_alpha}")
        if self.lelp_export not in EXPORTS:
            raise ValueError(f"lelp_export must be {' or '.join(EXPORTS)}, got {self.lelp_export!r}")


# ---- pure functions --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LELPFit:
    """Affine scores of subclasses: z_c(h) = h · directions[c] - offset[c].

    Attributes:
        directions: (C, D, S), the rotated principal directions A_c over r_c.
        offset: (C, S), the scores of each class's mean embedding.
    """

    directions: Tensor
    offset: Tensor

    def scores(self, embeddings: Tensor) -> Tensor:
        """(B, C, S) of embeddings (B, D)."""
        return torch.einsum("bd,cds->bcs", embeddings, self.directions.to(embeddings)) - self.offset.to(embeddings)


def lelp_moments(embeddings: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Per class: how many, the sum of embeddings (C, D) and of their outer products (C, D, D), in float64."""
    embeddings = embeddings.detach().double()
    labels = labels.argmax(-1) if labels.is_floating_point() else labels
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    member = (labels[:, None] == torch.arange(classes, device=labels.device)).double()
    second = (member.T[:, None, :] * embeddings.T) @ embeddings
    return {"count": member.sum(0), "sum": member.T @ embeddings, "second": second}


def fit_moments(
    moments: dict[str, Tensor],
    head_weight: Tensor,
    num_subclasses: int = 5,
    null_space: bool = True,
    rotations: Tensor | None = None,
    seed: int = 0,
) -> LELPFit:
    """The fit from `lelp_moments` (sums over parts of the data may be added up); see `lelp_fit`."""
    count, total, second = (moments[name].double().cpu() for name in ("count", "sum", "second"))
    (classes, width), subclasses = total.shape, num_subclasses
    basis = torch.eye(width, dtype=torch.float64)
    if null_space:
        _, size, rows = torch.linalg.svd(head_weight.detach().double().cpu())
        basis = rows[int((size > 1e-10 * size.max()).sum()) :].T
    if basis.shape[1] < subclasses:
        raise ValueError(
            f"embeddings of width {width} have {basis.shape[1]} directions that the head does not read: "
            f"lelp_num_subclasses={subclasses} is too many"
        )
    few = (count <= subclasses).nonzero().flatten().tolist()
    if few:
        held = ", ".join(f"class {c} has {int(count[c])}" for c in few)
        raise ValueError(f"{subclasses} subclasses need more than {subclasses} examples of every class, {held}")
    mean = total / count[:, None]
    covariance = second / count[:, None, None] - mean[:, :, None] * mean[:, None, :]
    size, vectors = torch.linalg.eigh(basis.T @ covariance @ basis)
    size, vectors = size[:, -subclasses:].flip(-1), basis @ vectors[:, :, -subclasses:].flip(-1)
    largest = vectors.take_along_dim(vectors.abs().argmax(1, keepdim=True), 1)
    vectors = vectors * largest.sign()
    # rotating does not change the mean square over all S scores of a class: that of its directions
    rms = size.clamp(min=0).mean(-1).sqrt()
    length = (second.diagonal(dim1=1, dim2=2).sum(-1) / count).sqrt()
    if not (rms > 1e-7 * length).all():
        same = (~(rms > 1e-7 * length)).nonzero().flatten().tolist()
        raise ValueError(f"the teacher's embeddings of class {same} are all alike: there is nothing to split")
    rotations = random_rotations(classes, subclasses, seed) if rotations is None else rotations.double().cpu()
    directions = vectors @ rotations / rms[:, None, None]
    return LELPFit(directions, torch.einsum("cd,cds->cs", mean, directions))


def lelp_fit(
    embeddings: Tensor,
    labels: Tensor,
    head_weight: Tensor,
    num_subclasses: int = 5,
    null_space: bool = True,
    rotations: Tensor | None = None,
    seed: int = 0,
) -> LELPFit:
    """Directions that split each class: PCA of its embeddings, rotated, scores divided by their RMS over the class.

    Args:
        embeddings: (n, D), what the teacher's last linear layer reads.
        labels: (n,) classes, or (n, C) probabilities, of which the largest counts.
        head_weight: (C, D); (1, D) of a teacher with one output stands for two classes.
        null_space: leave out the directions that the head reads.
        rotations: (C, S, S) orthogonal; None draws them by `seed`.

    Raises:
        ValueError: a class with no more than S examples, or whose embeddings are all alike; too few directions.
    """
    moments = lelp_moments(embeddings, labels, max(len(head_weight), 2))
    return fit_moments(moments, head_weight, num_subclasses, null_space, rotations, seed)


def random_rotations(classes: int, size: int, seed: int) -> Tensor:
    """(C, S, S) orthogonal float64 matrices, evenly distributed."""
    draw = torch.randn(classes, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]


@exactly
def lelp_targets(
    fit: LELPFit, embeddings: Tensor, teacher_logits: Tensor, beta: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """(B, C * S), index c * S + s: softmax(t / T)_c · softmax_s(z_c / beta).

    Args:
        teacher_logits: (B, C); (B, 1) stands for two classes, the first with logit 0.
    """
    if teacher_logits.shape[-1] == 1:
        teacher_logits = torch.cat([torch.zeros_like(teacher_logits), teacher_logits], -1)
    classes = (teacher_logits / temperature).softmax(-1)
    within = (fit.scores(embeddings) / beta).softmax(-1)
    return (classes[..., None] * within).flatten(1).detach()


@exactly
def lelp_loss(student_outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · mean_i -Σ targets · log softmax(outputs / T), both (B, C * S)."""
    if student_outputs.shape != targets.shape:
        raise ValueError(
            f"outputs {tuple(student_outputs.shape)} and targets {tuple(targets.shape)} must have one shape: the head "
            "has another number of subclasses than the fit"
        )
    return -(temperature**2) * (targets.detach() * (student_outputs / temperature).log_softmax(-1)).sum(-1).mean()


@exactly
def lelp_class_probs(student_outputs: Tensor, num_subclasses: int) -> Tensor:
    """(B, C): the sum of each class's subclasses, of outputs (B, C * S)."""
    return student_outputs.softmax(-1).unflatten(-1, (-1, num_subclasses)).sum(-1)


# ---- the objective ---------------------------------------------------------------------------------------------------
class LELP(Objective):
    """Cross-entropy with the subclass targets, and where the student has no S · C head, that head and a follower.

    `fit` must see the training set before the first step; `build_trainer` sees to it.

    Raises:
        ValueError: in `setup`, other classes than the teacher's; a teacher that is no single model; logits that are not
            the last linear layer's; a head that is frozen beside adapters.
    """

    paper = CARD
    per = "sample"

    def __init__(self, config: LELPConfig | None = None):
        super().__init__()
        self.config = config or LELPConfig()
        self.head: nn.Linear | None = None  # the S * C outputs of a student that has none
        self.path = EMBEDDING  # of the student: what its last layer reads, or its S * C outputs
        self.fitted = False

    @property
    def needs(self) -> frozenset[str]:
        mine = {"student.logits", tap(self.path, "student")}
        return frozenset({"teacher.logits", tap(EMBEDDING, "teacher"), *mine})

    def setup(self, student: nn.Module, teacher) -> None:
        base, subclasses = base_model_of(student), self.config.lelp_num_subclasses
        module = self._single(teacher)
        self._configs = base.config, module.config
        classes = [base.config.num_labels, (teacher.config or module.config).num_labels]
        if classes[0] != classes[1]:
            raise ValueError(
                f"the student has {classes[0]} classes and the teacher {classes[1]}: give both the same num_labels"
            )
        check_last_layer(module, "teacher")
        own = subclass_head(base)
        head = classifier_of(base) if own is None else base.get_submodule(own)
        if not any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "the student's last layer is frozen: name it in modules_to_save of the adapter's config, "
                'or give task_type="SEQ_CLS"'
            )
        if own is not None:
            if head.num_subclasses != subclasses:
                raise ValueError(f"the student has {head.num_subclasses} subclasses, lelp_num_subclasses={subclasses}")
            self.path = own + ".outputs"
        elif self.head is None:
            check_last_layer(base, "student")
            self.head = SubclassHead.grown_from(head, subclasses).outputs.float()
        self._teacher_weight = classifier_of(module).weight.detach()
        self.fitted = False
        self.state = {
            "directions": torch.zeros(classes[0], self._teacher_weight.shape[1], subclasses),
            "offset": torch.zeros(classes[0], subclasses),
        }

    def _single(self, teacher) -> nn.Module:
        module = None if teacher is None else model_of(teacher)
        if module is None:
            raise ValueError(
                f"LELP reads the embeddings of one model, and {type(teacher).__name__} has none: use a FrozenTeacher"
            )
        return base_model_of(module)

    def fit(self, trainer) -> None:
        """One pass of the teacher over the training set, kept in the output folder; classes are the labels, where the
        data have none the teacher's."""
        from hf_distill.curricula.passes import run_pass

        classes = len(self.state["directions"])

        def measure(signals: Signals) -> dict[str, Tensor]:
            labels = signals.logits.argmax(-1) if signals.labels is None else signals.labels
            return lelp_moments(self._embeddings(signals), labels, classes)

        moments = run_pass(trainer, "lelp", measure, needs=frozenset({"logits", tap(EMBEDDING)}))
        c = self.config
        weight = self._teacher_weight
        fit = fit_moments(moments, weight, c.lelp_num_subclasses, c.lelp_null_space, seed=c.lelp_rotation_seed)
        for name, value in vars(fit).items():
            self.state[name] = value.to(self.state[name])
        self.fitted = True

    def _embeddings(self, teacher: Signals) -> Tensor:
        return pooled_rows(teacher.features[EMBEDDING], teacher.batch, self._configs[1])

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        if not self.fitted:
            raise ValueError("LELP has no directions yet: make the trainer with build_trainer, or call fit(trainer)")
        c = self.config
        fit = LELPFit(self.state["directions"], self.state["offset"])
        targets = lelp_targets(fit, self._embeddings(teacher), teacher.logits, c.lelp_beta, c.lelp_temperature)
        seen = pooled_rows(student.features[self.path], student.batch, self._configs[0])
        outputs = seen if self.head is None else self.head(seen.to(self.head.weight.dtype))
        logits = class_logits(upcast(outputs), c.lelp_num_subclasses)
        terms = {"lelp": lelp_loss(outputs, targets, c.lelp_temperature)}
        if c.lelp_alpha:
            if student.labels is None:
                raise ValueError("lelp_alpha weighs the labels, and the batch has none: set it to 0")
            terms["label"] = cross_entropy(logits, student.labels)
        if self.head is not None:
            terms["follow"] = self._follow(student, logits.detach())
            terms["head_agreement"] = (student.logits.argmax(-1) == logits.argmax(-1)).float().mean()
        within = targets.unflatten(-1, (-1, c.lelp_num_subclasses))
        within = within / within.sum(-1, keepdim=True).clamp(min=1e-30)
        return terms | {"subclass_entropy": -torch.xlogy(within, within).sum(-1).mean()}

    def _follow(self, student: Signals, logits: Tensor) -> Tensor:
        """Cross-entropy of the student's own head with what the S * C head says of the classes; it moves that alone."""
        loss, seen = lelp_loss(student.logits, logits.softmax(-1)), student.features[self.path]
        if not (loss.requires_grad and seen.requires_grad):
            return loss
        (through,) = torch.autograd.grad(loss, seen, retain_graph=True)
        return loss - ((seen - seen.detach()) * through).sum()

    def weights(self, progress: float) -> dict[str, float]:
        return {"label": self.config.lelp_alpha, "head_agreement": 0.0, "subclass_entropy": 0.0}


def two_classes(model: nn.Module) -> None:
    """A classifier with one output as one of two classes, in place: the first class's logit is 0."""
    head = classifier_of(model)
    grown = nn.Linear(head.in_features, 2).to(head.weight)
    with torch.no_grad():
        grown.weight.zero_()[1].copy_(head.weight[0])
        grown.bias.zero_()[1].copy_(0.0 if head.bias is None else head.bias[0])
    model.set_submodule(next(name for name, module in model.named_modules() if module is head), grown)
    grown.requires_grad_(False)
    model.config.num_labels = model.num_labels = 2
    model.config.problem_type = "single_label_classification"


def build_trainer(student, teacher, train_dataset, config: LELPConfig, args, **trainer_arguments):
    """DistillTrainer for this method, with its pass over the training set done; `args` is a DistillConfig."""
    from hf_distill.training.trainers import load_student, teacher_from, trainer_for

    teacher = teacher_from(teacher, args)
    module = None if teacher is None else model_of(teacher)
    if module is not None and base_model_of(module).config.num_labels == 1:
        two_classes(base_model_of(module))
    if config.lelp_export == "subclasses":
        processing_class = trainer_arguments.pop("processing_class", None)
        student, processing_class = load_student(student, args, processing_class, None)
        trainer_arguments["processing_class"] = processing_class
        student = student if subclass_head(student) else with_subclasses(student, config.lelp_num_subclasses)
    objective = LELP(config)
    trainer = trainer_for(args)(
        student, teacher=teacher, objective=objective, args=args, train_dataset=train_dataset, **trainer_arguments
    )
    objective.fit(trainer)
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
