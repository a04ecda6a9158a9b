"""Preference pairs for a student and a teacher that each read them in their own way.

    collator = DataCollatorForPreferenceDistillation(
        DataCollatorForVisionPreference(processor), DataCollatorForVisionPreference(teacher_processor)
    )

DistillDPOTrainer builds it by itself (`teacher_own_processor`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import BatchFeature
from trl import extract_prompt, is_conversational
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from hf_distill.curricula.collators import PREFIX, loss_rows, with_labels
from hf_distill.teachers.cache.fingerprint import tokenizer_fingerprint

OWN = "reference_"  # the teacher's tokens of a text pair
PER_TOKEN = ("input_ids", "attention_mask", "completion_mask", "token_type_ids", "mm_token_type_ids")


class DataCollatorForPreferenceDistillation:
    """A preference batch for the student, 2 B answers, chosen ones first; and the same answers for the teacher.

    A teacher that reads the student's tokens needs no more than a check that it knows them. One with a processor of its
    own gets its whole batch under `teacher_` keys: inputs, `teacher_labels` and their rows. Its tokens of text pairs
    are in columns that `add_reference_ids` wrote; pictures are prepared by both processors here.

    Args:
        base: TRL's collator, DataCollatorForPreference or DataCollatorForVisionPreference (or your own).
        teacher: the teacher's collator of the same kind, with its own processor; None: it reads the student's batch.
        vocabulary: ids from here on are unknown to one of them; only checked for a shared batch. None does not check.

    Raises:
        ValueError: naming the row: equal answers; an id outside the vocabulary; a picture or a whole answer cut off by
            max_length; anything cut off where the teacher has its own tokens, since no cut falls on the same text.
    """

    def __init__(self, base: Callable, teacher: Callable | None = None, *, vocabulary: int | None = None):
        self.max_length = base.max_length if isinstance(base, DataCollatorForVisionPreference) else None
        self.base = replace(base, max_length=None) if self.max_length is not None else base
        self.teacher, self.vocabulary = teacher, vocabulary

    def __call__(self, features: list[dict]) -> dict:
        for row, feature in enumerate(features):
            if _answer(feature, "chosen") == _answer(feature, "rejected"):
                raise ValueError(f"{_place(row, feature)} has equal answers, chosen and rejected: drop it")
        ours = [{k: v for k, v in feature.items() if not k.startswith(OWN)} for feature in features]
        batch = dict(self.base([dict(feature) for feature in ours]))  # TRL's changes its examples
        if self.max_length is not None and batch["input_ids"].shape[1] > self.max_length:
            self._cut(batch, features)
        if self.teacher is None:
            self._check_ids(batch, features)
            return batch
        self._check_whole(features)
        own = with_labels(dict(self.teacher(_own_features(features))))
        own |= loss_rows(own["labels"])
        return batch | {PREFIX + key: value for key, value in own.items()}

    def _cut(self, batch: dict, features: list[dict]) -> None:
        """Shorten a batch with pictures to max_length, which may cost the end of an answer but no more."""
        image = getattr(self.base.processor, "image_token_id", None)
        lost = batch["input_ids"][:, self.max_length :]
        if image is not None and (rows := (lost == image).any(1)).any():
            row = int(rows.nonzero()[0]) % len(features)
            raise ValueError(
                f"max_length={self.max_length} cuts image tokens of {_place(row, features[row])}: raise it, or set it "
                "to None"
            )
        for key in PER_TOKEN:
            if torch.is_tensor(batch.get(key)):
                batch[key] = batch[key][:, : self.max_length]
        empty = ~batch["completion_mask"][:, 1:].any(1)
        if empty.any():
            row = int(empty.nonzero()[0]) % len(features)
            raise ValueError(
                f"max_length={self.max_length} leaves nothing of an answer of {_place(row, features[row])}: raise it, "
                "or drop such rows"
            )
        if self.teacher is not None:
            raise _uneven(f"max_length={self.max_length} cuts a batch of {batch['attention_mask'].shape[1]} tokens")

    def _check_whole(self, features: list[dict]) -> None:
        for collator, prefix in ((self.base, ""), (self.teacher, OWN)):
            limit = getattr(collator, "max_length", None)
            if limit is None or prefix + "prompt_ids" not in features[0]:
                continue
            for row, feature in enumerate(features):
                answer = max(len(feature[prefix + "chosen_ids"]), len(feature[prefix + "rejected_ids"]))
                if (length := len(feature[prefix + "prompt_ids"]) + answer) > limit:
                    raise _uneven(f"{_place(row, feature)} has {length} tokens, max_length={limit} would cut it")

    def _check_ids(self, batch: dict, features: list[dict]) -> None:
        if self.vocabulary is None:
            return
        ids = batch["input_ids"]
        outside = (ids >= self.vocabulary).nonzero()
        if len(outside):
            row, position = outside[0].tolist()
            raise ValueError(
                f"{_place(row % len(features), features[row % len(features)])} holds token id "
                f"{int(ids[row, position])}, but student and teacher share only ids 0 to {self.vocabulary - 1}: "
                "tokenise with the models' own tokenizer, or set teacher_own_processor"
            )


def _uneven(what: str) -> ValueError:
    return ValueError(
        f"{what}, and a teacher with its own tokens cannot be cut at the same text: raise max_length, set it to None, "
        "or drop long rows"
    )


def _answer(feature: dict, name: str):
    return feature[name] if name in feature else feature.get(name + "_ids", name)


def _place(row: int, feature: dict) -> str:
    prompt = str(feature.get("prompt", ""))
    return f"row {row} of a batch" + (f" (prompt {prompt[:60]!r})" if prompt else "")


def _own_features(features: list[dict]) -> list[dict]:
    own = [{k.removeprefix(OWN): v for k, v in feature.items() if k.startswith(OWN)} for feature in features]
    if own[0]:
        return own
    if "prompt_ids" in features[0]:
        raise ValueError(
            f"the pairs hold no tokens of the teacher's, only {', '.join(sorted(features[0]))}: tokenise them with "
            "add_reference_ids(dataset, teacher_tokenizer) first"
        )
    return [dict(feature) for feature in features]


# ---- the teacher's reading -------------------------------------------------------------------------------------------
def collator_of(processor, *, pictures: bool) -> Callable:
    """TRL's preference collator with this processor or tokenizer, uncut."""
    if pictures:
        return DataCollatorForVisionPreference(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return DataCollatorForPreference(padding)


def add_reference_ids(dataset: Dataset | IterableDataset, processor):
    """Text pairs with the columns `reference_prompt_ids`, `reference_chosen_ids` and `reference_rejected_ids`.

    Tokenised as DPOTrainer does with the student's: an end of sequence after plain texts, the chat template around
    messages, and the answer begins where prompt and whole text diverge.

    Args:
        dataset: rows of prompt, chosen and rejected, or of chosen and rejected that begin alike.
        processor: the teacher's tokenizer or processor.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    return dataset.map(_reference_ids, fn_kwargs={"tokenizer": tokenizer})


def _reference_ids(row: dict, tokenizer) -> dict[str, list[int]]:
    pair = row if "prompt" in row else extract_prompt(row)
    if is_conversational(pair):
        options = {"return_dict": True, "tokenize": True} | (row.get("chat_template_kwargs") or {})
        read = lambda messages, **more: tokenizer.apply_chat_template(messages, **options, **more)["input_ids"]  # noqa: E731
        prompt = read(pair["prompt"], add_generation_prompt=True)
        wholes = [read(pair["prompt"] + pair[name]) for name in ("chosen", "rejected")]
    else:
        end = tokenizer.eos_token or ""
        texts = [pair[name] if pair[name].endswith(end) else pair[name] + end for name in ("chosen", "rejected")]
        prompt = tokenizer(pair["prompt"])["input_ids"]
        wholes = [tokenizer(pair["prompt"] + text)["input_ids"] for text in texts]
    start = min(len(os.path.commonprefix([prompt, whole])) for whole in wholes)
    answers = {"prompt_ids": prompt[:start], "chosen_ids": wholes[0][start:], "rejected_ids": wholes[1][start:]}
    return {OWN + name: ids for name, ids in answers.items()}


# ---- checks ----------------------------------------------------------------------------------------------------------
def check_pairs_differ(dataset) -> None:
    """No pair has two equal answers; streams are checked batch by batch. Raises ValueError, naming the row."""
    if not isinstance(dataset, Dataset) or not {"chosen", "rejected"} <= {*dataset.column_names}:
        return
    for row, (chosen, rejected) in enumerate(zip(dataset["chosen"], dataset["rejected"], strict=True)):
        if chosen == rejected:
            raise ValueError(
                f"row {row} of the train dataset has equal answers, chosen and rejected ({str(chosen)[:60]!r}): "
                "nothing can be learned from it, drop such rows"
            )


def same_processor(ours, theirs) -> bool:
    """Whether two tokenizers or processors read texts and pictures alike."""
    if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        return False
    return _picture_settings(ours) == _picture_settings(theirs)


def _picture_settings(processor) -> dict | None:
    if getattr(processor, "image_processor", None) is None:
        return None
    ignored = ("tokenizer", "image_processor", "chat_template", "processor_class")
    own = {k: v for k, v in processor.to_dict().items() if k not in ignored}
    return own | processor.image_processor.to_dict()


def check_same_pictures(ours, theirs, example: dict) -> None:
    """Two processors make tensors of the same shapes of a pair. Raises ValueError where a teacher needs its own."""
    batches = [_shapes(collator_of(processor, pictures=True)([dict(example)])) for processor in (ours, theirs)]
    if batches[0] != batches[1]:
        apart = [f"{k} {v} and {batches[1].get(k)}" for k, v in batches[0].items() if batches[1].get(k) != v]
        raise ValueError(
            f"student's and teacher's processors read a pair with pictures otherwise ({'; '.join(apart)}): set "
            "teacher_own_processor"
        )


def _shapes(batch: BatchFeature) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, Tensor)}
