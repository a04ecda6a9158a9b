"""A classifier whose classes stand in another order than the student's, or that knows more of them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from hf_distill.signals import Signals
from hf_distill.teachers.base import Teacher, WrappedTeacher


class RelabelledTeacher(WrappedTeacher):
    """A classifier's logits in the student's order of classes.

    Args:
        teacher: one whose logits are (B, C).
        order: the teacher's class of each of the student's classes; those left out are left out of its softmax.
        names: of the student's classes.

    Raises:
        ValueError: `order` and `names` differ in length, or a class is taken twice.
    """

    def __init__(self, teacher: Teacher, order: list[int], names: list[str]):
        super().__init__(teacher)
        if len(order) != len(names) or len(set(order)) != len(order):
            raise ValueError(f"order must hold a different class for each of the {len(names)} names, got {order}")
        self.order, self.readers = torch.tensor(order), teacher.readers
        self._config = copy.deepcopy(teacher.config)
        if self._config is not None:
            self._config.id2label = dict(enumerate(names))
            self._config.label2id = {name: i for i, name in enumerate(names)}

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        signals = self.teacher(batch, needs)
        if signals.logits is None:
            return signals
        if not torch.is_tensor(signals.logits):
            raise ValueError(
                f"the classes of {self.name} stand in another order than the student's, and its logits are "
                f"{type(signals.logits).__name__}, which cannot be put in order: cache it in mode logits"
            )
        self.order = self.order.to(signals.logits.device)
        return replace(signals, logits=signals.logits[:, self.order])

    @property
    def config(self):
        return self._config
