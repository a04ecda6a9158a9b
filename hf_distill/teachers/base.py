"""The one interface of all teachers."""

from __future__ import annotations

from torch import Tensor, nn

from hf_distill.signals import Signals
from hf_distill.taps import Gives

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
        readers: what the collator asks for entries of each batch (see `teachers.cache`); a teacher made of others gives
            all of theirs.
        learns: its weights change while the student trains (an average, a peer).
        learning_rate: of its trained module; None takes the student's.
    """

    gives: frozenset[str] = Gives({"logits", "hidden_states", "attentions", "features"})
    name: str = "teacher"
    revision: str | None = None
    readers: tuple = ()
    learns: bool = False
    learning_rate: float | None = None

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

    @property
    def answers_new_text(self) -> bool:
        """Whether it can tell of text that no data set holds. One that looks its answers up by content cannot."""
        return not self.readers

    def attach(self, student) -> None:
        """Called once with the student before anything is wrapped."""

    def detach(self) -> None:
        """Called when the student is changed for good (its adapter merged): let go of what was shared with it."""

    def prepare(self, accelerator) -> None:
        """Place or shard the weights. Called once, before the first step."""

    def trained_module(self) -> nn.Module | None:
        """What learns by gradients beside the student: the trainer hangs it on the model. None: nothing does."""
        return None

    def after_step(self, step: int) -> None:
        """Once per optimizer step, after it and before a save; `step` counts from 1."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the trained module, by name: live tensors, the same on every rank."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put saved state back, in place.

        Raises:
            ValueError: names or shapes differ from the present state's: the checkpoint belongs to another run.
        """
        mine = self.state_tensors()
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in tensors.items()}:
            raise ValueError(
                f"the checkpoint holds {len(tensors)} tensors of its teacher's state and {self.name} has {len(mine)}, "
                "or their names or shapes differ: resume with the teacher and student the run was started with"
            )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def check(self) -> None:
        """Raise when its signals are not its model's (see `heads.check_head`)."""

    def describe(self) -> dict:
        """Plain facts for the card and the log."""
        return {"teacher": self.name, "revision": self.revision}


class WrappedTeacher(Teacher):
    """A teacher around another one, whose everything it is where a subclass says nothing else.

    Attributes:
        teacher: the other one.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.gives, self.learns, self.learning_rate = teacher.gives, teacher.learns, teacher.learning_rate

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        return self.teacher(batch, needs)

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def revision(self) -> str | None:
        return self.teacher.revision

    @property
    def config(self):
        return self.teacher.config

    @property
    def tokenizer(self):
        return self.teacher.tokenizer

    def vocabulary_size(self) -> int | None:
        return self.teacher.vocabulary_size()

    @property
    def answers_new_text(self) -> bool:
        return super().answers_new_text and self.teacher.answers_new_text

    def attach(self, student: nn.Module) -> None:
        self.teacher.attach(student)

    def detach(self) -> None:
        self.teacher.detach()

    def prepare(self, accelerator) -> None:
        self.teacher.prepare(accelerator)

    def trained_module(self) -> nn.Module | None:
        return self.teacher.trained_module()

    def after_step(self, step: int) -> None:
        self.teacher.after_step(step)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.teacher.state_tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.teacher.load_state_tensors(tensors)

    def check(self) -> None:
        self.teacher.check()

    def describe(self) -> dict:
        return self.teacher.describe()


__all__ = ["Teacher", "WrappedTeacher", "teacher_batch"]
