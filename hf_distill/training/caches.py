"""A run that reads cached teachers: its collator looks them up, and its settings are compared with theirs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hf_distill.curricula.collators import PREFIX, DataCollatorForDistillation
from hf_distill.heads import labels_are_shifted, labels_of
from hf_distill.objectives import Objective
from hf_distill.teachers import CachedTeacher, RemoteTeacher, Teacher
from hf_distill.teachers.cache.reader import CacheReader
from hf_distill.teachers.cache.source import prepared_by


def attach_readers(trainer, teacher: Teacher | None, objective: Objective | None) -> None:
    """Let the trainer's collator read what its teacher has cached.

    Raises:
        ValueError: an objective at another temperature than the one that was stored; two caches under one name.
    """
    if isinstance(teacher, RemoteTeacher) and objective is not None:
        _check_temperature(objective, f"{teacher.endpoint} tells", 1.0)
    readers = () if teacher is None else teacher.readers
    if not readers:
        return
    if not isinstance(trainer.data_collator, DataCollatorForDistillation):
        trainer.data_collator = DataCollatorForDistillation(
            trainer.data_collator, shift=labels_are_shifted(trainer.model), labels_of=labels_of(trainer.model)
        )
    collator = trainer.data_collator = copy.copy(trainer.data_collator)  # another trainer may share it
    collator.readers += tuple(reader for reader in readers if reader not in collator.readers)
    keys = [key for reader in collator.readers for key in reader.keys.values()]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"two caches give {', '.join(twice)}: cache one of them under other names")
    for reader in readers:
        reader.compare(prepared_by(trainer), trainer.processing_class)
        if objective is not None and reader.temperature is not None:
            _check_temperature(objective, f"the cache {reader.path} holds", reader.temperature)


def _check_temperature(objective: Objective, who: str, temperature: float) -> None:
    for _, _, leaf in objective.leaves():
        for progress in (0.0, 0.5, 1.0):
            for name, divergence in leaf.logit_terms(progress).items():
                if getattr(divergence, "full_vocabulary", False):
                    continue
                asked = getattr(divergence, "temperature", 1.0)
                if asked != temperature:
                    raise ValueError(
                        f"{who} log-probabilities at temperature {temperature}, term {name!r} of {type(leaf).__name__} "
                        f"asks for {asked}: cache the teacher's own model with that temperature, or in mode "
                        '"hidden", which serves every temperature'
                    )


class ReferenceCollator:
    """A preference batch, and how likely a cached teacher found its answers: TRL's `ref_…_logps` (B,).

    Args:
        base: TRL's preference collator.
        reader: of a cache of mode "scores" with `label_log_probs`.
        ld_alpha: the trainer's: weight of an answer's tokens beyond the length of the shorter of its pair.
    """

    def __init__(self, base, reader: CacheReader, ld_alpha: float | None = None):
        self.base, self.reader, self.ld_alpha = base, reader, ld_alpha

    def __call__(self, features: list[dict]) -> dict:
        batch = dict(self.base([dict(feature) for feature in features]))  # TRL's renames the example's own columns
        rows = DataCollatorForDistillation(lambda _: batch, readers=(self.reader,))(features)
        log_probs = rows[self.reader.keys["log_probs"]]
        prefix = PREFIX if PREFIX + "row_document" in rows else ""  # a teacher with tokens of its own
        answer = rows[prefix + "document_example"][rows[prefix + "row_document"]]
        if self.ld_alpha is not None:
            beyond = _beyond_the_shorter(answer, 2 * len(features))
            log_probs = torch.where(beyond, self.ld_alpha * log_probs, log_probs)
        summed = log_probs.new_zeros(2 * len(features)).index_add_(0, answer, log_probs)
        chosen, rejected = summed.chunk(2)
        return batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _beyond_the_shorter(answer: Tensor, count: int) -> Tensor:
    """Per token of `count` answers, chosen ones first: whether it lies beyond the length of the shorter of its pair."""
    lengths = answer.bincount(minlength=count)
    place = torch.arange(len(answer)) - (lengths.cumsum(0) - lengths)[answer]
    return place >= torch.minimum(*lengths.chunk(2)).repeat(2)[answer]


def read_reference(trainer, teacher: CachedTeacher) -> None:
    """Let a preference trainer's collator read what its reference has cached."""
    teacher.reader.compare(prepared_by(trainer), trainer.processing_class)
    trainer.data_collator = ReferenceCollator(trainer.data_collator, teacher.reader, trainer.args.ld_alpha)
    trainer.precompute_ref_logps = True
