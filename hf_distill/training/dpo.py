"""Preference distillation: TRL's DPOTrainer with a teacher, of whatever family, as the reference model."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from hf_distill.curricula.preference import (
    DataCollatorForPreferenceDistillation,
    add_reference_ids,
    check_pairs_differ,
    check_same_pictures,
    collator_of,
    same_processor,
)
from hf_distill.heads import base_model_of, model_inputs
from hf_distill.losses import balance_loss, preference_loss
from hf_distill.objectives import Term
from hf_distill.signals import Signals
from hf_distill.students.routers import attach_router_outputs, routed_blocks
from hf_distill.teachers import CachedTeacher
from hf_distill.teachers.base import PREFIX, teacher_batch
from hf_distill.training import compat
from hf_distill.training.caches import read_reference
from hf_distill.training.config import DistillDPOConfig
from hf_distill.training.loading import arguments_as, load_student, teacher_from
from hf_distill.training.mixin import DistillMixin
from hf_distill.training.pairs import check_dataset, check_pair, check_reference

logger = logging.getLogger(__name__)

# what each of TRL's evaluation metrics is a mean over, by the start of its name
UNITS = {
    "rewards/": "pairs",
    "logps/": "pairs",
    "entropy": "tokens",
    "logits/chosen": "chosen tokens",
    "mean_token_accuracy": "chosen tokens",
    "logits/rejected": "rejected tokens",
}


class DistillDPOTrainer(DistillMixin, DPOTrainer):
    """DPOTrainer whose reference model is the teacher: another width, depth, padded vocabulary or family is fine.

    The student learns to tell good answers from bad ones better than its teacher does (LLaVA-MoD 2408.15881, stage 4).
    Everything not said here is DPOTrainer's, its mean per micro-batch included: micro-batches of a window count alike,
    whatever their sizes and ranks, so that only runs with the same micro-batches are the same run. Rewards and other
    values of an evaluation are means over all its pairs or tokens.

    A teacher of another family reads each pair through its own processor (`teacher_own_processor`): only the summed
    log-probabilities of its answers are compared with the student's.

    A sparse student's experts are kept in use by `aux_loss_coef` x (the balance loss of the chosen answers + that of
    the rejected ones), logged as `aux_loss`; also for vision-language models, whose outputs have no router logits.

    A CachedTeacher takes the reference out of training: build the trainer with the live teacher once and write
    `cache_teacher(teacher, trainer, folder, mode="scores")`, of evaluation data too; then train with `teacher=folder`.
    Unlike `precompute_ref_log_probs` it goes on after a kill, serves any `ld_alpha`, takes pictures, and an answer that
    was cut or tokenised otherwise is an error.

    Raises:
        ValueError: a teacher that is neither a FrozenTeacher nor such a CachedTeacher; a pair of equal answers, naming
            its row; a teacher that would read other tokens or pictures than those of the student's processor.
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
        check_pairs_differ(train_dataset)
        model, processing_class = load_student(model, args, processing_class, quantization_config, peft_config)
        self._reference_processor = _own_processor(teacher, processing_class, args)
        if self._reference_processor is None:
            _check_shared(model, teacher, processing_class, train_dataset, args)
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
        self._set_losses()
        self._set_balance()
        if data_collator is None:
            self._set_collator(train_dataset)
        if isinstance(teacher, CachedTeacher):
            read_reference(self, teacher)
        self.precompute_ref_logps = True  # the reference's log-probabilities are in the batch when TRL sees it
        self._eval_counts: list[dict[str, float]] = []

    def _set_losses(self) -> None:
        """TRL computes the losses it knows, `compute_loss` adds the others."""
        self._own_losses = self.args.own_losses
        weights = zip(self.loss_types, self.loss_weights, strict=True)
        kept = {name: weight for name, weight in weights if name not in self._own_losses}
        self.loss_types, self.loss_weights = list(kept), list(kept.values())

    def _set_balance(self) -> None:
        config = base_model_of(self.model).config.get_text_config()
        if self.args.aux_loss_coef:
            attach_router_outputs(self.model)
            self._top_k = next(iter(routed_blocks(self.model).values())).top_k
        elif getattr(config, "router_aux_loss_coef", 0.0) and routed_blocks(self.model):
            logger.warning(
                "%s declares a router balance loss, and aux_loss_coef is 0: its experts are not balanced",
                type(self.model).__name__,
            )

    def _set_collator(self, dataset) -> None:
        base, own = self.data_collator, self._reference_processor
        if self._is_vision_dataset and own is None and getattr(self.teacher.tokenizer, "image_processor", None):
            check_same_pictures(self.processing_class, self.teacher.tokenizer, next(iter(dataset)))
        self.data_collator = DataCollatorForPreferenceDistillation(
            base,
            None if own is None else collator_of(own, pictures=self._is_vision_dataset),
            vocabulary=self._common_vocabulary(),
        )

    # ---- the reference -----------------------------------------------------------------------------------------------
    def _prepare_dataset(self, dataset, processing_class, args, dataset_name: str):
        if self._reference_processor is not None:
            dataset = add_reference_ids(dataset, self._reference_processor)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        own = ["reference_prompt_ids", "reference_chosen_ids", "reference_rejected_ids"]
        if self._reference_processor is not None and not self._is_vision_dataset:
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *own]))

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        if not self.args.precompute_ref_log_probs:  # looked up, or said, batch by batch
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _with_reference(self, batch: dict) -> dict:
        """The student's part of a batch, with what the teacher says of its answers."""
        ours = {key: value for key, value in batch.items() if not key.startswith(PREFIX)}
        if "ref_chosen_logps" in ours:
            return ours
        own = teacher_batch(batch)
        if "labels" in own:
            own["completion_mask"] = (own["labels"] != -100).long()
        own = model_inputs(own)
        try:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model, own)
        except ValueError as error:
            if not self._is_vision_dataset or self._reference_processor is not None:
                raise
            raise ValueError(
                f"{self.teacher.name} cannot read a batch as the student's processor prepares it ({error}): give it "
                "its own, FrozenTeacher(model, processor) and teacher_own_processor=True"
            ) from error
        return ours | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    # ---- the loss ----------------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        inputs = self._with_reference(inputs)
        forward = _Heard(model)
        with self._router_logits() as router_logits:
            result = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        terms = {"preference": Term(loss, 1.0, "batch")} if self.loss_types else {}
        terms |= self._own_terms(forward.output.log_probs, inputs)
        if router_logits:
            balance = self._balance(router_logits[0], inputs["attention_mask"])
            terms["balance"] = Term(balance, self.args.aux_loss_coef, "batch")
        loss = sum(term.value * term.weight for term in terms.values())
        if self.model.training:
            self._dispatch("on_distill_loss", student=Signals(batch=inputs), teacher=None, terms=terms)
        else:
            self._eval_counts.append(self._counts_of(inputs["completion_mask"]))
        return (loss, outputs) if return_outputs else loss

    def _own_terms(self, log_probs: Tensor, inputs: dict) -> dict[str, Term]:
        if not self._own_losses:
            return {}
        # prompt-learning adapters put virtual tokens before the others
        policy = log_probs[:, 1 - inputs["input_ids"].shape[1] :].sum(1).chunk(2)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        smoothing = self.args.label_smoothing
        return {
            name: Term(preference_loss(*policy, *reference, self.beta, name, smoothing)[0], weight, "batch")
            for name, weight in self._own_losses.items()
        }

    def _balance(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """The balance loss of the chosen half of a batch and that of the rejected one."""
        form, total = self.args.aux_loss_form, 0.0
        for half, own in enumerate(mask.chunk(2)):
            layers = [logits.chunk(2)[half] for logits in router_logits]
            total = total + balance_loss(layers, self._top_k, form, own)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["aux_loss"].append(self.accelerator.reduce(total.detach(), "mean").item())
        return total

    @contextlib.contextmanager
    def _router_logits(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """What the routers said in each forward of the student, while it is open; nothing without a balance loss."""
        heard: list[tuple[Tensor, ...]] = []
        if not self.args.aux_loss_coef:
            yield heard
            return
        backbone = base_model_of(self.accelerator.unwrap_model(self.model)).base_model
        handles = (
            backbone.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
            ),
            backbone.register_forward_hook(lambda module, args, output: heard.append(output.router_logits)),
        )
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    # ---- what is told ------------------------------------------------------------------------------------------------
    def _counts_of(self, completion_mask: Tensor) -> dict[str, float]:
        """Of an evaluation batch, on all ranks together."""
        chosen, rejected = (half[:, 1:].sum() for half in completion_mask.chunk(2))
        pairs = torch.full_like(chosen, completion_mask.shape[0] // 2)
        counts = self.accelerator.reduce(torch.stack([pairs, chosen, rejected]), "sum").tolist()
        named = dict(zip(("pairs", "chosen tokens", "rejected tokens"), counts, strict=True))
        return named | {"tokens": counts[1] + counts[2]}

    def _weigh_evaluation(self) -> None:
        """TRL means batches, the last and shorter one too: here all pairs, or tokens, count alike."""
        counts, self._eval_counts = self._eval_counts, []
        metrics = self._metrics["eval"]
        for name, values in metrics.items():
            unit = next((unit for start, unit in UNITS.items() if name.startswith(start)), None)
            if unit is not None and len(values) == len(counts):
                total = sum(value * count[unit] for value, count in zip(values, counts, strict=True))
                metrics[name] = [total / max(sum(count[unit] for count in counts), 1)]

    def _running_tensors(self) -> dict[str, Tensor]:
        """TRL's own values since the last log, and the tokens it has counted."""
        values = {f"metric.{k}": torch.tensor(v, dtype=torch.float64) for k, v in self._metrics["train"].items()}
        return values | {"tokens": torch.tensor(self._total_train_tokens)}

    def _restore_running_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._total_train_tokens = int(tensors.pop("tokens"))
        for name, values in tensors.items():
            self._metrics["train"][name.removeprefix("metric.")] = values.tolist()

    def log(self, logs: dict, start_time: float | None = None) -> None:
        self._require_finite(logs.get("loss", 0.0))
        if not self.model.training:
            self._weigh_evaluation()
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        self._require_finite(getattr(self, "_tr_loss", 0.0))

    def _require_finite(self, loss) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became NaN or infinite by step {self.state.global_step}; nothing was saved since. Lower the "
                "learning rate or clip gradients (max_grad_norm)"
            )


class _Heard:
    """A model, and what it gave when it was first called."""

    def __init__(self, model: nn.Module):
        self.model, self.output = model, None

    def __call__(self, **inputs):
        output = self.model(**inputs)
        self.output = output if self.output is None else self.output
        return output


def _own_processor(teacher, processing_class, args):
    """The processor through which the teacher reads the pairs itself; None: it reads the student's tokens."""
    if not args.teacher_own_processor:
        return None
    own = teacher.tokenizer
    if own is None:
        raise ValueError(
            f"teacher_own_processor needs the teacher's tokenizer or processor, and {teacher.name} came without one: "
            "pass FrozenTeacher(model, processor)"
        )
    if same_processor(own, processing_class):
        return None
    if args.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs reads the student's tokens, teacher_own_processor the teacher's: leave one out"
        )
    return own


def _check_shared(model: nn.Module, teacher, processing_class, dataset, args) -> None:
    try:
        check_pair(model, teacher, processing_class, dataset, args)
    except ValueError as error:
        raise ValueError(f"{error}. A teacher of another family reads pairs itself: teacher_own_processor") from error
