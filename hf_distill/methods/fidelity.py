"""Fidelity: how closely a student imitates its teacher, reported beside how good it is, since one is not the other.

The study found that distillation makes small students more accurate, yet that more accurate students are not the ones
closer to their teacher. So a report always has both: accuracy, and agreement in tokens, answers and texts; beside a
control that learnt from the labels alone, the improvement. The splits of agreement, the token measures and the shares
without an answer are ours; the study has accuracy, agreement and BLEU.

    hf-distill evaluate --fidelity --generate --answer_extractor number --model_name_or_path ... \\
        --teacher_model_name_or_path ... --dataset_name ... --control_model_name_or_path ...
    accelerate launch recipes/fidelity.py --config ...      # trains the study's student and its control, then reports
"""

from __future__ import annotations

import copy
import json
import logging
import math
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from hf_distill.baselines.probe import model_of
from hf_distill.evaluation.callback import FidelityCallback
from hf_distill.evaluation.extraction import extractor_of
from hf_distill.evaluation.fidelity import (
    answer_fidelity,
    measure_tokens,
    sentence_bleu,
    spearman,
    text_fidelity,
    token_fidelity,
)
from hf_distill.evaluation.generated import AnswerSettings, greedy_texts, questions_of
from hf_distill.losses import generalized_jsd
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import LogitKD, NextToken, Objective
from hf_distill.teachers.noisy import NoisyTeacher

logger = logging.getLogger(__name__)

CARD = MethodCard(
    slug="fidelity",
    title="On the Generalization vs Fidelity Paradox in Knowledge Distillation",
    arxiv="2505.15442",
    year=2025,
    kind="evaluation",
    modality="text",
    entry="evaluate",
    citation="""@inproceedings{ramesh2025generalization,
  title = {On the Generalization vs Fidelity Paradox in Knowledge Distillation},
  author = {Suhas Kamasetty Ramesh and Ayan Sengupta and Tanmoy Chakraborty},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  year = {2025}, eprint = {2505.15442}, archivePrefix = {arXiv}
}""",
)

LOSSES = ("forward_kl", "reverse_kl", "gkd", "labels")
HOT = 5.0  # the study's students fall from 55.9 to 8.3 points here
SMOOTHING = 1e-9


