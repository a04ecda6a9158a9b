"""Several teachers as one: mixed with fixed or per-example weights, or each asked about its own examples only."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_distill.heads import rows_of
from hf_distill.signals import SPACES, HeadLogits, Logits, MixtureLogits, Rows, Signals, SparseLogits, upcast
from hf_distill.teachers.base import Teacher, teacher_batch
from hf_distill.teachers.frozen import FrozenTeacher, load_teacher
from hf_distill.teachers.mixing import batch_of_examples, mix, scatter, size_of
from hf_distill.training import compat
from hf_distill.training.checks import common_vocabulary

CACHED = "cached_"  # under which the collator carries dataset columns
LOGITS = frozenset({"logits"})


class SeveralTeachers(Teacher):
    """What an ensemble and a router share: members by name, of one vocabulary, that run one after another.

    Args:
        teachers: {name: teacher} or a sequence of them; each a Teacher, a model, or a Hub id / folder.
        offload: all members (True), or those named, keep their weights on the CPU and have them on the device for their
            own forward only. The heads of language models stay there until the loss is taken.

    Raises:
        ValueError: a member that gives no logits, speaks of another vocabulary or other classes, or cannot be moved.
    """

    gives = LOGITS

    def __init__(self, teachers: Mapping | Sequence, *, offload: bool | Collection[str] = False):
        self.teachers = _named(teachers)
        self.name = " + ".join(self.teachers)
        self.offload = frozenset(self.teachers if offload is True else offload or ())
        for name in self.offload:
            _check_can_move(name, self.member(name))
        self.device: torch.device | None = None
        for name, teacher in self.teachers.items():
            if "logits" not in teacher.gives:
                raise ValueError(f"teacher {name!r} gives {', '.join(sorted(teacher.gives)) or 'nothing'}, not logits")
            if teacher.trained_module() is not None:
                raise ValueError(f"teacher {name!r} learns by gradients, which no mixture takes: use it alone")
        self._check_one_vocabulary()
        self.readers = tuple(dict.fromkeys(reader for t in self.teachers.values() for reader in t.readers))

    def member(self, name: str | int) -> Teacher:
        """By name, or by place."""
        return self.teachers[list(self.teachers)[self.number(name)]]

    def number(self, name: str | int) -> int:
        """The place of a member, from 0: what a column that routes holds."""
        names = list(self.teachers)
        if name in names:
            return names.index(name)
        if isinstance(name, int) and 0 <= name < len(names):
            return name
        raise ValueError(f"there is no teacher {name!r}: they are {', '.join(names)} (0 to {len(names) - 1})")

    def _speak(self, name: str, batch: dict, needs: frozenset[str]) -> Signals:
        teacher = self.teachers[name]
        if name not in self.offload or self.device is None:
            return teacher(batch, needs)
        with on_device(teacher.model, self.device):
            return teacher(batch, needs)

    @property
    def leading(self) -> list[Teacher]:
        """The members, in the order in which they speak for all."""
        return list(self.teachers.values())

    @property
    def config(self):
        return next((c for teacher in self.leading if (c := teacher.config) is not None), None)

    @property
    def tokenizer(self):
        return next((t for teacher in self.leading if (t := teacher.tokenizer) is not None), None)

    @property
    def learns(self) -> bool:
        return any(teacher.learns for teacher in self.teachers.values())

    def vocabulary_size(self) -> int | None:
        """The entries that all members share."""
        return min((s for t in self.teachers.values() if (s := t.vocabulary_size()) is not None), default=None)

    def attach(self, student: nn.Module) -> None:
        for teacher in self.teachers.values():
            teacher.attach(student)
        self._check_one_vocabulary()  # a teacher that is the student's base has one only now

    def detach(self) -> None:
        for teacher in self.teachers.values():
            teacher.detach()

    def prepare(self, accelerator) -> None:
        self.device = accelerator.device
        for name, teacher in self.teachers.items():
            if name not in self.offload:
                teacher.prepare(accelerator)

    def after_step(self, step: int) -> None:
        for teacher in self.teachers.values():
            teacher.after_step(step)

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{k}": v for i, t in enumerate(self.teachers.values()) for k, v in t.state_tensors().items()}

    def check(self) -> None:
        for teacher in self.teachers.values():
            teacher.check()

    def describe(self) -> dict:
        return super().describe() | {"teachers": {name: teacher.describe() for name, teacher in self.teachers.items()}}

    def _check_one_vocabulary(self) -> None:
        (first, teacher), *others = self.teachers.items()
        size, classes = teacher.vocabulary_size(), _classes(teacher)
        for name, other in others:
            theirs = other.vocabulary_size()
            if None in (size, theirs):
                if None not in (classes, _classes(other)) and classes != _classes(other):
                    raise ValueError(f"teacher {name!r} has {_classes(other)} classes, {first!r} has {classes}")
            elif None not in (teacher.tokenizer, other.tokenizer):
                try:
                    common_vocabulary(teacher.tokenizer, other.tokenizer, size, theirs)
                except ValueError as error:
                    raise ValueError(
                        f"teacher {name!r} speaks of another vocabulary than {first!r}: one mixture needs one "
                        f"vocabulary. With {first!r} as the student and {name!r} as the teacher, {error}"
                    ) from error
            elif size != theirs:
                raise ValueError(
                    f"teacher {name!r} has {theirs} vocabulary entries, {first!r} has {size}, and a tokenizer is "
                    "unknown, so they cannot be compared: pass FrozenTeacher(model, tokenizer)"
                )


class EnsembleTeacher(SeveralTeachers):
    """Several teachers mixed into one distribution per row; all of them run on every example.

    Args:
        teachers, offload: see SeveralTeachers.
        weights: one number per teacher, not negative, summing to 1; None weighs them equally. A name is that of a
            dataset column with such numbers per example (`DataCollatorForDistillation(…, example_columns=(name,))`).
        space: "probability" mixes softmaxes, "logit" mixes logits (see signals.MixtureLogits).
        features_from: the member, by name or place, whose hidden states and attentions are the ensemble's; without it
            there are none. The config is that member's, else the first known one.

    Members that give SparseLogits (caches) are merged into one, at the temperature they were stored with; see
    `mix_sparse`. Ensembles of ensembles mix in one space.

    Raises:
        ValueError: weights that are no such numbers; see SeveralTeachers.

    Example:
        >>> teacher = EnsembleTeacher({"code": "org/code-7b", "chat": "org/chat-7b"}, [0.3, 0.7])  # doctest: +SKIP
    """

    def __init__(
        self,
        teachers: Mapping | Sequence,
        weights: Sequence[float] | Tensor | str | None = None,
        space: str = "probability",
        *,
        features_from: str | int | None = None,
        offload: bool | Collection[str] = False,
    ):
        super().__init__(teachers, offload=offload)
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        self.space, self.column = space, weights if isinstance(weights, str) else None
        self.weights = _fixed_weights(None if self.column else weights, list(self.teachers))
        self._features = None if features_from is None else list(self.teachers)[self.number(features_from)]
        if self._features is not None:
            self.gives = LOGITS | self.teachers[self._features].gives

    def __call__(self, batch: dict, needs: frozenset[str] = LOGITS) -> Signals:
        if missing := needs - self.gives:
            raise ValueError(
                f"an ensemble gives {', '.join(sorted(self.gives))}, not {', '.join(sorted(missing))}: name the member "
                "that speaks for it with features_from="
            )
        said: dict[str, Signals] = {}
        for name in self.teachers:
            own = needs if name == self._features else needs & LOGITS
            if own:
                said[name] = self._speak(name, batch, own)
        signals = said[self._features] if self._features in said else next(iter(said.values()))
        if "logits" not in needs:
            return signals
        parts = [s.logits for s in said.values()]
        return replace(signals, logits=mix(parts, self._weights(batch, signals.rows, parts[0]), self.space))

    def _weights(self, batch: dict, rows: Rows | None, like: Logits) -> Tensor:
        """(M,), or (rows, M) where a column has them per example."""
        anchor = upcast(_anchor(like)[:0])
        if self.column is None:
            return self.weights.to(anchor)
        weights = _column(batch, self.column).to(anchor)
        if weights.dim() != 2 or weights.shape[1] != len(self.teachers):
            raise ValueError(
                f"column {self.column!r} must hold {len(self.teachers)} weights per example, one per teacher "
                f"({', '.join(self.teachers)}), got shape {tuple(weights.shape)}"
            )
        valid = (weights >= 0).all() & ((weights.sum(-1) - 1).abs() < 1e-3).all()
        torch._assert_async(valid, f"weights in column {self.column!r} must not be negative and sum to 1 per example")
        return weights if rows is None else weights[rows.example[rows.document]]

    @property
    def leading(self) -> list[Teacher]:
        return super().leading if self._features is None else [self.teachers[self._features], *super().leading]

    def describe(self) -> dict:
        weights = self.column or dict(zip(self.teachers, self.weights.tolist(), strict=True))
        return super().describe() | {"teacher_weights": weights, "teacher_space": self.space}


class RoutedTeacher(SeveralTeachers):
    """Each example is answered by one teacher, which runs on its own examples only: the cost of one teacher, not of M.

    A dataset column names the teacher of each example by its place (`route.number("maths")`; a batch may hold names
    too); it reaches the batch through `DataCollatorForDistillation(…, example_columns=(column,))`. Batches must be
    padded, not packed. Where language models of different heads meet in one batch, their rows come as a mixture with
    weights 0 and 1, so that every such head is projected for all rows of the batch: batches of one domain cost least.

    Args:
        teachers, offload: see SeveralTeachers.
        column: of the dataset.
        token_columns: cached columns with one entry per token, as the collator was given them.

    Raises:
        ValueError: an unknown teacher, a missing column, a batch that cannot be divided by example.
    """

    def __init__(
        self,
        teachers: Mapping | Sequence,
        column: str = "teacher",
        *,
        token_columns: Collection[str] = (),
        offload: bool | Collection[str] = False,
    ):
        super().__init__(teachers, offload=offload)
        self.column, self.token_columns = column, tuple(token_columns)
        self.together = False

    def prepare(self, accelerator) -> None:
        super().prepare(accelerator)
        self.together = compat.is_sharded(accelerator)  # a sharded forward is a meeting of all ranks

    def __call__(self, batch: dict, needs: frozenset[str] = LOGITS) -> Signals:
        if missing := needs - self.gives:
            raise ValueError(f"a router gives logits, not {', '.join(sorted(missing))}: members differ in their layers")
        route = self._route(batch)
        own = teacher_batch(batch)
        rows = rows_of(own)
        label = own.get("labels") if rows is None else rows.labels
        parts: list[tuple[Tensor, Logits]] = []
        for number, name in enumerate(self.teachers):
            examples = (route == number).nonzero().flatten()
            if len(examples):
                logits = self._speak(name, self._examples(batch, examples), LOGITS).logits
                chosen = route if rows is None else route[rows.example[rows.document]]
                parts.append(((chosen == number).nonzero().flatten(), logits))
            elif self.together:
                self._speak(name, self._examples(batch, examples.new_zeros(1)), LOGITS)
        total = len(route) if rows is None else len(rows.labels)
        return Signals(logits=scatter(parts, total), labels=label, rows=rows, batch=own)

    def _route(self, batch: dict) -> Tensor:
        """(B,) places of the examples' teachers, on the batch's device."""
        size, device = size_of(batch)
        given = _column(batch, self.column)
        given = given.tolist() if isinstance(given, Tensor) else list(given)
        if len(given) != size:
            raise ValueError(
                f"column {self.column!r} routes {len(given)} examples, the batch has {size} rows: a packed or "
                "padding-free batch cannot be divided by example; set packing=False and padding_free=False"
            )
        return torch.tensor([self.number(name) for name in given], device=device)

    def _examples(self, batch: dict, examples: Tensor) -> dict:
        per_token = {CACHED + name for name in self.token_columns}
        per_token |= {key for reader in self.readers if reader.per == "token" for key in reader.keys.values()}
        return batch_of_examples(batch, examples, per_token if "loss_rows" in batch else ())

    def describe(self) -> dict:
        return super().describe() | {"teacher_column": self.column}


def _column(batch: dict, name: str):
    if CACHED + name not in batch:
        raise ValueError(
            f"the batch has no column {name!r}: the dataset must have it, and the collator must carry it, "
            f"DataCollatorForDistillation(…, example_columns=({name!r},))"
        )
    return batch[CACHED + name]


# ---- weights on the device for one forward ---------------------------------------------------------------------------
@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies of the model's weights on a device take their place; the originals come back, for nothing changed them."""
    home: list[tuple[dict, str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # tied weights stay one
    try:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in copies:
                        copy = tensor.detach().to(device, non_blocking=True)
                        copies[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
                    home.append((tensors, name, tensor))
                    tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in home:
            tensors[name] = tensor


def _check_can_move(name: str, teacher: Teacher) -> None:
    model = getattr(teacher, "model", None)
    placed = getattr(model, "hf_device_map", None) or hasattr(model, "_hf_hook")
    if not isinstance(teacher, FrozenTeacher) or placed or getattr(model, "is_quantized", False):
        raise ValueError(
            f"teacher {name!r} cannot be offloaded: only a FrozenTeacher that is neither quantised nor on a device map "
            "can, leave it out of offload="
        )


# ---- small things ----------------------------------------------------------------------------------------------------
def _named(teachers: Mapping | Sequence) -> dict[str, Teacher]:
    if isinstance(teachers, (str, Teacher, nn.Module)) or not len(teachers):
        raise ValueError(f"teachers must be several, {{name: teacher}} or a sequence, got {teachers!r}")
    if isinstance(teachers, Mapping):
        return {str(name): load_teacher(teacher) for name, teacher in teachers.items()}
    named: dict[str, Teacher] = {}
    for i, teacher in enumerate(map(load_teacher, teachers)):
        named[teacher.name if teacher.name not in named else f"{teacher.name} ({i})"] = teacher
    return named


def _fixed_weights(weights: Sequence[float] | Tensor | None, names: list[str]) -> Tensor:
    if weights is None:
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    given = torch.as_tensor(weights, dtype=torch.float64)
    if given.shape != (len(names),):
        raise ValueError(
            f"weights must be {len(names)} numbers, one per teacher ({', '.join(names)}), got shape "
            f"{tuple(given.shape)}; weights per example come from a dataset column, weights='its name'"
        )
    if not ((given >= 0).all() and abs(given.sum().item() - 1) < 1e-4):
        raise ValueError(f"weights must not be negative and sum to 1, got {given.tolist()}")
    return given


def _classes(teacher: Teacher) -> int | None:
    return getattr(teacher.config, "num_labels", None)


def _anchor(logits: Logits) -> Tensor:
    """A tensor of the logits' device and type."""
    if isinstance(logits, MixtureLogits):
        return _anchor(logits.parts[0])
    if isinstance(logits, HeadLogits):
        return logits.hidden
    return logits.log_probs if isinstance(logits, SparseLogits) else logits


__all__ = ["EnsembleTeacher", "RoutedTeacher", "SeveralTeachers"]
