"""Teacher hacking: a student that pleases its imperfect teacher at the expense of the truth, and what helps.

Training for many epochs on fixed answers lets a student come closer to its teacher (the proxy) while it moves away from
the distribution that the teacher only approximates (golden, known in a controlled chain oracle -> teacher -> student).
Fresh answers in every epoch, the teacher's or the student's own, and more diverse prompts are the paper's remedies.
Without an oracle, a proxy that leaves the power law of its first evaluations is the sign.

    python recipes/teacher_hacking.py                          # the controlled chain, small, in a minute
    accelerate launch recipes/teacher_hacking.py --config recipes/configs/teacher_hacking_qwen2.5.yaml

The loss is the mean over answers of the mean over tokens of D(teacher, student), temperature 1. No official code is
known: the choice of evaluation sequences (each distance along answers of its own reference) is from memory of the
paper, the numeric verdict and the flag's tolerance and patience are ours (the paper judges curves).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset

from hf_distill.curricula.responses import ROUND, FreshResponses, RenewResponses, answered, prompts_of, writer_of
from hf_distill.evaluation.hacking import (
    DISTANCES,
    check_reaction,
    check_settings,
    distance_named,
    fit_power_law,
    hacking_verdict,
    sequence_divergence,
)
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import LogitKD

logger = logging.getLogger(__name__)

CARD = MethodCard(
    slug="teacher_hacking",
    title="On Teacher Hacking in Language Model Distillation",
    arxiv="2502.02671",
    year=2025,
    kind="evaluation",
    modality="text",
    citation="""@inproceedings{tiapkin2025teacher,
  title = {On Teacher Hacking in Language Model Distillation},
  author = {Daniil Tiapkin and Daniele Calandriello and Johan Ferret and Sarah Perrin and Nino Vieillard and
            Alexandre Ram{\\'e} and Mathieu Blondel},
  booktitle = {International Conference on Machine Learning}, year = {2025}
}""",
)
SOURCES = ("offline", "online_teacher", "online_student", "mixed")
EVALUATION_SEED = 7_919  # apart from every training round's


@dataclass
class TeacherHackingConfig:
    """Numbers of the verdict and of the law are ours, 100 skipped steps and 128 tokens the paper's."""

    divergence: str = field(
        default="forward_kl", metadata={"help": f"Of the loss and of both distances: one of {', '.join(DISTANCES)}."}
    )
    data_source: str = field(
        default="offline",
        metadata={
            "help": "offline: fixed answers. online_teacher: new answers of the teacher in every epoch. "
            "online_student: the student's own (lmbda 1). mixed: the student's own in a share online_ratio of "
            "the batches."
        },
    )
    num_generations_per_prompt: int = field(
        default=0,
        metadata={
            "help": "offline: fixed answers that the teacher writes to each prompt before training (k > 1 is the "
            "paper's larger budget); 0 takes those of the data. online_teacher: answers per prompt and round, at least "
            "1."
        },
    )
    refresh_every_epochs: int = field(
        default=0,
        metadata={
            "help": "The teacher's answers are written anew every so many epochs: the middle way between offline (0) "
            "and online_teacher (1)."
        },
    )
    online_ratio: float = field(default=0.5, metadata={"help": "mixed: share of batches with the student's answers."})
    answer_tokens: int = field(default=128, metadata={"help": "Tokens of a teacher's or oracle's answer at most."})
    oracle_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "What stands for the truth (controlled experiments); gives the golden distance."},
    )
    eval_sequences: int = field(
        default=256, metadata={"help": "Fixed sequences on which the distances are measured at every evaluation."}
    )
    eval_answers: bool = field(
        default=False,
        metadata={
            "help": "Measure along answers that the teacher (proxy) and the oracle (golden) write once to prompts of "
            "the evaluation set, as the paper does, and not along the set's own texts."
        },
    )
    fit_points: int | None = field(
        default=None, metadata={"help": "Evaluations that the power law is fitted to. Default: the first half, >= 4."}
    )
    tolerance: float = field(default=0.1, metadata={"help": "Log residual above which a run is slower than its law."})
    patience: int = field(default=2, metadata={"help": "Evaluations in a row that raise a flag."})
    min_rel_increase: float = field(
        default=0.02, metadata={"help": "Relative rise of the golden distance above its lowest that counts."}
    )
    skip_steps: int = field(default=100, metadata={"help": "Evaluations up to this step are left out of the law."})
    on_detect: str = field(
        default="warn",
        metadata={
            "help": "What a flag does: warn, stop, or switch_to_on_policy (the student's own answers from then)."
        },
    )

    def __post_init__(self):
        distance_named(self.divergence)
        if self.data_source not in SOURCES:
            raise ValueError(f"data_source must be one of {', '.join(SOURCES)}, got {self.data_source!r}")
        for name, least in (
            ("num_generations_per_prompt", 0),
            ("refresh_every_epochs", 0),
            ("answer_tokens", 1),
            ("eval_sequences", 1),
            ("skip_steps", 0),
        ):
            value = getattr(self, name)
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_settings(
            tolerance=self.tolerance,
            patience=self.patience,
            min_rel_increase=self.min_rel_increase,
            fit_points=self.fit_points,
        )
        check_reaction(self.on_detect, self.online_ratio)
        if self.refresh_every_epochs and not self.writes:
            raise ValueError(
                "refresh_every_epochs needs answers that the teacher writes: set num_generations_per_prompt, or "
                "data_source online_teacher"
            )

    @property
    def writes(self) -> bool:
        """Whether the teacher writes the training answers."""
        return self.num_generations_per_prompt > 0 or self.data_source == "online_teacher"

    @property
    def renewed_every(self) -> int:
        """Epochs after which the teacher's answers are written anew; 0 never."""
        return self.refresh_every_epochs or int(self.data_source == "online_teacher")

    @property
    def student_share(self) -> float:
        """Share of batches with the student's own answers (`lmbda`)."""
        return {"online_student": 1.0, "mixed": self.online_ratio}.get(self.data_source, 0.0)


