"""The one interface of all teachers."""

from __future__ import annotations

from hf_distill.signals import Signals

PREFIX = "teacher_"


def teacher_batch(batch: dict) -> dict:
    """What the teacher sees: the student's batch, with every `teacher_`-prefixed entry in place of its namesake."""
    own = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
    if "input_ids" in own:  # inputs of its own: nothing of the student's text may slip in beside them
        return own
    return {key: value for key, value in batch.items() if not key.startswith(PREFIX)} | own


class Teacher:
    """`teacher(batch) -> Signals`. No gradient, eval mode, dtype, device, sharding and quantisation live here alone.

    Attributes:
        gives: which signals it can give; an objective that needs others is refused before training.
        name: what cards and messages call it.
        revision: of its weights, where known.
    """

    gives: frozenset[str] = frozenset({"logits", "hidden_states", "attentions"})
    name: str = "teacher"
    revision: str | None = None

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(batch, needs) -> Signals")

    @property
    def config(self):
        """The model's config where there is one (vocabulary and hidden sizes are read from it)."""
        return None

    @property
    def tokenizer(self):
        """Its tokenizer or processor where known, to compare with the student's."""
        return None

    def vocabulary_size(self) -> int | None:
        """Entries of its logits; None when it has none."""
        return None

    def attach(self, student) -> None:
        """Called once with the student before anything is wrapped."""

    def detach(self) -> None:
        """Called when the student is changed for good (its adapter merged): let go of what was shared with it."""

    def prepare(self, accelerator) -> None:
        """Place or shard the weights. Called once, before the first step."""

    def check(self) -> None:
        """Raise when its signals are not its model's (see `heads.check_head`)."""

    def describe(self) -> dict:
        """Plain facts for the card and the log."""
        return {"teacher": self.name, "revision": self.revision}


__all__ = ["Teacher", "teacher_batch"]
