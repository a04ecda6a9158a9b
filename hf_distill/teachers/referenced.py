"""A teacher beside a public model: how likely each of the two finds the target."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.signals import SampledLogits, Signals, SparseLogits
from hf_distill.teachers.base import Teacher, WrappedTeacher
from hf_distill.teachers.frozen import load_teacher

TEACHER, REFERENCE = "label_log_probs", "reference_log_probs"


class ReferencedTeacher(WrappedTeacher):
    """The teacher's signals, with log p(label) under it and under a reference model, (N,) each, among the features.

    Both projections are made tile by tile. The reference never trains and is not saved with the student.

    Args:
        teacher: one that gives all its logits.
        reference: a Teacher, a model, or a Hub id / folder of one with the same tokenizer.

    Raises:
        ValueError: a reference with another vocabulary or from a cache; at the first batch, a teacher without all its
            logits.
    """

    def __init__(self, teacher: Teacher, reference):
        super().__init__(teacher)
        self.reference, self.readers = load_teacher(reference), teacher.readers
        if self.reference.readers:
            raise ValueError(f"the reference {self.reference.name} is a cache: name the model itself")
        ours, theirs = (getattr(one.tokenizer, "get_vocab", None) for one in (teacher, self.reference))
        if ours is not None and theirs is not None and ours() != theirs():
            raise ValueError(
                f"the reference {self.reference.name} has another tokenizer than the teacher {teacher.name}, so its "
                "probabilities are of other tokens: take one of the same family"
            )

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        said = self.teacher(batch, needs)
        public = self.reference(batch)
        return replace(said, features=said.features | {TEACHER: _log_probs(said), REFERENCE: _log_probs(public)})

    def vocabulary_size(self) -> int | None:
        sizes = [size for one in (self.teacher, self.reference) if (size := one.vocabulary_size()) is not None]
        return min(sizes, default=None)

    def prepare(self, accelerator) -> None:
        super().prepare(accelerator)
        self.reference.prepare(accelerator)

    def check(self) -> None:
        super().check()
        self.reference.check()

    def describe(self) -> dict:
        return super().describe() | {"reference": self.reference.name}


def _log_probs(said: Signals) -> Tensor:
    if said.logits is None or isinstance(said.logits, (SparseLogits, SampledLogits)):
        raise ValueError(
            "how likely a teacher finds the target needs all its logits: give a live teacher, or a cache of mode "
            '"hidden" or "logits"'
        )
    return -observe(said.logits, None, {"value": LabelCrossEntropy()}, labels=said.labels)["value"]


__all__ = ["REFERENCE", "TEACHER", "ReferencedTeacher"]