def build_objective(config: TeacherHackingConfig) -> LogitKD:
    """E over answers of (1/|y|) Σ_t D(teacher, student)."""
    objective = LogitKD(config.divergence, per="sample")
    objective.paper = CARD
    return objective


def build_trainer(
    student, teacher, train_dataset, config: TeacherHackingConfig, args, *, eval_dataset=None, **trainer_arguments
):
    """A trainer on this data source that watches for hacking at every evaluation of `eval_dataset`.

    The proxy needs an evaluation set. An oracle may be passed as a model through `config.oracle_model_name_or_path`.

    Raises:
        ValueError: answers are to be written and the data has no prompts, the teacher cannot write, or the trainer
            packs; the student's own answers are asked of a trainer without `lmbda`; an oracle without `eval_dataset`.
    """
    from hf_distill.training.loading import teacher_from
    from hf_distill.training.trainers import trainer_for

    kind = trainer_for(args)
    _check(config, args, kind, train_dataset, eval_dataset)
    if config.student_share:
        args.lmbda = config.student_share
    write = None
    if config.writes:
        teacher = teacher_from(teacher, args)
        write = _writing(config, args, teacher, train_dataset, trainer_arguments.get("processing_class"))
    trainer = kind(
        student,
        teacher=teacher,
        objective=build_objective(config),
        args=args,
        train_dataset=train_dataset if write is None else write(0),
        eval_dataset=eval_dataset,
        **trainer_arguments,
    )
    if config.renewed_every:
        writer_of(trainer.teacher, trainer.processing_class, args.device)  # refuses sharded weights now, not later
        trainer.train_dataset = FreshResponses(trainer.train_dataset, write, config.renewed_every)
        trainer.add_callback(RenewResponses(trainer.train_dataset))
    if eval_dataset is None:
        logger.warning("no eval_dataset: teacher hacking is not looked for")
    else:
        _watch(trainer, config, eval_dataset)
    return trainer


