"""Evaluation that does not depend on batch size, ranks or padding: means over all rows or documents of the set."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.heads import model_inputs
from hf_distill.losses import Agreement, ForwardKL, LabelCrossEntropy
from hf_distill.losses.sparse import same_temperature
from hf_distill.signals import SampledLogits, SparseLogits
from hf_distill.training import compat

_OBSERVED = {"teacher_kl": ForwardKL(), "agreement": Agreement(), "cross_entropy": LabelCrossEntropy()}


@contextlib.contextmanager
def random_state_kept(device: torch.device):
    """Training draws the same numbers after an evaluation as without it."""
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = device.type if device.type not in ("cpu", "mps") else None
    try:
        with torch.random.fork_rng(devices=[device] if accelerator else [], device_type=accelerator or "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class EvaluatesExactly:
    """Trainer hooks of evaluation and prediction; every term, and what the signals tell for free, beside the loss."""

    _eval_totals: dict[str, tuple] | None = None
    eval_observed: dict = {}  # more values to measure beside the terms, in the same projection

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        """A collator that augments has the one that evaluates as `clean`."""
        collator = self.data_collator
        self.data_collator = collator if is_training else getattr(collator, "clean", collator)
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        if self.objective is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        batch = self._without_repeats(inputs)
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad():
            loss, logits = self._redirect(model, unwrapped, self._evaluate_batch, unwrapped, batch)
            if prediction_loss_only:
                return loss, None, None
            if logits is None or batch is not inputs:
                logits = model(**model_inputs(inputs)).logits
        return loss, logits.detach(), inputs.get("labels")

    def _evaluate_batch(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor | None]:
        observed = _OBSERVED | self.eval_observed
        for callback in self._distill_callbacks():
            observed = observed | callback.eval_observed
        student, _, terms = self._signals(model, batch, observed=observed)
        counts = self._counts(batch)
        for name, term in terms.items():
            total, count, _, _ = self._eval_totals.get(name, (0.0, 0, None, None))
            value = term.value.double() if term.value.device.type != "mps" else term.value
            n = counts[term.per]
            self._eval_totals[name] = (total + value * n, count + n, term.weight, name in observed)
        loss = sum(term.value * term.weight for term in terms.values())
        return loss, student.logits if torch.is_tensor(student.logits) and student.rows is None else None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        if self.objective is not None:
            self._eval_totals = {}
            if prediction_loss_only is None:
                prediction_loss_only = self.args.prediction_loss_only or self.compute_metrics is None
        # a data loader draws a seed whenever it is iterated
        with compat.before_training(self), random_state_kept(self.args.device):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if self.objective is not None:
            output.metrics.update(self._exact_metrics(metric_key_prefix))
        with random_state_kept(self.args.device):
            self._dispatch(
                "on_distill_evaluate",
                metrics=output.metrics,
                prefix=metric_key_prefix,
                model=self.accelerator.unwrap_model(self.model),
                processing_class=self.processing_class,
                accelerator=self.accelerator,
            )
        return output

    def _exact_metrics(self, prefix: str) -> dict[str, float]:
        """Means over all rows or documents of the set, whatever its split into batches and ranks."""
        names = sorted(self._eval_totals)
        if not names:
            return {}
        packed = torch.stack(
            [
                torch.stack(
                    [torch.as_tensor(self._eval_totals[n][i], device=self.args.device).double() for i in (0, 1)]
                )
                for n in names
            ]
        )
        packed = self.accelerator.reduce(packed, "sum")
        metrics, loss = {}, 0.0
        for name, (total, count) in zip(names, packed.tolist(), strict=True):
            _, _, weight, only_observed = self._eval_totals[name]
            mean = total / max(count, 1)
            if mean != mean or abs(mean) == float("inf"):
                raise FloatingPointError(
                    f"term {name!r} is NaN or infinite in evaluation at step {self.state.global_step}"
                )
            loss += 0.0 if only_observed else float(weight) * mean
            metrics[f"{prefix}_{name}"] = mean
        self._eval_totals = None
        return metrics | {f"{prefix}_loss": loss}


def observable(observed: dict, student, teacher) -> dict:
    """What can be measured on these signals without disturbing the objective."""
    if student.logits is None:
        return {}
    if teacher is None or teacher.logits is None:
        observed = {k: v for k, v in observed.items() if getattr(v, "full_vocabulary", False)}
    elif isinstance(teacher.logits, (SparseLogits, SampledLogits)):
        kept = {k: v for k, v in observed.items() if k != "agreement" and getattr(v, "sums_over_support", False)}
        observed = {k: v for k, v in kept.items() if same_temperature(v, teacher.logits)}
    labels = student.labels
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        observed = {k: v for k, v in observed.items() if not getattr(v, "reads_labels", False)}
    return observed
