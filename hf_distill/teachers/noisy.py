"""A teacher whose logits are blurred while the student trains: what a worse teacher costs."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import replace

import torch
from torch import Tensor

from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.base import Teacher, WrappedTeacher

STEP = "noise/step"


class NoisyTeacher(WrappedTeacher):
    """z + std · N(0, 1) on every logit, drawn anew at every step; evaluation sees the teacher as it is.

    The noise belongs to (seed, optimizer step, micro-batch, rank), so a resumed run draws the same, and another split
    into batches draws others. With std above 0 the teacher's logits are dense (loss rows × vocabulary).

    Args:
        std: of the noise; 0 leaves the teacher as it is.

    Raises:
        ValueError: std negative or not finite; at the first step, a teacher that does not give all its logits.
    """

    def __init__(self, teacher: Teacher, std: float, seed: int = 0):
        super().__init__(teacher)
        if not 0 <= std < math.inf:
            raise ValueError(f"the noise's std must be 0 or positive and finite, got {std}")
        self.readers = teacher.readers
        self.std, self.seed = std, seed
        self._step, self._micro_batch = torch.zeros((), dtype=torch.int64), 0

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        said = self.teacher(batch, needs)
        if not self.std or not torch.is_grad_enabled() or said.logits is None:
            return said
        logits = said.logits.dense() if isinstance(said.logits, HeadLogits) else said.logits
        if not isinstance(logits, Tensor):
            raise ValueError(f"noise needs all logits, {self.name} gives {type(logits).__name__}: name a model")
        noise = torch.randn(logits.shape, generator=self._generator(logits.device), device=logits.device)
        self._micro_batch += 1
        return replace(said, logits=logits + self.std * noise.to(logits.dtype))

    def _generator(self, device: torch.device) -> torch.Generator:
        key = f"{self.seed} {int(self._step)} {self._micro_batch} {os.environ.get('RANK', 0)}"
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
        return torch.Generator(device).manual_seed(number)

    def after_step(self, step: int) -> None:
        self.teacher.after_step(step)
        self._step.fill_(step)
        self._micro_batch = 0

    def state_tensors(self) -> dict[str, Tensor]:
        return self.teacher.state_tensors() | {STEP: self._step}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if STEP not in tensors:
            raise ValueError(f"the checkpoint holds no state of {self.name}'s noise: it belongs to another run")
        self._step.copy_(tensors[STEP])
        self.teacher.load_state_tensors({name: value for name, value in tensors.items() if name != STEP})

    def describe(self) -> dict:
        return super().describe() | {"teacher_logit_noise_std": self.std}
