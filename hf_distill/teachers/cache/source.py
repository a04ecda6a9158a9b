"""What a teacher is asked about: data, and the way from examples to what it sees."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.utils.data import ConcatDataset

from hf_distill.curricula.collators import DataCollatorForDistillation, loss_rows
from hf_distill.heads import labels_are_shifted, labels_of
from hf_distill.teachers.base import PREFIX, Teacher, teacher_batch
from hf_distill.teachers.cache.keys import Document, documents_of, is_flattened
from hf_distill.training import compat

# of a trainer's settings, those that decide what the teacher sees and where the loss is
PREPARING = (
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "padding_free",
    "completion_only_loss",
    "assistant_only_loss",
)


@dataclass
class Source:
    """Examples to cache.

    Attributes:
        collate: examples -> (the collated batch, the documents its teacher sees).
        processing_class: what tokenised them.
        prepared: the trainer's settings that decide what the teacher sees.
        placed: the teacher stands on its device already.
    """

    dataset: ConcatDataset
    collate: Collate
    processing_class: object
    prepared: dict
    placed: bool


class Collate:
    """Examples -> (the collated batch, the documents its teacher sees); runs in the data loader's workers."""

    def __init__(self, collator: DataCollatorForDistillation, every_position: bool, columns: Collection[str] | None):
        self.collator, self.every_position, self.columns = collator, every_position, columns

    def __call__(self, features: list[dict]) -> tuple[dict, list[Document]]:
        if self.columns is not None:
            features = [{k: v for k, v in feature.items() if k in self.columns} for feature in features]
        batch = self.collator(features)
        if self.every_position:
            prefix = PREFIX if PREFIX + "input_ids" in batch else ""
            rows = every_position(teacher_batch(batch), [feature.get(prefix + "input_ids") for feature in features])
            batch |= {prefix + key: value for key, value in rows.items()}
        return batch, documents_of(teacher_batch(batch), features, self.collator.labels_of)


def every_position(batch: dict, ids_of_examples: list) -> dict:
    """Row keys of a causal model's batch as if every token but each document's first were a label."""
    ids = batch["input_ids"]
    labels, lengths, positions = ids.clone(), None, batch.get("position_ids")
    if is_flattened(batch):
        lengths = [len(ids) for ids in ids_of_examples]
        labels[positions == 0] = -100
    elif "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        labels[~mask] = -100
        labels[:, 1:][~mask[:, :-1]] = -100
    return loss_rows(labels, positions, example_lengths=lengths)


def prepared_by(trainer) -> dict:
    """A trainer's settings that decide what its teacher sees."""
    settings = {name: getattr(trainer.args, name) for name in PREPARING if hasattr(trainer.args, name)}
    seed = getattr(trainer.train_dataset, "seed", None)  # of a SeededAugmentation
    return settings | ({} if seed is None else {"augmentation_seed": seed})


def source_of(teacher: Teacher, data, collator, positions: str, processing_class) -> Source:
    """Arguments as `cache_teacher`'s. Raises ValueError for what cannot be cached."""
    prepared, placed, columns = {}, False, None
    if hasattr(data, "train_dataset"):
        if collator is not None:
            raise ValueError("a trainer brings its own collator: leave collator out, or pass the trainer's dataset")
        if compat.is_sharded(data.accelerator):
            raise ValueError(
                "a sharded teacher cannot be cached (ranks run different batches): launch without FSDP or DeepSpeed; a "
                "teacher too large for one device loads with device_map or in 8 or 4 bit"
            )
        held_out = data.eval_dataset
        held_out = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
        datasets = [d for d in (data.train_dataset, *held_out) if d is not None]
        for dataset in datasets:
            _check_dataset(dataset)
        columns = compat.used_columns(data)
        collator, processing_class = data.data_collator, processing_class or data.processing_class
        prepared = prepared_by(data)
        placed = data.teacher is teacher
    else:
        several = isinstance(data, (list, tuple)) and data and not isinstance(data[0], Mapping)
        datasets = list(data) if several else [data]
        for dataset in datasets:
            _check_dataset(dataset)
    collator = _distillation_collator(collator, teacher)
    if positions not in ("loss", "all"):
        raise ValueError(f'positions must be "loss" or "all", got {positions!r}')
    if positions == "all" and (collator.labels_of != "positions" or not collator.shift):
        raise ValueError('positions="all" is for causal language models: leave it at "loss"')
    collate = Collate(collator, positions == "all", columns)
    return Source(ConcatDataset(datasets), collate, processing_class or teacher.tokenizer, prepared, placed)


def _check_dataset(dataset) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        kind = type(dataset).__name__
        raise ValueError(f"a cache needs datasets with a length, got {kind}: load it without streaming")
    if len(dataset) == 0:
        raise ValueError("there is nothing to cache: the dataset is empty")


def _distillation_collator(collator, teacher: Teacher) -> DataCollatorForDistillation:
    if collator is None:
        raise ValueError("give the collator that training uses, or a trainer")
    if isinstance(collator, DataCollatorForDistillation):
        return collator
    model = getattr(teacher, "model", None)
    if model is None:
        raise ValueError("give a DataCollatorForDistillation: this teacher has no model to tell where labels lie")
    return DataCollatorForDistillation(collator, shift=labels_are_shifted(model), labels_of=labels_of(model))
