"""LLaVA-MoD's stages as trainers: what trains in each, on which rows, and one after the other."""

from __future__ import annotations

import logging
import os
from dataclasses import fields

from torch import nn

from hf_distill.curricula.mimic import MimicRows
from hf_distill.curricula.pictures import WholePictures, check_same_pictures, picture_format
from hf_distill.heads import base_model_of
from hf_distill.losses.mimic import common_size, marks_rows
from hf_distill.methods.llava_mod import CARD, STAGES, LlavaModConfig, adaptor_objective, objective_for
from hf_distill.students import routed_blocks, upcycle_to_moe
from hf_distill.students.moe import plan_upcycle
from hf_distill.teachers import PrivilegedTeacher, Teacher
from hf_distill.training import compat
from hf_distill.training.config import DistillDPOConfig, DistillSFTConfig
from hf_distill.training.loading import arguments_as, load_student, teacher_from
from hf_distill.training.pairs import check_dataset
from hf_distill.training.routers import RouterTelemetryCallback
from hf_distill.training.stages import check_fresh, finished_student, load_stage, stage_arguments, train_stage
from hf_distill.training.trainers import DistillDPOTrainer, DistillSFTTrainer

logger = logging.getLogger(__name__)

PROJECTORS = ("multi_modal_projector", "merger", "deepstack_merger_list", "connector", "embed_vision")
FEED_FORWARDS = ("mlp", "feed_forward", "block_sparse_moe")


# ---- one stage ------------------------------------------------------------------------------------------------------
def build_stage(
    student,
    teacher,
    train_dataset,
    config: LlavaModConfig,
    args,
    *,
    stage: str,
    processing_class=None,
    callbacks=None,
    **trainer_arguments,
):
    """The trainer of one stage; see `llava_mod.build_trainer`."""
    if stage != "preference":
        args = arguments_as(DistillSFTConfig, args, student)
    check_dataset(train_dataset, f"{stage} stage's")
    student, processing_class = load_student(student, args, processing_class, None)
    if stage == "sparse":
        student = sparse_student(student, config)
    if stage != "adaptor":
        teacher = teacher_from(teacher, args)
    if stage in ("dense", "sparse"):
        check_pictures(student, teacher, processing_class)
    train_only(student, stage)
    without_dropout(student)
    balanced = stage in ("sparse", "preference") and bool(routed_blocks(student))
    if balanced:
        check_routers(student)
        if config.aux_loss_coef:
            check_checkpointing(args)
        if not any(isinstance(callback, RouterTelemetryCallback) for callback in callbacks or ()):
            callbacks = [*(callbacks or ()), RouterTelemetryCallback("layer")]
    shared = dict(
        train_dataset=train_dataset, processing_class=processing_class, callbacks=callbacks, **trainer_arguments
    )
    if stage == "preference":
        own_inputs = isinstance(teacher, PrivilegedTeacher)
        teacher = teacher.teacher if own_inputs else teacher
        args = preference_arguments(args, config, balanced, own_inputs)
        trainer = DistillDPOTrainer(student, teacher=teacher, args=args, **shared)
        trainer.paper = CARD
    elif stage == "adaptor":
        trainer = DistillSFTTrainer(student, objective=adaptor_objective(), args=args, **shared)
    else:
        loss_type = config.dense_loss if stage == "dense" else config.sparse_loss
        objective = objective_for(student, config, loss_type)
        trainer = DistillSFTTrainer(student, teacher=teacher, objective=objective, args=args, **shared)
        trainer.data_collator = mimic_rows(trainer, config)
    compat.shard_own_layers(trainer.accelerator, trainer.model)
    if stage != "preference" and picture_format(base_model_of(student).config) is not None:
        collator = trainer.data_collator  # preference rows are checked by their own
        collator.base = WholePictures(collator.base, base_model_of(student).config)
    return trainer


