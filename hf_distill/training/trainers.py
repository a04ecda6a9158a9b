"""The trainers: Hugging Face's and TRL's, with a teacher."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import fields

from datasets import IterableDataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
from trl import DPOTrainer, SFTTrainer

from hf_distill.heads import is_encoder_decoder
from hf_distill.objectives import LogitKD, Objective
from hf_distill.teachers import AdapterOffTeacher, CachedTeacher, Teacher, load_teacher
from hf_distill.training import compat
from hf_distill.training.caches import read_reference
from hf_distill.training.checks import check_adapter, check_processes
from hf_distill.training.config import DistillConfig, DistillDPOConfig, DistillSFTConfig
from hf_distill.training.mixin import DistillMixin
from hf_distill.training.pairs import check_columns, check_dataset, check_pair, check_prepared, check_reference

logger = logging.getLogger(__name__)


def arguments_as(kind: type, args, model):
    """The run's settings as `kind`; plain TrainingArguments are taken over, None gives defaults.

    Raises:
        RuntimeError: the launcher promised other processes than there are; said before anything is loaded.
    """
    args = _as(kind, args, model)
    check_processes(args.world_size)
    return args


def _as(kind: type, args, model):
    if isinstance(args, kind):
        return args
    if args is None:
        name = model if isinstance(model, str) else type(model).__name__
        return kind(output_dir=f"{os.path.basename(name)}-distilled")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be {kind.__name__} or TrainingArguments, got {type(args).__name__}")
    known = {f.name for f in fields(kind) if f.init}
    given = {k: getattr(args, k) for k in (f.name for f in fields(args) if f.init) if k in known}
    return kind(**given)


def teacher_from(teacher, args, quantization_config=None) -> Teacher | None:
    """The teacher of a run: what was passed, or what the settings name.

    Raises:
        ValueError: both are given and differ; no teacher where the path is wrong.
    """
    if args.teacher_adapter_off:
        if teacher is not None or args.teacher_model_name_or_path is not None:
            raise ValueError("teacher_adapter_off takes the student's base as the teacher: give no other teacher")
        return AdapterOffTeacher(dense_logits=args.dense_logits)
    if teacher is None:
        teacher = args.teacher_model_name_or_path
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    options = {"dense_logits": args.dense_logits}
    if isinstance(teacher, (str, os.PathLike)):
        options |= {
            "revision": args.teacher_model_revision,
            "load_in_8bit": args.teacher_load_in_8bit,
            "load_in_4bit": args.teacher_load_in_4bit,
            "quantization_config": quantization_config,
            "trust_remote_code": bool(getattr(args, "trust_remote_code", False)),
            **(args.teacher_model_init_kwargs or {}),
        }
        if args.teacher_dtype is not None:
            options["dtype"] = args.teacher_dtype
    elif args.teacher_load_in_8bit or args.teacher_load_in_4bit or quantization_config is not None:
        raise ValueError("the teacher was passed as a model: quantise it when loading, or pass its path")
    return load_teacher(teacher, **options)


def _require(objective: Objective | None, teacher: Teacher | None, args) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective (for example LogitKD()), got {type(objective).__name__}")
    if objective.uses_teacher and teacher is None:
        raise ValueError(
            f"{type(objective).__name__} needs a teacher: pass teacher=, or --teacher_model_name_or_path, "
            "or teacher_adapter_off with a LoRA student"
        )
    if args.measure_teacher_fidelity and getattr(teacher, "quantised_from", None) is None:
        raise ValueError(
            "measure_teacher_fidelity compares a quantised teacher with its full precision, but "
            f"{getattr(teacher, 'name', 'no teacher')} was not loaded quantised from a path: add teacher_load_in_4bit, "
            "teacher_load_in_8bit or teacher_quantization_config, or leave it 0"
        )


def load_student(model: nn.Module | str, args, processing_class, quantization_config, peft_config=None) -> tuple:
    """The student and its tokenizer or processor: loaded where a Hub id or folder is given, in float32 as TRL does.

    Raises:
        ValueError: it is no model; or it is a sparse one whose experts and routers `peft_config` would leave frozen.
    """
    if not isinstance(model, (str, os.PathLike)):
        check_adapter(model, peft_config)
        return model, processing_class
    path, trust = os.fspath(model), bool(getattr(args, "trust_remote_code", False))
    processing_class = processing_class or compat.load_processing_class(path, trust_remote_code=trust)
    options = {"quantization_config": quantization_config, "dtype": "float32", "trust_remote_code": trust}
    if getattr(args, "model_init_kwargs", None):
        options |= args.model_init_kwargs
        args.model_init_kwargs = None  # TRL's trainers take them for a path only
    set_seed(args.seed)
    model = compat.load_model(path, what="student", **options)
    check_adapter(model, peft_config)
    return model, processing_class


class DistillTrainer(DistillMixin, Trainer):
    """Trainer with a teacher: classification, encoders, encoder-decoders. Everything not said here is Trainer's.

    Args:
        model: the student: a model, or a Hub id / folder.
        teacher: a Hub id, folder, model or any Teacher; None takes `args.teacher_model_name_or_path`.
        objective: what to train for; None is forward KL on the logits, `LogitKD()`.
        args: DistillConfig (TrainingArguments are taken over).
        quantization_config, teacher_quantization_config: bitsandbytes settings of each side, when loaded from a path.
    """

    _tag_names = ["hf_distill"]

    def __init__(
        self,
        model: nn.Module | str,
        *,
        teacher=None,
        objective: Objective | None = None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        quantization_config=None,
        teacher_quantization_config=None,
    ):
        args = arguments_as(DistillConfig, args, model)
        objective = LogitKD() if objective is None else objective
        teacher = teacher_from(teacher, args, teacher_quantization_config)
        _require(objective, teacher, args)
        check_dataset(train_dataset, "train")
        set_seed(args.seed)
        model, processing_class = load_student(model, args, processing_class, quantization_config, peft_config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if teacher is not None:
            check_pair(model, teacher, processing_class, train_dataset, args)
        if data_collator is None and is_encoder_decoder(model) and processing_class is not None:
            data_collator = DataCollatorForSeq2Seq(processing_class, label_pad_token_id=-100)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._attach(teacher, objective)


class DistillSFTTrainer(DistillMixin, SFTTrainer):
    """SFTTrainer with a teacher. Everything not said here is SFTTrainer's; arguments as DistillTrainer's.

    The objective is the loss: `args.loss_type` is refused, and a MoE student's balance loss is left out, said aloud.
    """

    _tag_names = ["hf_distill", "trl"]

    def __init__(
        self,
        model: nn.Module | str,
        *,
        teacher=None,
        objective: Objective | None = None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        quantization_config=None,
        teacher_quantization_config=None,
    ):
        args = arguments_as(DistillSFTConfig, args, model)
        objective = LogitKD() if objective is None else objective
        teacher = teacher_from(teacher, args, teacher_quantization_config)
        _require(objective, teacher, args)
        if args.loss_type not in (None, "nll"):
            raise ValueError(f"loss_type={args.loss_type!r} does not apply, the objective is the loss: leave it unset")
        check_dataset(train_dataset, "train")
        check_columns(train_dataset, args)
        model, processing_class = load_student(model, args, processing_class, quantization_config, peft_config)
        if teacher is not None:
            check_pair(model, teacher, processing_class, train_dataset, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if not self._skip_prepare_dataset and not isinstance(self.train_dataset, IterableDataset):
            check_prepared(self.train_dataset, train_dataset, args)
        if self.aux_loss_enabled:
            logger.warning(
                "%s declares a router balance loss, which the objective does not hold: its experts are not balanced",
                type(self.model).__name__,
            )
        self._attach(teacher, objective)

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "base", data_collator))


class DistillDPOTrainer(DistillMixin, DPOTrainer):
    """DPOTrainer whose reference model is the teacher: another width, depth or padded vocabulary is fine.

    The student learns to tell good answers from bad ones better than its teacher does (LLaVA-MoD 2408.15881, stage 4).
    Everything not said here is DPOTrainer's. A CachedTeacher takes the reference out of training: build the trainer
    with the live teacher once and write `cache_teacher(teacher, trainer, folder, mode="scores")`, of evaluation data
    too; then train with `teacher=folder`. Unlike `precompute_ref_log_probs` it goes on after a kill, serves any
    `ld_alpha`, takes pictures, and an answer that was cut or tokenised otherwise is an error.

    Raises:
        ValueError: a teacher that is neither a FrozenTeacher nor such a CachedTeacher.
    """

    loss_is_scaled_for_ga = False  # DPOTrainer's own mean per micro-batch
    _tag_names = ["hf_distill", "trl"]

    def __init__(
        self,
        model: nn.Module | str,
        *,
        teacher=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        quantization_config=None,
        teacher_quantization_config=None,
    ):
        args = arguments_as(DistillDPOConfig, args, model)
        teacher = teacher_from(teacher, args, teacher_quantization_config)
        check_reference(teacher, args)
        if args.measure_teacher_fidelity:
            raise ValueError("measure_teacher_fidelity does not read preference pairs: use it in DistillSFTTrainer")
        check_dataset(train_dataset, "train")
        model, processing_class = load_student(model, args, processing_class, quantization_config, peft_config)
        check_pair(model, teacher, processing_class, train_dataset, args)
        super().__init__(
            model=model,
            ref_model=compat.NoReference() if isinstance(teacher, CachedTeacher) else teacher.model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self._attach(None, None)
        self.teacher = teacher
        if isinstance(teacher, CachedTeacher):
            read_reference(self, teacher)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        if isinstance(self.ref_model, compat.NoReference):  # looked up batch by batch
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def log(self, logs: dict, start_time: float | None = None) -> None:
        self._require_finite(logs.get("loss", 0.0))
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        self._require_finite(getattr(self, "_tr_loss", 0.0))

    def _require_finite(self, loss) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became NaN or infinite by step {self.state.global_step}; nothing was saved since. Lower the "
                "learning rate or clip gradients (max_grad_norm)"
            )


def trainer_for(args) -> type[DistillMixin]:
    """Which trainer a run's settings belong to: the settings' class decides."""
    kinds = {DistillSFTConfig: DistillSFTTrainer, DistillDPOConfig: DistillDPOTrainer, DistillConfig: DistillTrainer}
    for config, trainer in kinds.items():
        if isinstance(args, config):
            return trainer
    raise TypeError(f"args must be one of {', '.join(c.__name__ for c in kinds)}, got {type(args).__name__}")