@dataclass
class FidelityConfig(AnswerSettings):
    """What is reported, and how the study's students learn. Reverse KL was the study's best loss at temperature 1."""

    fidelity_loss: str = field(
        default="reverse_kl",
        metadata={"help": f"One of {', '.join(LOSSES)}. forward_kl is what the study calls SeqKD; labels the control."},
    )
    kd_weight: float = field(default=1.0, metadata={"help": "w of (1 - w) · CE(labels) + w · KD (the study: 1)."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of both softmaxes (the study: 1, 2 or 5; 2 helps, 5 hurts). gkd has none."}
    )
    t_squared: bool = field(default=True, metadata={"help": "Multiply the divergence by the squared temperature."})
    teacher_logit_noise_std: float = field(
        default=0.0, metadata={"help": "Noise on the teacher's logits while training (the study: 1, 2 or 5)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.fidelity_loss not in LOSSES:
            raise ValueError(f"fidelity_loss must be one of {', '.join(LOSSES)}, got {self.fidelity_loss!r}")
        if not 0 <= self.kd_weight <= 1:
            raise ValueError(f"kd_weight must lie between 0 and 1, got {self.kd_weight}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.teacher_logit_noise_std < math.inf:
            raise ValueError(f"teacher_logit_noise_std must be 0 or positive, got {self.teacher_logit_noise_std}")
        if self.fidelity_loss == "gkd" and self.temperature != 1:
            raise ValueError(f"gkd has no temperature, got {self.temperature}: leave it at 1")
        if self.temperature >= HOT:
            logger.warning(
                "temperature %g: at 5 the study's 0.5B student fell from 55.9 to 8.3 points; 1 or 2 are better",
                self.temperature,
            )


# ---- the study's losses ---------------------------------------------------------------------------------------------
@exactly
def seq_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
) -> Tensor:
    """The study's token-level KL on reference text: a mean over each sequence's tokens, then over the sequences.

    forward_kl: Σ_v (p + 1e-9) · (log p - log q); reverse_kl: Σ_v (q + 1e-9) · (log q - log p); q student, p teacher.

    Args:
        student_logits, teacher_logits: (B, S, V), the teacher a constant; the wider one is cut.
        mask: (B, S), 1 counts (the study: the attention mask, prompt included). A sequence without a 1 counts nothing.
        divergence: "forward_kl" or "reverse_kl".
        temperature: of both softmaxes.
        t_squared: multiply by the squared temperature.

    Raises:
        ValueError: an unknown divergence, or a temperature not positive.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[2.0, 0.0]]])
        >>> round(seq_kd_loss(z, z.flip(-1), torch.ones(1, 1)).item(), 4)
        1.5232
    """
    if divergence not in ("forward_kl", "reverse_kl"):
        raise ValueError(f"divergence must be forward_kl or reverse_kl, got {divergence!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    width = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = (student_logits[..., :width] / temperature).log_softmax(-1)
    log_p = (teacher_logits[..., :width].detach() / temperature).log_softmax(-1)
    log_a, log_b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
    tokens = ((log_a.exp() + SMOOTHING) * (log_a - log_b)).sum(-1)
    mask = mask.to(tokens.dtype)
    counts = mask.sum(-1)
    means = (tokens * mask).sum(-1) / counts.clamp(min=1)
    loss = means.sum() / (counts > 0).sum().clamp(min=1)
    return loss * temperature**2 if t_squared else loss


def gkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, beta · KL(p‖m) + (1 - beta) · KL(q‖m), a mean over the batch's tokens.

    Paper: its code puts beta on the student in the mixture and on the teacher's term outside, which agree at 0.5 only;
    here m = beta · p + (1 - beta) · q, as in TRL and GKD.

    Args:
        student_logits, teacher_logits: (..., V), the teacher a constant; the wider one is cut.
        labels: (...) aligned with the logits; -100 does not count.
        beta: share of the teacher in the mixture.
    """
    return generalized_jsd(student_logits, teacher_logits, mask=labels != -100, beta=beta)


# ---- training the study's students ----------------------------------------------------------------------------------
def build_objective(config: FidelityConfig) -> Objective:
    """What a student of the study learns from.

    Paper: its KLs run on unshifted logits of prompt and answer; here on the tokens that carry loss
    (`completion_only_loss=False` counts the prompt), without the 1e-9, and gkd on reference text (half of its batches
    are the student's own text there).
    """
    if config.fidelity_loss == "labels":
        objective = NextToken()
    else:
        by_token = config.fidelity_loss == "gkd"
        objective = LogitKD(
            "generalized_jsd" if by_token else config.fidelity_loss,
            kd_weight=config.kd_weight,
            label_weight=1 - config.kd_weight,
            temperature=config.temperature,
            t_squared=config.t_squared,
            per="token" if by_token else "sample",
        )
    objective.paper = CARD
    return objective


def build_trainer(student, teacher, train_dataset, config: FidelityConfig, args, **trainer_arguments):
    """A trainer of a student as the study trains them: DistillSFTTrainer for DistillSFTConfig."""
    from hf_distill.training.loading import teacher_from
    from hf_distill.training.trainers import trainer_for

    if config.teacher_logit_noise_std:
        teacher = NoisyTeacher(teacher_from(teacher, args), config.teacher_logit_noise_std, args.seed)
    return trainer_for(args)(
        student,
        teacher=teacher,
        objective=build_objective(config),
        args=args,
        train_dataset=train_dataset,
        **trainer_arguments,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()


# ---- the report -----------------------------------------------------------------------------------------------------
def fidelity_report(
    student, teacher, dataset, control=None, *, config: FidelityConfig | None = None, args=None, processing_class=None
) -> dict:
    """A student beside its teacher on a dataset, and a control that learnt from the labels alone beside both.

    Args:
        student, control: causal language models, or Hub ids / folders.
        teacher: a model, Hub id, folder, or Teacher.
        dataset: `text`, `messages` or `prompt` and `completion`; with `config.generate` one that `questions_of` reads.
        config: `topk`, `generate`, `answer_extractor` and `answer_tokens` are read.
        args: DistillSFTConfig for batch size, length and device; None takes its defaults.
        processing_class: the student's tokenizer; None loads it with the student.

    Returns:
        {"student": {...}, "control": {...} or None, "improvement", "improvement_standard_error", "examples",
        "warnings": [...]}: see `measure_tokens` and `text_fidelity` for the measures. What was not measured is left
        out. Each rank returns the same.

    Raises:
        ValueError: an empty dataset, no questions in it, references without an answer, models that do not fit.
    """
    from hf_distill.training.config import DistillSFTConfig
    from hf_distill.training.pairs import check_dataset

    check_dataset(dataset, "evaluation")
    config = config or FidelityConfig()
    if config.generate:
        questions_of(dataset)  # before any model is loaded
    with tempfile.TemporaryDirectory() as folder:
        args = DistillSFTConfig(output_dir=folder) if args is None else copy.copy(args)
        args.report_to, args.eval_strategy, args.save_strategy = [], "no", "no"
        trainer = _trainer(student, teacher, dataset, args, processing_class)
        other = None if control is None else _trainer(control, trainer.teacher, dataset, args, processing_class)
        return compare(trainer, other, dataset, config)


def evaluate(student, teacher, dataset, config: FidelityConfig, args, *, control=None, processing_class=None) -> dict:
    """`fidelity_report`, also written to `fidelity.json` and, as a table for a model card, `fidelity.md`."""
    report = fidelity_report(
        student, teacher, dataset, control, config=config, args=args, processing_class=processing_class
    )
    write_report(report, args.output_dir)
    return report


def compare(trainer, control, dataset, config: AnswerSettings) -> dict:
    """The report of `fidelity_report` from trainers whose evaluation set is the dataset; control may be None."""
    trainers = {"student": trainer} if control is None else {"student": trainer, "control": control}
    report: dict = {}
    for name, own in trainers.items():
        found, _ = measure_tokens(own, config.topk)
        report[name] = {k: v for k, v in found.items() if k not in ("agreement", "teacher_kl")}  # there by other names
    report |= {"control": report.get("control"), "examples": len(dataset), "warnings": []}
    if config.generate:
        _compare_answers(report, trainers, dataset, config)
    for warning in report["warnings"]:
        logger.warning(warning)
    return report


def _compare_answers(report: dict, trainers: dict, dataset, config: AnswerSettings) -> None:
    questions, extract = questions_of(dataset), extractor_of(config.answer_extractor)
    teacher, first = trainers["student"].teacher, trainers["student"]
    if model_of(teacher) is None:
        raise ValueError(f"{type(teacher).__name__} writes no answers: name a model, or leave --generate off")
    settings = dict(
        images=questions.images,
        batch_size=first.args.per_device_eval_batch_size,
        max_new_tokens=config.answer_tokens,
    )
    own = teacher.tokenizer or first.processing_class
    theirs = greedy_texts(model_of(teacher), own, questions.prompts, **settings)
    right: dict[str, list[bool]] = {}
    for name, trainer in trainers.items():
        texts = greedy_texts(trainer.student(), trainer.processing_class, questions.prompts, **settings)
        report[name] |= text_fidelity(texts, theirs, questions.references, extract)
        right[name] = [extract(a) == extract(b) for a, b in zip(texts, questions.references, strict=True)]
    if "control" not in right:
        return
    gains = [int(a) - int(b) for a, b in zip(right["student"], right["control"], strict=True)]
    report["improvement"] = statistics.mean(gains)
    report["improvement_standard_error"] = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    ours, alone = report["student"]["teacher_accuracy"], report["control"]["student_accuracy"]
    if ours < alone:
        report["warnings"].append(
            f"the teacher's accuracy {ours:.3f} is below the {alone:.3f} of a student trained on the labels alone: "
            "such a teacher cost the study's students up to half their accuracy; fine-tune it on the task first"
        )


def _trainer(model, teacher, dataset, args, processing_class):
    from hf_distill.training.trainers import DistillSFTTrainer

    return DistillSFTTrainer(
        model,
        teacher=teacher,
        objective=LogitKD(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processing_class,
    )


LABELS = {
    "student_accuracy": "accuracy",
    "teacher_accuracy": "accuracy of the teacher",
    "agreement": "same answer as the teacher",
    "agreement_given_teacher_correct": "agreement where the teacher is right",
    "agreement_given_teacher_wrong": "agreement where the teacher is wrong",
    "inherited_errors": "same wrong answer as the teacher",
    "rationale_bleu": "BLEU against the teacher's text",
    "cross_entropy": "cross-entropy (nats)",
    "ece": "calibration error (15 bins)",
    "token_top1_agreement": "same likeliest token",
    "kl_teacher_student": "KL(teacher || student)",
    "kl_student_teacher": "KL(student || teacher)",
    "tvd": "total variation distance",
}


def markdown_table(report: dict) -> str:
    """A report as a table for a model card, a row per measure."""
    columns = [name for name in ("student", "control") if report.get(name)]
    lines = ["| measure | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    order = list(LABELS)
    for name in sorted(report["student"], key=lambda n: order.index(n) if n in order else len(order)):
        cells = [f"{report[column][name]:.4f}" if name in report[column] else "" for column in columns]
        lines.append(f"| {LABELS.get(name, name.replace('_', ' '))} | {' | '.join(cells)} |")
    if "improvement" in report:
        error = report["improvement_standard_error"]
        shown = f"{report['improvement']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        lines += ["", f"Improvement over the control: {shown} (paired over {report['examples']} examples)."]
    lines += [f"\n**Warning.** {warning[0].upper()}{warning[1:]}." for warning in report["warnings"]]
    return "\n".join(lines)


def write_report(report: dict, folder: str | Path) -> None:
    """`fidelity.json` and `fidelity.md`, by the first process."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "fidelity.md").write_text(markdown_table(report) + "\n", encoding="utf-8")


__all__ = [
    "CARD",
    "FidelityCallback",
    "FidelityConfig",
    "NoisyTeacher",
    "answer_fidelity",
    "build_objective",
    "build_trainer",
    "distill",
    "evaluate",
    "fidelity_report",
    "gkd_loss",
    "markdown_table",
    "sentence_bleu",
    "seq_kd_loss",
    "spearman",
    "text_fidelity",
    "token_fidelity",
    "write_report",
]
