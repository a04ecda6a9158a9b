"""NLVR: pictures of three boxes with coloured shapes, human sentences that are true or false of them, and their shapes.

From a folder with images.npz (uint8, N x 50 x 200 x 3) and statements.jsonl (index, sentence, label, structured_rep).
The shapes give questions about present and absent objects and captions, in the columns of `embedded.digits_vqa`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image

from hf_distill.evaluation.hallucination import KINDS, object_questions

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
SHAPES = ("circle", "square", "triangle")
BOXES = ((0, 50), (75, 125), (150, 200))  # columns; grey lies between
QUESTION, CAPTION = "is there a {} ?", "which objects are there ?"
PER_IMAGE = 3


@dataclass(frozen=True)
class Nlvr:
    """`train` and `validation` hold statements (kind "statement") and questions about objects (the kinds of POPE)."""

    train: Dataset
    validation: Dataset
    train_captions: Dataset
    validation_captions: Dataset
    objects: list[set[str]]  # of the pictures of validation_captions


def synonyms() -> dict[str, str]:
    """Every name of an object; the word block is what people say of squares."""
    names = {f"{colour} {shape}": f"{colour} {shape}" for colour in COLOURS.values() for shape in SHAPES}
    return names | {f"{colour} block": f"{colour} square" for colour in COLOURS.values()}


def nlvr(folder: str | Path, held_out: float = 0.25, seed: int = 0) -> Nlvr:
    """All rows; a sentence, with all its pictures, is in exactly one split.

    Raises:
        FileNotFoundError: the folder has no such files.
    """
    folder = Path(folder)
    for name in ("images.npz", "statements.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}: give a folder with images.npz and statements.jsonl")
    statements = [json.loads(line) for line in (folder / "statements.jsonl").read_text(encoding="utf-8").splitlines()]
    images = np.load(folder / "images.npz")["images"]
    sentences = sorted({row["sentence"] for row in statements})
    random.Random(seed).shuffle(sentences)
    unseen = set(sentences[: round(held_out * len(sentences))])
    parts = [[row for row in statements if (row["sentence"] in unseen) == own] for own in (False, True)]
    (train, train_captions, _), (validation, validation_captions, objects) = (
        _split(rows, images, kinds, seed) for rows, kinds in zip(parts, (KINDS[:1], KINDS), strict=True)
    )
    return Nlvr(train, validation, train_captions, validation_captions, objects)


def _split(
    statements: list[dict], images, kinds: tuple[str, ...], seed: int
) -> tuple[Dataset, Dataset, list[set[str]]]:
    pictures = [mosaic(images[row["index"]]) for row in statements]
    objects = [objects_of(row) for row in statements]
    rows = [
        _row(picture, f"true or false ? {row['sentence']}", "true" if row["label"] else "false", "statement")
        for picture, row in zip(pictures, statements, strict=True)
    ]
    for kind in kinds:
        rows += [
            _row(pictures[q.image], q.text(QUESTION), "yes" if q.present else "no", kind)
            for q in object_questions(objects, kind, PER_IMAGE, seed)
        ]
    random.Random(seed).shuffle(rows)
    captions = [
        _row(picture, CAPTION, " , ".join(sorted(held)) + " .", "caption")
        for picture, held in zip(pictures, objects, strict=True)
    ]
    return Dataset.from_list(rows), Dataset.from_list(captions), objects


def mosaic(pixels: np.ndarray) -> Image.Image:
    """(50, 200, 3) -> a square of 100 pixels with the three boxes and a grey one, so that a square tower sees them."""
    square = np.full((100, 100, 3), 211, dtype=np.uint8)
    for i, (start, end) in enumerate(BOXES):
        top, left = 50 * (i // 2), 50 * (i % 2)
        square[top : top + 50, left : left + 50] = pixels[:, start:end]
    return Image.fromarray(square)


def objects_of(statement: dict) -> set[str]:
    """Colour and shape of all that is in the three boxes."""
    return {f"{COLOURS[item['color']]} {item['type']}" for box in statement["structured_rep"] for item in box}


def _row(image: Image.Image, question: str, answer: str, kind: str) -> dict:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"image": image, "prompt": [prompt], "completion": [completion], "kind": kind}


def texts(data: Nlvr) -> list[str]:
    """All that is asked and answered in training."""
    rows = [
        *data.train.select_columns(["prompt", "completion"]),
        *data.train_captions.select_columns(["prompt", "completion"]),
    ]
    return [turn["content"] for row in rows for turn in row["prompt"] + row["completion"]]
