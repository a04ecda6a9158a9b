"""What quantising a teacher cost: compared with its full precision on training data, once, before training."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from datasets import IterableDataset

from hf_distill.losses import Agreement, ForwardKL, observe
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.evaluation import random_state_kept


@torch.no_grad()
def teacher_fidelity(teacher: FrozenTeacher, batches: Iterable[dict], accelerator) -> dict[str, float]:
    """KL(full precision ‖ quantised) and top-1 agreement, means over the loss rows of all batches and ranks.

    Args:
        teacher: loaded quantised by `FrozenTeacher.from_pretrained`.
        batches: of the collator, on the accelerator's device.

    Raises:
        ValueError: the teacher was not loaded quantised from a path, so its full precision is not known.
    """
    twin = teacher.full_precision()
    twin.prepare(accelerator)
    totals = torch.zeros(3, device=accelerator.device)
    for batch in batches:
        quantised, exact = teacher(batch).logits, twin(batch).logits
        values = observe(quantised, exact, {"kl": ForwardKL(), "agreement": Agreement()})
        rows = torch.full_like(values["kl"], 1.0)
        totals += torch.stack([values["kl"].sum(), values["agreement"].sum(), rows.sum()]).to(totals)
    del twin
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    kl, agreement, rows = accelerator.reduce(totals, "sum").tolist()
    return {"teacher_fidelity/kl": kl / max(rows, 1), "teacher_fidelity/agreement": agreement / max(rows, 1)}


def measure_teacher(trainer) -> dict[str, float]:
    """`teacher_fidelity` on the examples of the first `args.measure_teacher_fidelity` batches of a trainer's data."""
    args, dataset = trainer.args, trainer.train_dataset
    count = args.measure_teacher_fidelity * args.per_device_train_batch_size * trainer.accelerator.num_processes
    first = (
        dataset.take(count) if isinstance(dataset, IterableDataset) else dataset.select(range(min(count, len(dataset))))
    )
    with random_state_kept(args.device):
        batches = (trainer._prepare_inputs(batch) for batch in trainer.get_eval_dataloader(first))
        return teacher_fidelity(trainer.teacher, batches, trainer.accelerator)
