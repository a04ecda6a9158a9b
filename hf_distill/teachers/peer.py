"""Teachers that change while the student trains: the average of its own weights, and a peer that learns beside it.

An earlier state of the student that stays as it is (born-again training) is a FrozenTeacher of its checkpoint:
`FrozenTeacher.from_pretrained("run/checkpoint-500")`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_distill.heads import base_model_of, check_head, collect, rows_of, runs_dense
from hf_distill.losses import run_terms
from hf_distill.objectives import LogitKD, sample_row_weights
from hf_distill.signals import HeadLogits, Signals, upcast
from hf_distill.teachers.base import Teacher, teacher_batch
from hf_distill.teachers.frozen import eval_mode
from hf_distill.training import compat


class EMATeacher(Teacher):
    """The student's own weights, averaged over its steps (Mean Teacher, Tarvainen and Valpola 2017).

    average ← d · average + (1 − d) · student after every optimizer step, from the weights that training starts with.
    Only weights that train are averaged (a LoRA student's adapter), in float32 or float64; the rest, BatchNorm
    statistics included, is the student's. The average speaks through the student's modules, in eval mode and under the
    run's autocast. It is saved with each checkpoint and never exported: for that, `with teacher.averaged():
    trainer.save_model(…)`.

    Args:
        decay: d, at least 0 and below 1; 0 is the student as it stands.
        warmup: d = min(decay, (1 + step) / (10 + step)) at the step just done, from 1: the start is forgotten early.
        dense_logits: take the student's own logits instead of its backbone and head.

    Raises:
        ValueError: a decay outside [0, 1); a student that trains nothing; FSDP or DeepSpeed, which shard the weights.
    """

    learns = True

    def __init__(self, decay: float = 0.999, *, warmup: bool = True, dense_logits: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.decay, self.warmup, self.dense_logits = decay, warmup, dense_logits
        self.student: nn.Module | None = None
        self.averages: dict[str, Tensor] = {}
        self.name = "the student's averaged weights"

    def attach(self, student: nn.Module) -> None:
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(f"{type(student).__name__} has no weights that train, so there is nothing to average")
        self.student = student
        self.averages = {name: upcast(p.detach()).clone() for name, p in trained.items()}

    def detach(self) -> None:
        self.student = None

    def prepare(self, accelerator) -> None:
        _refuse_shards(accelerator, "an average of the student's weights")

    @property
    def config(self):
        return None if self.student is None else self.student.config

    def vocabulary_size(self) -> int | None:
        return None if self.student is None else _vocabulary_size(self.student)

    def check(self) -> None:
        if not self.dense_logits:
            check_head(self._attached(), "teacher")

    def decay_at(self, step: int) -> float:
        """d after optimizer step `step`, from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        weights = dict(self._attached().named_parameters())
        for name, average in self.averages.items():
            average.lerp_(weights[name].to(average.dtype), 1 - self.decay_at(step))

    def state_tensors(self) -> dict[str, Tensor]:
        return self.averages

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Inside it the student has its averaged weights: to be evaluated or saved, not trained."""
        own = []
        try:
            for name, parameter in self._attached().named_parameters():
                if name in self.averages:
                    own.append((parameter, parameter.data))
                    parameter.data = self.averages[name].to(parameter.dtype)
            yield self.student
        finally:
            for parameter, data in own:
                parameter.data = data

    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        own, student = teacher_batch(batch), self._attached()
        dense = self.dense_logits or runs_dense(student)
        with eval_mode(student), _autocast_without_cache(own), self.averaged():
            signals = collect(student, own, needs, rows_of(own), dense=dense)
            if not isinstance(signals.logits, HeadLogits):
                return signals
            # the parameters get the student's values back; detached, these keep the average's
            head = signals.logits
            bias = None if head.bias is None else head.bias.detach()
            return replace(signals, logits=replace(head, weight=head.weight.detach(), bias=bias))

    def _attached(self) -> nn.Module:
        if self.student is None:
            raise ValueError(
                "the averaged teacher has no student: none was attached, or its adapter was merged (evaluate before "
                "student(merge=True))"
            )
        return self.student

    def describe(self) -> dict:
        return super().describe() | {"teacher_decay": self.decay}


class PeerTeacher(Teacher):
    """Another model that learns beside the student, from a loss of its own (online distillation).

    The trainer hangs it on the student as part of the objective: in train mode with the student, optimised, clipped and
    synchronised with it, saved with each checkpoint, never exported (`peer.model` is at hand after training). Its
    signals carry gradients: terms on the logits (`logit_terms`) take them as constants, and its own loss is among the
    objective's `other_terms`, as in MutualKD. What an `other_terms` entry must not move in the peer, it detaches.

    Args:
        model: a transformers model; with adapters only these learn.
        tokenizer: to compare with the student's; None skips the comparison.
        learning_rate: of the peer; None takes the student's.
        dense_logits: take the model's own logits instead of its backbone and head.

    Raises:
        TypeError: not a model.
        ValueError: it trains nothing (quantised, frozen), was copied from a model in training, or shares weights with
            the student; FSDP or DeepSpeed.
    """

    learns = True

    def __init__(self, model: nn.Module, tokenizer=None, *, learning_rate=None, name=None, dense_logits=False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"a peer is a loaded model, got {type(model).__name__}: load it with from_pretrained")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f"{type(model).__name__} has no weights that train (quantised or frozen), so it cannot learn: "
                "load it unquantised, give it an adapter, or use FrozenTeacher"
            )
        for module in {model, base_model_of(model)}:
            if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"the forward of this {type(module).__name__} was replaced, so a copy answers with the weights of "
                    "the original: copy a model before a trainer is built on it, or copy trainer.student()"
                )
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"the peer's learning_rate must be positive, got {learning_rate}")
        self.model, self._tokenizer, self.learning_rate = model, tokenizer, learning_rate
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.dense_logits = dense_logits

    @property
    def config(self):
        return self.model.config

    @property
    def tokenizer(self):
        return self._tokenizer

    def vocabulary_size(self) -> int | None:
        return _vocabulary_size(self.model)

    def attach(self, student: nn.Module) -> None:
        own = {id(p) for p in self.model.parameters()}
        if any(id(p) in own for p in student.parameters()):
            raise ValueError("the peer shares weights with the student: give it a model of its own (a copy.deepcopy)")

    def trained_module(self) -> nn.Module:
        return self.model

    def prepare(self, accelerator) -> None:
        _refuse_shards(accelerator, "a peer that learns")

    def check(self) -> None:
        if not self.dense_logits:
            check_head(self.model, "peer")

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        own = teacher_batch(batch)
        return collect(self.model, own, needs, rows_of(own), dense=self.dense_logits or runs_dense(self.model))

    def describe(self) -> dict:
        return super().describe() | {"teacher_parameters": self.model.num_parameters(), "teacher_learns": True}


class MutualKD(LogitKD):
    """Deep mutual learning (Zhang et al. 2018): student and peer learn from the labels and from each other.

    loss = LogitKD of the student with the peer as teacher + LogitKD of the peer with the student as teacher; each takes
    the other's logits as constants. Arguments are LogitKD's; the labels count by default. The peer's half stands in
    `peer_label` and `peer_kd`, which `eval_loss` contains: to choose the best model take `eval_cross_entropy`.

    Raises:
        ValueError: the teacher does not learn by gradients (only a PeerTeacher does).
    """

    def __init__(self, divergence="forward_kl", *, label_weight: float = 1.0, **options):
        super().__init__(divergence, label_weight=label_weight, **options)

    def setup(self, student: nn.Module, teacher: Teacher) -> None:
        if teacher.trained_module() is None:
            raise ValueError(f"MutualKD trains both models, {type(teacher).__name__} does not learn: use PeerTeacher")

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        weights = super().weights(progress)
        terms = {name: (divergence, weights[name]) for name, divergence in self.logit_terms(progress).items()}
        rows = sample_row_weights(student) if self.per == "sample" and student.rows is not None else None
        values = run_terms(
            teacher.logits,
            student.logits,
            terms,
            labels=student.labels,
            mask=student.mask,
            row_weights=rows,
            **self.engine,
        )
        return {f"peer_{name}": value for name, value in values.items()}

    def weights(self, progress: float) -> dict[str, float]:
        own = super().weights(progress)
        return own | {f"peer_{name}": weight for name, weight in own.items()}


def _vocabulary_size(model: nn.Module) -> int | None:
    head = base_model_of(model).get_output_embeddings()
    return None if head is None else head.weight.shape[0]


def _autocast_without_cache(batch: dict) -> torch.autocast:
    """The autocast that is on; what it casts here must not be taken for the student's own weights afterwards."""
    device = next((v.device.type for v in batch.values() if torch.is_tensor(v)), "cpu")
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _refuse_shards(accelerator, what: str) -> None:
    if compat.is_sharded(accelerator):
        raise ValueError(
            f"{what} does not work with sharded weights ({accelerator.distributed_type.value}): train with plain data "
            "parallelism (DDP), with LoRA where memory is short, or take a FrozenTeacher"
        )
