"""A teacher that reads the student's text in tokens of its own."""

from __future__ import annotations

from torch import nn

from hf_distill.signals import Signals
from hf_distill.teachers.base import PREFIX, WrappedTeacher, teacher_batch
from hf_distill.teachers.cached import CachedTeacher
from hf_distill.teachers.frozen import FrozenTeacher

OWN_LOGITS = "own_logits"


class OwnTokensTeacher(WrappedTeacher):
    """A teacher whose rows are tokens of its own tokenizer. It gives `features["own_logits"]` and no logits: nothing
    may compare them with the student's row by row.

    Args:
        teacher: a FrozenTeacher, or a CachedTeacher of mode "hidden" or "logits".

    Raises:
        ValueError: another kind of teacher or cache, or one without a tokenizer.
    """

    def __init__(self, teacher):
        super().__init__(teacher)
        if not isinstance(teacher, (FrozenTeacher, CachedTeacher)):
            raise ValueError(
                "a teacher with another tokenizer must be a model or its cache (FrozenTeacher, CachedTeacher), got "
                f"{type(teacher).__name__}"
            )
        if isinstance(teacher, CachedTeacher) and teacher.codec.mode not in ("hidden", "logits"):
            raise ValueError(
                f"the cache {teacher.path} (mode {teacher.codec.mode!r}) does not hold whole distributions, which are "
                'sorted across tokenizers: make it with mode="hidden"'
            )
        if teacher.tokenizer is None:
            raise ValueError(f"the tokenizer of {teacher.name} is unknown: pass FrozenTeacher(model, tokenizer)")
        self.gives, self.readers = frozenset({OWN_LOGITS}), teacher.readers

    def attach(self, student: nn.Module) -> None:
        super().attach(student)
        self.check()  # the trainer asks only teachers that give logits

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({OWN_LOGITS})) -> Signals:
        if PREFIX + "loss_rows" not in batch:
            raise ValueError(f"the batch has no {PREFIX}input_ids with labels: the collator must be an AlignedCollator")
        own = teacher_batch(batch) | {k: v for k, v in batch.items() if k.startswith("cached_")}
        signals = self.teacher(own, frozenset({"logits"}))
        return Signals(features={OWN_LOGITS: signals.logits}, labels=signals.labels, rows=signals.rows, batch=own)
