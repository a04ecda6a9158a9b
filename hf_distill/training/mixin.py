"""What makes a Trainer distil: teacher and objective in the step, one scaling step, exact evaluation."""

from __future__ import annotations

import itertools
import logging
import zlib

import torch
from datasets import IterableDataset
from torch import Tensor, nn

from hf_distill.curricula.collators import DataCollatorForDistillation
from hf_distill.heads import (
    base_model_of,
    check_head,
    collect,
    has_row_labels,
    labels_are_shifted,
    labels_of,
    rows_of,
    runs_dense,
)
from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.training import compat
from hf_distill.training.caches import attach_readers
from hf_distill.training.callbacks import DistillCallback, StepCallback
from hf_distill.training.checks import check_launcher
from hf_distill.training.evaluation import EvaluatesExactly, observable
from hf_distill.training.parts import TrainsParts
from hf_distill.training.publishing import PublishesStudent
from hf_distill.training.saving import KEY, SavesObjective

logger = logging.getLogger(__name__)


class DistillMixin(EvaluatesExactly, SavesObjective, PublishesStudent, TrainsParts):
    """Stands before Trainer, SFTTrainer or DPOTrainer in a class's bases. Everything not said here is the parent's."""

    loss_is_scaled_for_ga = True  # it divides by the global count, in `_scaled`, for every trainer

    # ---- construction ------------------------------------------------------------------------------------------------
    def _attach(self, teacher: Teacher | None, objective: Objective | None) -> None:
        """After the parent's `__init__`: put teacher and objective in place, and check what can be checked."""
        check_launcher(self.accelerator, self.args)
        if self.accelerator.num_processes > 1:
            compat.close_gloo_at_exit()
        if str(getattr(self.accelerator.state.dynamo_plugin, "backend", "NO")).split(".")[-1] != "NO":
            raise ValueError("the launcher's dynamo backend compiles the whole model; use --torch_compile instead")
        if objective is not None:
            self._check_settings()
        self.teacher, self._shift = teacher, labels_are_shifted(self.model)
        self._redirect = compat.ForwardRedirection()
        self._window: dict[str, Tensor] = {}
        self._window_sums: dict[str, tuple[Tensor, str]] = {}
        self._log_sums: Tensor | None = None  # per name of `_names`
        self._resumed_sums: dict[str, Tensor] = {}
        self._log_steps = 0
        self._wrapped: nn.Module | None = None
        self._names: list[str] | None = None
        self._first_bad: Tensor | None = None  # per name, the first step at which it was not finite
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._resumed: dict[str, Tensor] | None = None
        self._wrote_checkpoints = False
        self._frozen_head: Tensor | None = None
        if teacher is not None:
            teacher.attach(self.model)
            self._check_teacher(teacher, objective)
        if objective is not None:
            self._attach_objective(objective, teacher)
        attach_readers(self, teacher, objective)
        if teacher is not None:
            teacher.prepare(self.accelerator)
        self._compile_backbone()
        self.callback_handler.callbacks.insert(0, StepCallback(self))
        for callback in self._distill_callbacks():
            callback.dispatch = self._dispatch

    def _attach_objective(self, objective: Objective, teacher: Teacher | None) -> None:
        base = base_model_of(self.model)
        self._dense = self.args.dense_logits or runs_dense(base)
        if not self.args.dense_logits and "logits" in objective.needs_of("student"):
            check_head(self.model, "student")
        objective.setup(self.model, teacher)
        self._hang_peer(objective, teacher)
        objective.to(self.args.device)
        if "logits" not in objective.needs_of("student"):
            self._without_gradient_of_the_head(base)
        compat.shard_apart(self.accelerator, self.model, objective)
        self.model.add_module(KEY, objective)
        self._objective = objective
        self._check_inner()
        if not isinstance(self.data_collator, DataCollatorForDistillation) and has_row_labels(self.model):
            self.data_collator = DataCollatorForDistillation(
                self.data_collator,
                shift=self._shift,
                vocabulary=self._common_vocabulary(),
                labels_of=labels_of(self.model),
            )

    def _without_gradient_of_the_head(self, base: nn.Module) -> None:
        """A parameter without a gradient stops DDP at its second step, and has no optimizer state to resume."""
        head = base.get_output_embeddings()
        tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)  # image models have none
        if head is not None and not tied:
            self._frozen_head = head.weight.requires_grad_(False)
        if self.args.ddp_find_unused_parameters is None:  # a head's bias, a pooler, layers above the last one read
            compat.find_unused_parameters(self.accelerator)

    @property
    def objective(self) -> Objective | None:
        return getattr(self, "_objective", None)

    def _common_vocabulary(self) -> int | None:
        """Ids that the teacher can read; None where one side has no vocabulary (or labels index no vocabulary)."""
        ours = base_model_of(self.model).get_output_embeddings()
        theirs = None if self.teacher is None else self.teacher.vocabulary_size()
        return None if ours is None or theirs is None else min(ours.weight.shape[0], theirs)

    def _check_teacher(self, teacher: Teacher, objective: Objective | None) -> None:
        if objective is None:
            return
        missing = objective.needs_of("teacher") - teacher.gives
        if missing:
            raise ValueError(
                f"{type(objective).__name__} needs {', '.join(sorted(missing))} of its teacher, "
                f"{type(teacher).__name__} gives only {', '.join(sorted(teacher.gives)) or 'scores or text'}: use a "
                "FrozenTeacher, or another objective"
            )
        if "logits" in objective.needs_of("teacher"):
            teacher.check()
        ours, theirs = getattr(self.model.config, "num_labels", None), getattr(teacher.config, "num_labels", None)
        if (
            not has_row_labels(self.model)
            and "logits" in objective.needs
            and None not in (ours, theirs)
            and ours != theirs
        ):
            raise ValueError(f"the student has {ours} classes and the teacher {theirs}: give both the same num_labels")

    def _check_settings(self) -> None:
        """Refused by name: what would be ignored, and ways of feeding ranks that hide repeated or uneven rows."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs: start one process each with accelerate launch, or show it "
                "one (CUDA_VISIBLE_DEVICES=0); torch.nn.DataParallel is not supported"
            )
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor does not apply, the objective is the loss: set it to 0")
        if self.accelerator.num_processes == 1:
            return
        compat.check_dataloading(self.accelerator)
        if isinstance(self.train_dataset, IterableDataset) and not self.args.dataloader_drop_last:
            raise ValueError(
                "an IterableDataset on several processes needs dataloader_drop_last=True: its last batch is filled up "
                "with repeated examples that cannot be told apart"
            )
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if any(isinstance(dataset, IterableDataset) for dataset in sets):
            raise ValueError("evaluate an IterableDataset on one process, or give a map-style eval_dataset")

    def _compile_backbone(self) -> None:
        if self.args.compile_options is None:
            return
        base = base_model_of(self.model)
        if base.base_model is base:
            raise ValueError(f"torch_compile compiles a backbone, and {type(base).__name__} has none; leave it off")
        options = self.args.compile_options
        base.base_model.compile(backend=options["backend"], mode=options["mode"])

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        collator = self.data_collator
        extra = ()
        if isinstance(collator, DataCollatorForDistillation):
            extra = (*collator.token_columns, *collator.example_columns)
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        names = getattr(dataset, "column_names", None) or []
        extra = (*extra, *(n for n in names if isinstance(n, str) and n.startswith("teacher_")))
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra]))

    # ---- events ------------------------------------------------------------------------------------------------------
    def _distill_callbacks(self) -> list[DistillCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, DistillCallback)]

    def _dispatch(self, event: str, **values) -> None:
        for callback in self._distill_callbacks():
            getattr(callback, event)(self.args, self.state, self.control, **values)

    # ---- one batch ---------------------------------------------------------------------------------------------------
    @property
    def progress(self) -> float:
        """Optimizer steps done / all steps."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _counts(self, batch: dict) -> dict[str, int]:
        """Items of this micro-batch per unit, known on the host from shapes."""
        if "loss_rows" in batch:
            tokens, samples = batch["loss_rows"].shape[0], batch["document_example"].shape[0]
        else:
            tokens = samples = 0 if batch.get("only_repeats") else _first_tensor(batch).shape[0]
        return {"token": tokens, "sample": samples, "batch": int(samples > 0)} | self.objective.count(batch)

    def _signals(self, model: nn.Module, batch: dict, observed: dict | None = None):
        """Teacher, student and terms of one micro-batch. Runs inside the wrapped model's forward."""
        objective = getattr(model, KEY, self._objective)  # `student()` takes it off the model
        counts = self._counts(batch)
        batch = {k: v for k, v in batch.items() if k != "only_repeats"}
        with self.accelerator.autocast():
            extra = frozenset({"logits"}) if observed else frozenset()  # evaluation measures more than the terms
            teacher = None
            if self.teacher is not None and (objective.uses_teacher or extra & self.teacher.gives):
                teacher = self.teacher(batch, objective.needs_of("teacher") | extra & self.teacher.gives)
                self._dispatch("on_teacher_forward", teacher=teacher, batch=batch)
            needs = objective.needs_of("student") | extra
            student = collect(model, batch, needs, rows_of(batch), dense=self._dense)
            if observed is not None:
                observed = observable(observed, student, teacher)
            megabytes = self.args.tile_megabytes
            terms = objective(
                student,
                teacher,
                self.progress,
                observed=observed,
                tile_bytes=None if megabytes is None else megabytes * 2**20,
                engine=self.args.loss_engine,
            )
        # a mean over no items is nan; its share of the whole is nothing, but it stays in the graph
        empty = {name: t._replace(value=t.value.nan_to_num()) for name, t in terms.items() if not counts[t.per]}
        return student, teacher, terms | empty

    def _training_loss(self, model: nn.Module, batch: dict) -> Tensor:
        student, teacher, terms = self._signals(model, batch, self._observed())
        counts = self._counts(batch)
        self._dispatch("on_distill_loss", student=student, teacher=teacher, terms=terms)
        for name, term in terms.items():
            total = term.value.detach() * counts[term.per]
            before = self._window_sums.get(name)
            self._window_sums[name] = (total if before is None else before[0] + total, term.per)
        return self._scaled(terms, counts)

    def _observed(self) -> dict | None:
        """What callbacks measure beside the objective's logit terms; nothing where it has none."""
        read = self.objective.needs_of("student") & self.objective.needs_of("teacher")
        if self.teacher is None or "logits" not in read or not self.objective.uses_teacher:
            return None
        return {name: d for callback in self._distill_callbacks() for name, d in callback.observed.items()} or None

    def _scaled(self, terms: dict, counts: dict[str, int]) -> Tensor:
        """The one scaling step: this micro-batch's share of the global mean, times the ranks that DDP averages over."""
        world = self.accelerator.num_processes // self.get_tp_size()
        return sum(
            term.value * (term.weight * counts[term.per] * world) / self._window[term.per] for term in terms.values()
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        if self.objective is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed after its end: the parent would take one more
            self.control.should_training_stop = True
            return [], None
        batches = []
        for batch in itertools.islice(epoch_iterator, num_batches):
            batches.append(self._without_repeats(self._replaced(batch, len(batches))))
        self._count_window(batches, device)
        self._window_sums = {}
        self._before_optimizer_step(batches)
        return batches, None

    def _replaced(self, batch: dict, micro_batch: int) -> dict:
        """What is learnt from in a micro-batch's place, before anything is counted; see `training.onpolicy`."""
        return batch

    def _count_window(self, batches: list[dict], device: torch.device) -> None:
        counts = [self._counts(batch) for batch in batches]
        units = sorted(set().union(*counts)) if counts else []
        totals = torch.tensor([sum(c.get(u, 0) for c in counts) for u in units], dtype=torch.int64).to(
            device, non_blocking=True
        )
        seen = [_tokens_in(batch, device) for batch in batches]
        totals = self.accelerator.reduce(
            torch.cat([totals, sum(seen, torch.zeros(1, dtype=torch.int64, device=device))]), "sum"
        )
        self._tokens = self._tokens + totals[-1] // self.get_tp_size()
        self._window = dict(zip(units, totals[:-1].clamp(min=1).float().unbind(), strict=True))

    def _without_repeats(self, batch: dict) -> dict:
        """The batch without the examples that were repeated to give every rank as many (last batch only)."""
        keep = compat.real_samples(self.accelerator)
        if keep is None:
            return batch
        if "loss_rows" in batch:
            kept = batch["document_example"] < keep  # documents stand in the order of their examples
            batch = dict(batch)
            for prefix in ("", "teacher_"):
                if prefix + "loss_rows" in batch:  # the teacher's last: what is read of a cache belongs to its tokens
                    rows = kept[batch[prefix + "row_document"]]
                    batch |= {prefix + k: batch[prefix + k][rows] for k in ("loss_rows", "row_labels", "row_document")}
                    batch[prefix + "document_example"] = batch[prefix + "document_example"][kept]
            batch |= {key: batch[key][rows] for key in getattr(self.data_collator, "row_keys", ())}
            batch |= {key: batch[key][kept] for key in getattr(self.data_collator, "document_keys", ())}
            return batch
        size = _first_tensor(batch).shape[0]
        if keep >= size:
            return batch
        cut = {k: v[: max(keep, 1)] if torch.is_tensor(v) and v.shape[:1] == (size,) else v for k, v in batch.items()}
        return cut | ({"only_repeats": True} if keep == 0 else {})

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._wrapped is not model:  # unwrapping looks for installed packages at every call
            self._wrapped, self._unwrapped = model, self.accelerator.unwrap_model(model)
        unwrapped = self._unwrapped
        loss = self._redirect(model, unwrapped, self._training_loss, unwrapped, inputs)
        return (loss, {}) if return_outputs else loss

    # ---- once per optimizer step -------------------------------------------------------------------------------------
    def _after_optimizer_step(self) -> None:
        if self.objective is None or not self._window_sums:
            return
        names = sorted(self._window_sums)
        self._check_names(names)
        sums = torch.stack([self._window_sums[name][0].float() for name in names])
        sums = self.accelerator.reduce(sums, "sum") / self.get_tp_size()
        means = sums / torch.stack([self._window[self._window_sums[name][1]] for name in names])
        bad = torch.where(means.isfinite(), torch.inf, float(self.state.global_step))
        self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)
        if self._resumed_sums:
            self._log_sums = torch.stack([self._resumed_sums.get(name, means.new_zeros(())) for name in names])
            self._resumed_sums = {}
        self._log_sums = means if self._log_sums is None else self._log_sums + means
        self._log_steps += 1
        self._window_sums = {}
        observed = self._observed() or {}
        terms = {name: mean for name, mean in zip(names, means.unbind(), strict=True) if name not in observed}
        if self.teacher is not None:
            self.teacher.after_step(self.state.global_step)
        self.objective.after_step(terms, self.progress)
        self._dispatch("on_distill_step", terms=terms, objective=self.objective)

    def _check_names(self, names: list[str]) -> None:
        """Ranks that add up different terms would wait for each other for ever."""
        if names == self._names:
            return
        if self._names is not None:
            raise RuntimeError(
                f"the terms changed from {', '.join(self._names)} to {', '.join(names)}: an objective gives the same "
                "names at every step; a term that does not count now weighs 0"
            )
        self._names = names
        codes = self.accelerator.gather(torch.tensor([zlib.crc32(" ".join(names).encode())], device=self.args.device))
        if len(set(codes.tolist())) > 1:
            raise RuntimeError(
                f"ranks have different terms, this one {', '.join(names)}: an objective gives the same names on every "
                "rank; a term that does not count here weighs 0"
            )

    def _check_finite(self) -> None:
        """Read the kept flags; the only place that waits for the device. Raises FloatingPointError."""
        steps = [] if self._first_bad is None else self._first_bad.tolist()
        measured = self._observed() or {}
        for name, step in zip(self._names or (), steps, strict=False):
            if step < float("inf") and name not in measured:
                raise FloatingPointError(
                    f"term {name!r} became NaN or infinite at step {int(step)}; nothing was saved after that step. "
                    "Lower the learning rate, clip gradients (max_grad_norm), or use bf16/float32 instead of fp16"
                )

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if self.objective is not None and "loss" in logs:
            self._check_finite()
            observed, sums = self._observed() or {}, [] if self._log_sums is None else self._log_sums.tolist()
            for name, total in zip(self._names or (), sums, strict=False):
                logs[name if name in observed else f"loss/{name}"] = total / max(self._log_steps, 1)
            self._log_sums, self._log_steps = None, 0
            logs |= {key: float(value) for key, value in self.objective.logs().items()}
            logs["num_tokens"] = int(self._tokens)
            self._dispatch("on_distill_log", logs=logs, accelerator=self.accelerator)
        super().log(logs, start_time)


def _first_tensor(batch: dict) -> Tensor:
    if torch.is_tensor(batch.get("labels")):
        return batch["labels"]
    return next(v for v in batch.values() if torch.is_tensor(v))


def _tokens_in(batch: dict, device: torch.device) -> Tensor:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return mask.sum(dtype=torch.int64).to(device).reshape(1)
    return torch.tensor([0 if ids is None else ids.numel()], dtype=torch.int64).to(device)
