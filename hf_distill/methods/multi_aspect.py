"""MaKD: the student also answers yes/no questions about each picture, as a vision-language model answered them once.

A language model writes questions about aspects of the classes. A vision-language model's P(yes) for each training
picture becomes a soft target (`recipes/multi_aspect_annotate.py`, `curricula.annotation`), which the student learns by
binary cross-entropy beside the classes. No teacher runs in training, unless logit distillation is added on the classes.

    accelerate launch recipes/multi_aspect_annotate.py --dataset_name ... --vlm_name ... --num_questions 50
    accelerate launch recipes/multi_aspect.py --model_name_or_path ... --dataset_name ...

The aspect head is a second linear layer on the same pooled feature, which equals the paper's classifier of C + Q
outputs; so the student that leaves has C. Paper: the official evaluation lets aspect logits win the argmax; here they
cannot.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import TrainerCallback, default_data_collator

from hf_distill.baselines.contrastive import gather_rows
from hf_distill.curricula.annotation import COLUMN
from hf_distill.curricula.collators import CACHED, DataCollatorForDistillation
from hf_distill.heads import base_model_of
from hf_distill.losses import kd_loss
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals, upcast
from hf_distill.taps import EMBEDDING, classifier_of, tap

logger = logging.getLogger(__name__)

CARD = MethodCard(
    slug="multi_aspect",
    title="Multi-aspect Knowledge Distillation with Large Language Model",
    arxiv="2501.13341",
    year=2025,
    kind="data",
    modality="image",
    citation="""@inproceedings{lee2025multi,
  title = {Multi-aspect Knowledge Distillation with Large Language Model},
  author = {Taegyeong Lee and Jinsik Bang and Soyeong Kwon and Taehwan Kim},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops}, year = {2025}
}""",
)

KEY = CACHED + COLUMN


@dataclass
class MultiAspectConfig:
    """Weights are those of the official fine-grained configuration."""

    aspect_alpha: float = field(default=4.0, metadata={"help": "Weight of the aspects' binary cross-entropy."})
    aspect_ce_weight: float = field(default=1.0, metadata={"help": "Weight of the classes' cross-entropy."})
    aspect_kd_weight: float = field(
        default=0.0, metadata={"help": "Weight of KD on the class logits, which then needs a teacher (ours)."}
    )
    temperature: float = field(default=4.0, metadata={"help": "Softmax temperature of this KD."})
    aspect_min_information: float = field(
        default=1e-4,
        metadata={"help": "Aspects whose answers tell less of the picture (nats) are dropped as constant (ours)."},
    )

    def __post_init__(self):
        for name in ("aspect_alpha", "aspect_ce_weight", "aspect_kd_weight", "aspect_min_information"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, and finite, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")


# ---- pure functions --------------------------------------------------------------------------------------------------
@exactly
def makd_loss(
    outputs: Tensor, labels: Tensor, aspect_probs: Tensor, num_classes: int, alpha: float = 4.0, ce_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, ce, aspect): ce_weight · CE on the first C outputs + alpha · BCE on the others; the last two unweighted.

    Args:
        outputs: (B, C + Q), classes first.
        aspect_probs: (B, Q) soft targets; BCE is the mean over B · Q, and at best their entropy, not 0.
        num_classes: C.
    """
    ce, aspect = cross_entropy(outputs[:, :num_classes], labels), _bce(outputs[:, num_classes:], aspect_probs)
    return ce_weight * ce + alpha * aspect, ce, aspect


def _bce(logits: Tensor, probabilities: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, probabilities.to(logits))


@exactly
def yes_probability(yes_logit: Tensor, no_logit: Tensor) -> Tensor:
    """softmax([yes, no])[0], of any shape, in float32 at least; other tokens' logits do not matter."""
    return (yes_logit - no_logit).sigmoid()


