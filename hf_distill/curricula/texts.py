"""Texts of a dataset as classifiers read them: in the student's tokens, and in the teacher's where they are others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import DataCollatorWithPadding

from hf_distill.curricula.collators import PREFIX

TEXTS = ("text", "sentence", "sentence1", "premise", "question1", "question", "content", "review")
PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2", "question": "sentence"}


@dataclass(frozen=True)
class TextColumns:
    """Where a dataset has its texts: one column, or two for pairs."""

    text: str
    pair: str | None = None

    @classmethod
    def of(cls, dataset: Dataset, text: str | None, pair: str | None) -> TextColumns:
        """The named columns, or those found by name.

        Raises:
            ValueError: a column that is not there, or none that is known by its name.
        """
        found = cls.found(dataset)
        if text is None and found is None:
            raise ValueError(f"no column of texts among {', '.join(dataset.column_names)}: name it with --text_column")
        columns = found if text is None else cls(text)
        columns = columns if pair is None else cls(columns.text, pair)
        missing = [name for name in (columns.text, columns.pair) if name not in (None, *dataset.column_names)]
        if missing:
            raise ValueError(f"no column {', '.join(missing)} in the dataset, only {', '.join(dataset.column_names)}")
        return columns

    @classmethod
    def found(cls, dataset: Dataset) -> TextColumns | None:
        """Columns of the usual names."""
        names = dataset.column_names
        if "question" in names and "sentence" in names:  # a pair, whose second text alone would look like a text
            return cls("question", "sentence")
        text = next((name for name in TEXTS if name in names), None)
        pair = PAIRS.get(text)
        return None if text is None else cls(text, pair if pair in names else None)

    def texts(self, batch: dict) -> tuple:
        return (batch[self.text],) if self.pair is None else (batch[self.text], batch[self.pair])

    def sample(self, dataset: Dataset, rows: int = 64) -> tuple:
        """The first texts."""
        return self.texts({k: list(v) for k, v in dataset[:rows].items()})

    def tokenised(self, dataset: Dataset, tokenizer, teacher_tokenizer, length: int) -> Dataset:
        """Columns that the student's model reads, `labels`, and `teacher_` ones where there is a tokenizer for them."""

        def tokenise(batch: dict) -> dict:
            texts = self.texts(batch)
            out = dict(tokenizer(*texts, truncation=True, max_length=min(length, tokenizer.model_max_length)))
            if teacher_tokenizer is not None:
                longest = min(length, teacher_tokenizer.model_max_length)
                own = teacher_tokenizer(*texts, truncation=True, max_length=longest)
                out |= {PREFIX + name: value for name, value in own.items()}
            return out

        kept = dataset.select_columns([name for name in (self.text, self.pair, "labels") if name is not None])
        return kept.map(tokenise, batched=True, remove_columns=[n for n in (self.text, self.pair) if n is not None])

    @staticmethod
    def collator(tokenizer, teacher_tokenizer) -> Callable:
        """Pads each model's inputs with its own tokenizer."""
        from hf_distill.teachers.privileged import TeacherInputs

        own = DataCollatorWithPadding(tokenizer)
        return own if teacher_tokenizer is None else TeacherInputs(own, DataCollatorWithPadding(teacher_tokenizer))


def same_tokens(tokenizer, other, texts: tuple) -> bool:
    """Whether two tokenizers have one vocabulary and make the same of these texts."""
    if tokenizer.get_vocab() != other.get_vocab() or tokenizer.pad_token_id != other.pad_token_id:
        return False
    return dict(tokenizer(*texts)) == dict(other(*texts))