def _check(config: TeacherHackingConfig, args, kind: type, train_dataset, eval_dataset) -> None:
    """What can be refused before anything is loaded or written."""
    if config.student_share and not hasattr(args, "lmbda"):
        raise ValueError(
            f"data_source {config.data_source} needs a trainer that generates (lmbda), which {kind.__name__} is not: "
            "use offline or online_teacher"
        )
    if config.on_detect == "switch_to_on_policy" and not hasattr(kind, "set_lmbda"):
        raise ValueError(
            f"on_detect switch_to_on_policy needs a trainer that generates (set_lmbda), which {kind.__name__} is not: "
            "use warn or stop"
        )
    if config.oracle_model_name_or_path is not None and eval_dataset is None:
        raise ValueError("the golden distance is measured on an evaluation set: pass eval_dataset")
    if eval_dataset is not None and isinstance(eval_dataset, IterableDataset):
        raise ValueError("fixed evaluation sequences need a map-style eval_dataset, got an IterableDataset")
    if config.writes:
        prompts_of(_mapped(train_dataset))
    if config.renewed_every and getattr(args, "packing", False):
        raise ValueError("answers that are written anew cannot be packed beforehand: set packing to false")
    if config.renewed_every and args.dataloader_persistent_workers:
        raise ValueError("lasting workers keep the first round's answers: unset dataloader_persistent_workers")
    if eval_dataset is not None and config.eval_answers:
        prompts_of(_first(eval_dataset))


def _mapped(dataset) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"answers are written to a datasets.Dataset of prompts, got {type(dataset).__name__}")
    return dataset


def _first(eval_dataset) -> Dataset:
    """Of several evaluation sets the first one."""
    return next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset


def _writing(config: TeacherHackingConfig, args, teacher, train_dataset, processing_class):
    """round -> the training rows with the teacher's answers of that round."""
    prompts = prompts_of(train_dataset)

    def write(round_: int) -> Dataset:
        return answered(
            writer_of(teacher, processing_class, args.device, args.per_device_eval_batch_size),
            prompts,
            samples=max(config.num_generations_per_prompt, 1),
            max_new_tokens=config.answer_tokens,
            max_length=args.max_length,
            seed=args.seed + ROUND * round_,
        )

    return write


def _watch(trainer, config: TeacherHackingConfig, eval_dataset) -> None:
    from hf_distill.teachers.frozen import load_teacher
    from hf_distill.training.hacking import TeacherHackingCallback

    args, oracle = trainer.args, None
    if config.oracle_model_name_or_path is not None:
        oracle = load_teacher(config.oracle_model_name_or_path)
    if config.eval_answers:
        asked = _first(eval_dataset)
        prompts = prompts_of(asked.select(range(min(config.eval_sequences, len(asked)))))

        def answers_of(reference) -> Dataset:
            return answered(
                writer_of(reference, trainer.processing_class, args.device, args.per_device_eval_batch_size),
                prompts,
                max_new_tokens=config.answer_tokens,
                max_length=args.max_length,
                seed=args.seed + EVALUATION_SEED,
            )

        sequences, oracle_sequences = answers_of(trainer.teacher), None if oracle is None else answers_of(oracle)
    else:
        own = _first(trainer.eval_dataset)
        sequences = own.select(range(min(config.eval_sequences, len(own))))
        oracle_sequences = None if oracle is None else sequences
    trainer.add_callback(
        TeacherHackingCallback(
            trainer,
            sequences,
            oracle=oracle,
            oracle_sequences=oracle_sequences,
            divergence=config.divergence,
            fit_points=config.fit_points,
            tolerance=config.tolerance,
            patience=config.patience,
            min_rel_increase=config.min_rel_increase,
            skip_steps=config.skip_steps,
            on_detect=config.on_detect,
            data_source=config.data_source,
        )
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()


__all__ = [
    "CARD",
    "TeacherHackingConfig",
    "build_objective",
    "build_trainer",
    "distill",
    "fit_power_law",
    "hacking_verdict",
    "sequence_divergence",
]