def mimic_rows(trainer, config: LlavaModConfig) -> MimicRows:
    """The trainer's collator with the rows that KD counts.

    Raises:
        ValueError: rows that a cached or privileged teacher cannot follow; a `common_vocab` that one model has not.
    """
    base, teacher = trainer.data_collator, trainer.teacher
    marked = marks_rows(config.distill_tokens, config.mask_alignment)
    if marked and (base.readers or isinstance(teacher, PrivilegedTeacher)):
        raise ValueError(
            f"{teacher.name} has rows of its own, those of predicted answer tokens: distill_tokens="
            f"{config.distill_tokens!r} with mask_alignment={config.mask_alignment!r} needs a live teacher that reads "
            "the student's batch"
        )
    ours = base_model_of(trainer.model).get_output_embeddings().weight.shape[0]
    common = common_size(ours, teacher.vocabulary_size() or ours, config.common_vocab)
    return MimicRows(base, common, config.distill_tokens, config.mask_alignment)


def preference_arguments(args, config: LlavaModConfig, balanced: bool, own_inputs: bool) -> DistillDPOConfig:
    """The settings of stage 3; a DistillDPOConfig is taken as it is.

    Args:
        balanced: the student has routers.
        own_inputs: the teacher of the other stages prepares inputs of its own, so its processor reads the pairs too.
    """
    if isinstance(args, DistillDPOConfig):
        return args
    known = {f.name for f in fields(DistillDPOConfig) if f.init}
    given = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    given |= dict(
        loss_type=[config.preference_loss_type],
        beta=config.preference_beta,
        label_smoothing=config.preference_label_smoothing,
        aux_loss_coef=config.aux_loss_coef if balanced else 0.0,
        aux_loss_form=config.aux_loss_form,
        teacher_own_processor=own_inputs,
    )
    return DistillDPOConfig(**given)


def sparse_student(student: nn.Module, config: LlavaModConfig) -> nn.Module:
    """The student of stage 2: upcycled, unless it is sparse already, as the config says.

    Raises:
        ValueError: what `upcycle_to_moe` refuses; a sparse student with other experts than the config's.
    """
    blocks = routed_blocks(student)
    if not blocks:
        return upcycle_to_moe(student, **vars(config.upcycle_settings()))
    found = {(block.num_experts, block.top_k) for block in blocks.values()}
    if found != {(config.num_experts, config.top_k)}:
        raise ValueError(
            f"the student is sparse already, with (experts, active) {sorted(found)}, and the config asks for "
            f"num_experts={config.num_experts}, top_k={config.top_k}: give its own numbers, or its dense version"
        )
    return student


def check_routers(student: nn.Module) -> None:
    """Raises ValueError where a router cannot tell experts apart: ties send every token to the first ones."""
    for name, block in routed_blocks(student).items():
        weight = next(block.router.parameters())
        if weight.numel() and not weight.is_meta and bool((weight == weight[:1]).all()):
            raise ValueError(
                f"the router {name} gives all {block.num_experts} experts one score (zero-initialised?), so every "
                f"token goes to the first {block.top_k} and the others never learn: upcycle with router_std > 0"
            )


def check_checkpointing(args) -> None:
    """Raises ValueError for reentrant gradient checkpointing, under which a balance loss has no gradient."""
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing leaves the balance loss without a gradient: set "
            'gradient_checkpointing_kwargs={"use_reentrant": false}, or aux_loss_coef=0'
        )


def check_pictures(student: nn.Module, teacher: Teacher | None, processing_class) -> None:
    """One batch can feed both; a teacher with inputs of its own needs no more than the same answer tokens."""
    if teacher is None or teacher.config is None or isinstance(teacher, PrivilegedTeacher) or teacher.readers:
        return
    check_same_pictures(base_model_of(student).config, teacher.config, processing_class, teacher.tokenizer)