@exactly
def aspect_entropy(aspect_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(Q,) entropy of each aspect's mean answer, and (Q,) its information about the picture, in nats.

    The information is the entropy of the mean minus the mean of the entropies: 0 where all pictures get one answer.

    Args:
        aspect_probs: (N, Q).
    """
    whole = _entropy(aspect_probs.mean(0))
    return whole, (whole - _entropy(aspect_probs).mean(0)).clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


@exactly
def aspect_auc(scores: Tensor, aspect_probs: Tensor) -> Tensor:
    """(Q,) area under the ROC curve against answers above one half; nan where all are on one side. Ties count half.

    Args:
        scores: (N, Q) aspect logits.
        aspect_probs: (N, Q).
    """
    out = []
    for score, yes in zip(scores.T, (aspect_probs > 0.5).T, strict=True):
        _, place, counts = score.unique(return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0) - (counts - 1) / 2)[place]
        positives, negatives = yes.sum(), (~yes).sum()
        out.append((rank[yes].sum() - positives * (positives + 1) / 2) / (positives * negatives))
    return torch.stack(out)


# ---- the objective ---------------------------------------------------------------------------------------------------
class MultiAspect(Objective):
    """Classes and aspects, from one pooled feature.

    Args:
        aspects: how many the data's column holds.
        kept: which of them are learned; None: all.
    """

    per = "sample"
    paper = CARD

    def __init__(self, config: MultiAspectConfig, aspects: int, kept: Tensor | None = None):
        super().__init__()
        self.config = config
        self.aspects = aspects
        self.uses_teacher = config.aspect_kd_weight > 0
        self.needs = frozenset({"student.logits", tap(EMBEDDING, "student")})
        if self.uses_teacher:
            self.needs |= {"teacher.logits"}
        self.state = {"kept": torch.arange(aspects) if kept is None else kept}
        self.seen: list[tuple[Tensor, Tensor]] = []  # aspect logits and targets of an evaluation

    def setup(self, student: nn.Module, teacher) -> None:
        classifier = classifier_of(base_model_of(student))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.aspect_classifier = nn.Linear(classifier.in_features, len(self.state["kept"]))

    def other_terms(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, Tensor]:
        weight = self.aspect_classifier.weight
        logits = upcast(self.aspect_classifier(student.features[EMBEDDING].to(weight.dtype)))
        terms = {"ce": cross_entropy(upcast(student.logits), student.labels), "aspect": self._aspect(logits, student)}
        if self.uses_teacher:
            terms["kd"] = kd_loss(student.logits, teacher.logits, self.config.temperature)
        return terms

    def _aspect(self, logits: Tensor, student: Signals) -> Tensor:
        answers = student.batch.get(KEY)
        if answers is None and not self.training:
            return 0.0 * logits.sum()
        if answers is None or answers.shape != (len(logits), self.aspects):
            shape = "none" if answers is None else tuple(answers.shape)
            raise ValueError(
                f"MultiAspect needs {self.aspects} answers per example in {COLUMN!r}, the batch has {shape}: annotate "
                "the data (recipes/multi_aspect_annotate.py), and make the trainer with multi_aspect.build_trainer"
            )
        answers = answers[:, self.state["kept"]]
        if not self.training:
            self.seen.append((logits.detach(), answers))
        return _bce(logits, answers)

    def weights(self, progress: float) -> dict[str, float]:
        c = self.config
        return {"ce": c.aspect_ce_weight, "aspect": c.aspect_alpha, "kd": c.aspect_kd_weight}


class AspectCollator(DataCollatorForDistillation):
    """Another collator's batch, with `aspect_probs` beside where the examples have them."""

    def __init__(self, base: Callable):
        super().__init__(base, labels_of="samples", example_columns=(COLUMN,))

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        if all(COLUMN in f for f in features):
            return super().__call__([f | {COLUMN: torch.as_tensor(f[COLUMN]).tolist()} for f in features])
        plain = copy.copy(self)
        plain.example_columns = ()
        return DataCollatorForDistillation.__call__(plain, features)


class AspectAUC(TrainerCallback):
    """Adds `<eval>_aspect_auc` to what an evaluation measures, where its data is annotated: the mean over aspects."""

    def __init__(self, objective: MultiAspect):
        self.objective = objective

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        seen, self.objective.seen = self.objective.seen, []
        if seen and metrics is not None:
            scores, answers = (gather_rows(torch.cat(parts).contiguous()) for parts in zip(*seen, strict=True))
            prefix = next(name for name in metrics if name.endswith("_loss")).removesuffix("_loss")
            metrics[f"{prefix}_aspect_auc"] = aspect_auc(scores, answers).nanmean().item()

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self.objective.seen = []


def read_answers(dataset) -> Tensor:
    """(N, Q) of the column `aspect_probs`.

    Raises:
        ValueError: no such column, rows of different lengths, values that are no probabilities.
    """
    names = getattr(dataset, "column_names", None)
    if names is not None and COLUMN not in names:
        raise ValueError(
            f"the training set has no column {COLUMN!r} among {', '.join(names)}: annotate it with "
            "recipes/multi_aspect_annotate.py, or curricula.annotation"
        )
    rows = (
        [torch.as_tensor(row[COLUMN]).tolist() for row in dataset]
        if names is None
        else list(dataset.with_format(None)[COLUMN])
    )
    sizes = {len(row) for row in rows}
    if len(sizes) != 1 or not min(sizes):
        raise ValueError(f"{COLUMN!r} must hold one answer per question, got rows of {sorted(sizes)[:5]} answers")
    answers = torch.as_tensor(rows, dtype=torch.float32)
    wrong = (~((answers >= 0) & (answers <= 1))).nonzero()
    if len(wrong):
        row, aspect = wrong[0].tolist()
        raise ValueError(f"{COLUMN!r} must hold probabilities, got {answers[row, aspect].item()} in row {row}")
    return answers


def informative(answers: Tensor, least: float) -> Tensor:
    """Numbers of the aspects that tell at least so much (nats) about the picture; the others are named in the log.

    Raises:
        ValueError: there is none.
    """
    entropy, information = aspect_entropy(answers)
    kept = (information > least).nonzero().flatten()
    for i, (h, told) in enumerate(zip(entropy.tolist(), information.tolist(), strict=True)):
        note = "" if told > least else ", constant: dropped"
        logger.info("aspect %d: entropy %.4f nats, %.4f about the picture%s", i, h, told, note)
    if not len(kept):
        raise ValueError(f"all {answers.shape[1]} aspects get one answer for all pictures: ask other questions")
    return kept


def build_trainer(
    student,
    teacher,
    train_dataset,
    config: MultiAspectConfig,
    args,
    *,
    data_collator=None,
    callbacks=None,
    **trainer_arguments,
):
    """A trainer for this method; the training set has a column `aspect_probs`, the evaluation set may have one.

    Raises:
        ValueError: see `read_answers` and `informative`.
    """
    from hf_distill.training.trainers import trainer_for

    answers = read_answers(train_dataset)
    objective = MultiAspect(config, answers.shape[1], informative(answers, config.aspect_min_information))
    return trainer_for(args)(
        student,
        teacher=teacher,
        objective=objective,
        args=args,
        train_dataset=train_dataset,
        data_collator=AspectCollator(data_collator or default_data_collator),
        callbacks=[*(callbacks or ()), AspectAUC(objective)],
        **trainer_arguments,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
