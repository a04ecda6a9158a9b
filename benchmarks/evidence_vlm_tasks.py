"""The sets of `evidence_vlm`: what students learn from, and how their answers are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from benchmarks import nlvr
from hf_distill.embedded import digits_vqa
from hf_distill.evaluation.hallucination import KINDS

ASKED = ["image", "prompt", "completion"]


@dataclass(frozen=True)
class Task:
    """Rows of a set and how its answers are judged.

    Attributes:
        known: what the teacher has learnt from; None where it is what students learn from.
    """

    train: Dataset
    captions: Dataset
    validation: Dataset
    validation_captions: Dataset
    texts: list[str]
    objects: list[set[str]]  # of the pictures of validation_captions
    synonyms: dict[str, str]
    object_kinds: tuple[str, ...]  # whose yes to an absent object is a hallucination
    pixels: int
    patch: int
    caption_tokens: int
    known: Dataset | None = None


STUDENT_DIGITS = 300  # images that students see; the teacher has seen all 1,397, as strong teachers have seen more


def digits_task(folder: str | None = None) -> Task:
    names = digits_vqa.NAMES
    known = [digits_vqa.digits_vqa("train"), digits_vqa.digits_captions("train")]
    captions = digits_vqa.digits_captions("validation")
    return Task(
        digits_vqa.digits_vqa("train", images=STUDENT_DIGITS),
        digits_vqa.digits_captions("train", images=STUDENT_DIGITS),
        digits_vqa.digits_vqa("validation"),
        captions,
        digits_vqa.texts(),
        [{names[digit]} for digit in captions["digit"]],
        {name: name for name in names},
        ("is",),
        digits_vqa.PIXELS,
        digits_vqa.PATCH,
        caption_tokens=16,
        known=concatenate_datasets([rows.select_columns(ASKED) for rows in known]),
    )


def nlvr_task(folder: str) -> Task:
    data = nlvr.nlvr(folder)
    return Task(
        data.train,
        data.train_captions,
        data.validation,
        data.validation_captions,
        nlvr.texts(data),
        data.objects,
        nlvr.synonyms(),
        KINDS,
        pixels=64,
        patch=16,
        caption_tokens=30,
    )


TASKS: dict[str, Callable[..., Task]] = {"digits": digits_task, "nlvr": nlvr_task}
