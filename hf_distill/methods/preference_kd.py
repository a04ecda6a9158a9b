"""Preference distillation: DPO whose reference is the large teacher, not a copy of the student.

The student learns to prefer good answers to bad ones by more than its teacher does. This is the last stage of LLaVA-MoD
(arXiv 2408.15881, section 3.3) by itself, for text models: no mixture of experts, no pictures, no earlier stages
(`methods/llava_mod.py` has all of them). The losses are TRL's and `kto_pair`, `--loss_type`; β is `--beta`.

Bad answers come with the data (`chosen` and `rejected`), or are the student's own (`--pairs student`, of rows with
prompt and completion). The latter with `--chosen teacher --loss_type sigmoid_norm` is in the style of DPKD (arXiv
2406.19774): teacher answers against student answers, log-ratios divided by lengths. *Reconstruction from memory*; that
paper draws its data once, as here, and its first stage is left out.

    accelerate launch recipes/preference_kd.py \
        --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_distill.methods._card import MethodCard

CARD = MethodCard(
    slug="preference_kd",
    title="LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation (its preference distillation)",
    arxiv="2408.15881",
    year=2024,
    kind="preference",
    modality="text",
    citation="""@inproceedings{shu2025llavamod,
  title = {{LLaVA-MoD}: Making {LLaVA} Tiny via {MoE} Knowledge Distillation},
  author = {Fangxun Shu and Yue Liao and Le Zhuo and Chenning Xu and Guanghao Zhang and Haonan Shi and others},
  booktitle = {International Conference on Learning Representations}, year = {2025}
}""",
    couples_batch="DPOTrainer takes a mean per micro-batch, and micro-batches of a window count alike whatever their "
    "size; the K terms of kto_pair are means over a micro-batch",
)

PAIRS = ("given", "student")
CHOSEN = ("completion", "teacher")


@dataclass
class PreferenceKDConfig:
    """Where the pairs come from; the losses are settings of DistillDPOConfig. Draws of the student: ours."""

    pairs: str = field(
        default="given",
        metadata={
            "help": "given: the data's chosen and rejected answers. student: rejected is what the student itself "
            "writes to each prompt, where it differs from the completion."
        },
    )
    chosen: str = field(
        default="completion",
        metadata={"help": "With pairs=student. completion: the data's. teacher: what the teacher writes, greedily."},
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "With pairs=student: draws until a wrong answer."})
    sample_temperature: float = field(default=1.0, metadata={"help": "With pairs=student: temperature of the draws."})
    sample_max_new_tokens: int = field(default=128, metadata={"help": "With pairs=student: length of the answers."})
    answer_store: str | None = field(
        default=None,
        metadata={
            "help": "With pairs=student: folder that keeps every answer, so that a killed run goes on and several "
            "ranks share the work. None: every rank draws everything."
        },
    )

    def __post_init__(self):
        if self.pairs not in PAIRS:
            raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {self.pairs!r}")
        if self.chosen not in CHOSEN:
            raise ValueError(f"chosen must be one of {', '.join(CHOSEN)}, got {self.chosen!r}")
        if self.chosen == "teacher" and self.pairs == "given":
            raise ValueError("chosen=teacher writes answers to the data's prompts: set pairs=student")
        for name in ("samples_per_prompt", "sample_max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.sample_temperature >= 0 and math.isfinite(self.sample_temperature)):
            raise ValueError(f"sample_temperature must be 0 or positive and finite, got {self.sample_temperature}")
        if self.sample_temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("draws at sample_temperature 0 are all the same: set samples_per_prompt=1")


def student_pairs(dataset, student, processing_class, teacher, config: PreferenceKDConfig, seed: int, device="cpu"):
    """Pairs of the student's own answers to a dataset's prompts; see `curricula.pairs.contrastive_pairs`."""
    from hf_distill.curricula.pairs import contrastive_pairs
    from hf_distill.teachers import LocalTextTeacher

    for model in (student, teacher.model) if config.chosen == "teacher" else (student,):
        if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
            model.to(device)
    folders = [
        None if config.answer_store is None else f"{config.answer_store}/{who}" for who in ("student", "teacher")
    ]
    good = LocalTextTeacher(teacher, store=folders[1]) if config.chosen == "teacher" else None
    return contrastive_pairs(
        dataset,
        LocalTextTeacher(student, processing_class, store=folders[0]),
        teacher=good,
        samples=config.samples_per_prompt,
        temperature=config.sample_temperature,
        max_new_tokens=config.sample_max_new_tokens,
        seed=seed,
    )[0]


def build_trainer(
    student,
    teacher,
    train_dataset,
    config: PreferenceKDConfig,
    args,
    *,
    eval_dataset=None,
    processing_class=None,
    **more,
):
    """A DistillDPOTrainer; with pairs=student its pairs are drawn first, those of the evaluation too.

    Args:
        args: DistillDPOConfig.
        train_dataset, eval_dataset: rows of prompt, chosen and rejected; with pairs=student of prompt and completion.
    """
    from hf_distill.training.config import DistillDPOConfig
    from hf_distill.training.dpo import DistillDPOTrainer
    from hf_distill.training.loading import arguments_as, load_student, teacher_from

    args = arguments_as(DistillDPOConfig, args, student)
    teacher = teacher_from(teacher, args)
    if config.pairs == "student":
        quantised = more.get("quantization_config")
        student, processing_class = load_student(student, args, processing_class, quantised, more.get("peft_config"))
        given = (student, processing_class, teacher, config, args.seed, args.device)
        train_dataset = student_pairs(train_dataset, *given)
        eval_dataset = None if eval_dataset is None else student_pairs(eval_dataset, *given)
    trainer = DistillDPOTrainer(
        student,
        teacher=teacher,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        **more,
    )
    trainer.paper = CARD
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
