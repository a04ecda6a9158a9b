"""Logit distillation: match the teacher's output distribution, by any divergence, mixed with the labels.

loss = label_weight · CE(labels) + kd_weight · [T²] · D(teacher ‖ student; T)

Hinton's KD is `--temperature 4 --t_squared --label_weight 0.1 --kd_weight 0.9`; the defaults are plain forward KL, what
most language-model work calls KD.

    accelerate launch recipes/logit_kd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from hf_distill.baselines.cross_tokenizer import ULD
from hf_distill.losses import DIVERGENCES
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import SCHEDULES, LogitKD

CARD = MethodCard(
    slug="logit_kd",
    title="Distilling the Knowledge in a Neural Network",
    arxiv="1503.02531",
    year=2015,
    kind="logits",
    modality="text",
    citation="""@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  year = {2015}, eprint = {1503.02531}, archivePrefix = {arXiv}
}""",
)

# which divergence takes which setting, and the settings' names in this config
OPTIONS = {
    "generalized_jsd": {"beta": "jsd_beta"},
    "skew_forward_kl": {"lam": "skew_lam"},
    "skew_reverse_kl": {"lam": "skew_lam"},
    "adaptive_kl": {"mu": "adaptive_mu"},
    "alpha_beta": {"alpha": "ab_alpha", "beta": "ab_beta"},
}

CROSS_TOKENIZER = {"uld": False, "hybrid_uld": True}  # whether hybrid


@dataclass
class LogitKDConfig:
    """Defaults are plain forward KL at temperature 1; those of the family's members are their papers'."""

    divergence: str = field(default="forward_kl", metadata={"help": f"One of {', '.join(DIVERGENCES)}."})
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of both models (Hinton et al.: 4)."})
    temperature_end: float | None = field(default=None, metadata={"help": "Temperature at the last step."})
    temperature_schedule: str = field(default="linear", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    t_squared: bool = field(default=False, metadata={"help": "Multiply the divergence by T², as Hinton et al. do."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})
    kd_weight_end: float | None = field(default=None, metadata={"help": "Weight of the divergence at the last step."})
    weight_schedule: str = field(default="linear", metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    label_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the cross-entropy with the labels; by default 0, and 1 with cross_tokenizer."},
    )
    cross_tokenizer: str = field(
        default="none",
        metadata={
            "help": "For a teacher with another tokenizer: uld (distance of sorted probabilities over the same bytes) "
            "or hybrid_uld (tokens of both vocabularies by name, the others sorted). Its divergence is its own."
        },
    )
    per: str = field(default="token", metadata={"help": "token: mean over tokens; sample: over documents' means."})
    jsd_beta: float = field(
        default=0.5, metadata={"help": "generalized_jsd: weight of the teacher in the mixture (GKD)."}
    )
    skew_lam: float = field(
        default=0.1, metadata={"help": "skew divergences: weight of the first argument (DistiLLM)."}
    )
    adaptive_mu: float = field(default=0.5, metadata={"help": "adaptive_kl: the teacher mass that counts as head."})
    ab_alpha: float = field(default=0.5, metadata={"help": "alpha_beta: alpha (ABKD)."})
    ab_beta: float = field(default=0.5, metadata={"help": "alpha_beta: beta (ABKD)."})

    def __post_init__(self):
        build_objective(self)  # what is wrong is said before any model is loaded
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")


def build_objective(config: LogitKDConfig) -> LogitKD | ULD:
    """The objective that a config describes.

    Raises:
        ValueError: an unknown divergence or schedule, a weight or temperature out of range, settings of a divergence
            beside cross_tokenizer.
    """
    if config.cross_tokenizer != "none":
        return _across_tokenizers(config)
    objective = LogitKD(
        config.divergence,
        options={name: getattr(config, ours) for name, ours in OPTIONS.get(config.divergence, {}).items()},
        kd_weight=config.kd_weight,
        kd_weight_end=config.kd_weight_end,
        weight_schedule=config.weight_schedule,
        label_weight=config.label_weight or 0.0,
        temperature=config.temperature,
        temperature_end=config.temperature_end,
        temperature_schedule=config.temperature_schedule,
        t_squared=config.t_squared,
        per=config.per,
    )
    objective.paper = CARD
    return objective


def _across_tokenizers(config: LogitKDConfig) -> ULD:
    if config.cross_tokenizer not in CROSS_TOKENIZER:
        known = ", ".join(("none", *CROSS_TOKENIZER))
        raise ValueError(f"cross_tokenizer must be one of {known}, got {config.cross_tokenizer!r}")
    read = {"cross_tokenizer", "kd_weight", "label_weight", "temperature", "jsd_beta"}
    defaults = {f.name: f.default for f in fields(config) if f.name not in read}
    ignored = [name for name, value in defaults.items() if getattr(config, name) != value]
    if ignored:
        raise ValueError(f"{', '.join(ignored)} do not apply with cross_tokenizer={config.cross_tokenizer}: unset them")
    return ULD(
        hybrid=CROSS_TOKENIZER[config.cross_tokenizer],
        weight=config.kd_weight,
        label_weight=1.0 if config.label_weight is None else config.label_weight,
        student_temperature=config.temperature,
        teacher_temperature=config.temperature,
        beta=config.jsd_beta,
    )


def build_trainer(student, teacher, train_dataset, config: LogitKDConfig, args, **trainer_arguments):
    """A trainer for this method: DistillSFTTrainer for DistillSFTConfig, DistillTrainer for DistillConfig."""
    from hf_distill.training.trainers import trainer_for

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