# ---- what trains ----------------------------------------------------------------------------------------------------
def train_only(student: nn.Module, stage: str) -> None:
    """Freeze what a stage leaves alone: stage 0 trains the projector, stage 1 the language model too, stages 2 and 3
    every feed-forward block (dense and expert), routers and the projector. The vision tower never trains.

    Raises:
        ValueError: no projector or no feed-forward blocks of a known name.
    """
    base = base_model_of(student)
    if base is not student:  # an adapter decides
        return
    projectors, language = projectors_of(base), base.get_decoder()
    if stage == "adaptor" and not projectors:
        raise ValueError(f"{type(base).__name__} has no projector to train: leave the adaptor stage out")
    trained = {"adaptor": [], "dense": [language, base.get_output_embeddings()]}.get(stage)
    if trained is None:
        trained = feed_forwards(language)
    base.requires_grad_(False)
    for module in (*projectors, *trained):
        module.requires_grad_(True)


def projectors_of(base: nn.Module) -> list[nn.Module]:
    """What maps pictures into the language model; none for text models.

    Raises:
        ValueError: a vision-language model whose projector has another name than those of PROJECTORS.
    """
    found = [module for name, module in base.named_modules() if name.rpartition(".")[2] in PROJECTORS]
    if not found and getattr(base.config, "vision_config", None) is not None:
        raise ValueError(f"{type(base).__name__} has none of the projectors {', '.join(PROJECTORS)}")
    return found


def feed_forwards(language: nn.Module) -> list[nn.Module]:
    found = [getattr(layer, name) for layer in language.layers for name in FEED_FORWARDS if hasattr(layer, name)]
    if len(found) != len(language.layers):
        raise ValueError(f"the layers of {type(language).__name__} have no block named {', '.join(FEED_FORWARDS)}")
    return found


def without_dropout(student: nn.Module) -> None:
    """Both models say one thing of one batch (paper); the teacher is in eval mode anyway."""
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# ---- one after the other --------------------------------------------------------------------------------------------
def check_run(config: LlavaModConfig, data: dict, peft_config, resume) -> None:
    """Raises ValueError for what a run cannot do, before anything is loaded."""
    if peft_config is not None:
        raise ValueError("the stages train weights: train one stage with an adapter by build_trainer(..., stage=...)")
    if isinstance(resume, str) and resume.lower() not in ("true", "last"):
        raise ValueError(
            f"resume_from_checkpoint={resume!r}: the stages know where they ended, so give True, with the same "
            "output_dir"
        )
    for stage in config.stage_names():
        if data[stage] is None and stage == "preference":
            raise ValueError("stage preference needs preference_dataset: pass it, or leave the stage out of stages")
        check_dataset(data[stage], f"{stage} stage's")


def run(student, teacher, data: dict, config: LlavaModConfig, args, *, of_stage, processing_class, callbacks, resume):
    """All stages of the config; returns the last one's student."""
    args = arguments_as(DistillSFTConfig, args, student)
    student, processing_class = load_student(student, args, processing_class, None)
    stages = config.stage_names()
    if "adaptor" in stages and not projectors_of(student):
        logger.info("%s reads no pictures: there is no adaptor stage", type(student).__name__)
        stages.remove("adaptor")
    folders = {stage: os.path.join(args.output_dir, f"{STAGES.index(stage)}_{stage}") for stage in stages}
    if not resume:
        check_fresh(list(folders.values()))
    teacher = teacher_from(teacher, args)
    if {"dense", "sparse"} & set(stages):
        check_pictures(student, teacher, processing_class)
    if "sparse" in stages and not routed_blocks(student):
        plan_upcycle(student, config.upcycle_settings())
    for stage, folder in folders.items():
        final = finished_student(folder)
        if final is None:
            logger.info("stage %s: %s", stage, folder)
            steps = getattr(config, f"{stage}_max_steps")
            trainer = build_stage(
                student,
                teacher,
                data[stage],
                config,
                stage_arguments(
                    args,
                    folder,
                    learning_rate=getattr(config, f"{stage}_learning_rate"),
                    max_steps=None if steps < 0 else steps,
                ),
                stage=stage,
                processing_class=processing_class,
                callbacks=list(callbacks or ()),
                **of_stage.get(stage, {}),
            )
            final = train_stage(trainer, resume=resume)
            del trainer
        student = load_stage(final, like=student)
    return student.eval()
