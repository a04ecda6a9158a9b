"""A made-up example run through both models before training, to see what shapes their taps have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_distill.heads import base_model_of, collect
from hf_distill.signals import Signals
from hf_distill.teachers import Teacher
from hf_distill.teachers.frozen import eval_mode


@torch.no_grad()
def probe(
    student: nn.Module, teacher: Teacher, ours: frozenset[str], theirs: frozenset[str]
) -> tuple[Signals, Signals]:
    """Signals of student and teacher on one example.

    Args:
        ours, theirs: what is read of each, without "logits".

    Raises:
        ValueError: a model whose inputs cannot be made up, or whose weights are not here yet.
    """
    module = model_of(teacher)
    batch = probe_batch(student, student if module is None else module)
    own = probe_one(student, ours, batch)
    if module is None:
        return own, teacher(_on(batch, student), theirs)
    # the module and not the teacher: one that reads inputs of its own would refuse made-up ones
    return own, probe_one(module, theirs, probe_batch(module, student))


@torch.no_grad()
def probe_one(model: nn.Module, needs: frozenset[str], batch: dict[str, Tensor] | None = None) -> Signals:
    """Signals of one model on one example, made up unless given; see `probe`."""
    with eval_mode(model):
        return collect(model, _on(probe_batch(model) if batch is None else batch, model), needs, None)


def model_of(teacher: Teacher) -> nn.Module | None:
    """The model behind a teacher, where it is one."""
    while getattr(teacher, "teacher", None) is not None:
        teacher = teacher.teacher
    return getattr(teacher, "model", None) or getattr(teacher, "student", None)


def probe_batch(*models: nn.Module) -> dict[str, Tensor]:
    """One example for these models: pixels of the size that a config names (else 224), or eight token ids."""
    bases = [base_model_of(model) for model in models]
    kind = getattr(bases[0], "main_input_name", "input_ids")
    configs = [base.config for base in bases]
    if kind == "pixel_values":
        size = next((c.image_size for c in configs if getattr(c, "image_size", None)), 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {kind: torch.zeros(1, getattr(configs[0], "num_channels", 3), height, width)}
    if kind == "input_ids":
        ids = torch.arange(8)[None] % min(c.get_text_config().vocab_size for c in configs)
        return {kind: ids, "attention_mask": torch.ones_like(ids)}
    raise ValueError(f"{type(bases[0]).__name__} reads {kind}, which is not made up here: declare shapes=")


def _on(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    weight = next(model.parameters())
    if weight.is_meta:
        raise ValueError(f"the weights of {type(model).__name__} are not in memory yet: declare shapes=")
    return {k: v.to(weight.device, weight.dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}
