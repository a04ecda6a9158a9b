"""A run that reads cached teachers: its collator looks them up, and its settings are compared with theirs."""

from __future__ import annotations

import copy

from hf_distill.curricula.collators import DataCollatorForDistillation
from hf_distill.heads import labels_are_shifted, labels_of
from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.teachers.cache.reader import CacheReader
from hf_distill.teachers.cache.source import prepared_by


def attach_readers(trainer, teacher: Teacher | None, objective: Objective | None) -> None:
    """Let the trainer's collator read what its teacher has cached.

    Raises:
        ValueError: an objective at another temperature than the one that was stored; two caches under one name.
    """
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
            _check_temperature(objective, reader)


def _check_temperature(objective: Objective, reader: CacheReader) -> None:
    for _, _, leaf in objective.leaves():
        for progress in (0.0, 0.5, 1.0):
            for name, divergence in leaf.logit_terms(progress).items():
                asked = getattr(divergence, "temperature", reader.temperature)
                if asked != reader.temperature:
                    raise ValueError(
                        f"the cache {reader.path} holds log-probabilities at temperature {reader.temperature}, term "
                        f"{name!r} of {type(leaf).__name__} asks for {asked}: cache with that temperature, or in mode "
                        '"hidden", which serves every temperature'
                    )
