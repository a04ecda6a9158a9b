"""The trainers: Hugging Face's and TRL's, with a teacher."""

from __future__ import annotations

import logging

from datasets import IterableDataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed
from trl import SFTTrainer

from hf_distill.heads import is_encoder_decoder
from hf_distill.objectives import LogitKD, Objective
from hf_distill.training.config import DistillConfig, DistillDPOConfig, DistillSFTConfig
from hf_distill.training.cross_tokenizer import AcrossTokenizers, uld_of
from hf_distill.training.dpo import DistillDPOTrainer
from hf_distill.training.loading import arguments_as, load_student, require_teacher, teacher_from
from hf_distill.training.mixin import DistillMixin
from hf_distill.training.onpolicy import WritesText
from hf_distill.training.pairs import check_columns, check_dataset, check_pair, check_prepared

logger = logging.getLogger(__name__)


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
        require_teacher(objective, teacher, args)
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


class DistillSFTTrainer(WritesText, DistillMixin, SFTTrainer):
    """SFTTrainer with a teacher. Everything not said here is SFTTrainer's; arguments as DistillTrainer's.

    With `args.lmbda` the student learns from its own samples too, with `args.seq_kd` from the teacher's
    (docs/on_policy.md).

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
        require_teacher(objective, teacher, args)
        if args.loss_type not in (None, "nll"):
            raise ValueError(f"loss_type={args.loss_type!r} does not apply, the objective is the loss: leave it unset")
        check_dataset(train_dataset, "train")
        check_columns(train_dataset, args)
        model, processing_class = load_student(model, args, processing_class, quantization_config, peft_config)
        uld = uld_of(objective)
        if uld is not None:
            across = AcrossTokenizers(uld, model, teacher, processing_class, args, data_collator)
            teacher, args, data_collator = across.teacher, across.args, across.collator
            train_dataset, eval_dataset = across.align(train_dataset), across.align(eval_dataset)
        elif teacher is not None:
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
        self._attach_writing()

    def _reject_skip_prepare_without_labels(self, datasets, data_collator) -> None:
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "base", data_collator))


def trainer_for(args) -> type[DistillMixin]:
    """Which trainer a run's settings belong to: the settings' class decides."""
    kinds = {DistillSFTConfig: DistillSFTTrainer, DistillDPOConfig: DistillDPOTrainer, DistillConfig: DistillTrainer}
    for config, trainer in kinds.items():
        if isinstance(args, config):
            return trainer
    raise TypeError(f"args must be one of {', '.join(c.__name__ for c in kinds)}, got {type(args).__name__}")
