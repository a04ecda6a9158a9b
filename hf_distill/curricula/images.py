"""Pictures of a dataset as classifiers read them: prepared when an example is taken, with augmentations of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from hf_distill.curricula.seeded import seeded_draws

ROW = "row"


def crop_and_flip(image: Image.Image) -> Image.Image:
    """CIFAR's: an eighth of the size in black padding on every side, a crop of the old size, every second mirrored."""
    width, height = image.size
    x, y = (int(torch.randint(-(side // 8), side // 8 + 1, ())) for side in (width, height))
    return _flipped(image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y)))


def resized_crop_and_flip(image: Image.Image) -> Image.Image:
    """ImageNet's: a part of 8 to 100 % of the area and a ratio of 3/4 to 4/3, as a square, every second mirrored."""
    width, height = image.size
    area = width * height * float(torch.empty(()).uniform_(0.08, 1.0))
    ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
    w, h = min(max(round(math.sqrt(area * ratio)), 1), width), min(max(round(math.sqrt(area / ratio)), 1), height)
    x, y = int(torch.randint(0, width - w + 1, ())), int(torch.randint(0, height - h + 1, ()))
    side = max(w, h)
    return _flipped(image.crop((x, y, x + w, y + h)).resize((side, side), Image.Resampling.BICUBIC))


def _flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


AUGMENTATIONS = {"none": None, "crop_flip": crop_and_flip, "resized_crop_flip": resized_crop_and_flip}


class PreparesImages:
    """For `Dataset.with_transform`: pictures become `pixel_values`, and `teacher_pixel_values` where they differ.

    Other columns stay as they are.

    Args:
        processor: the student's image processor.
        teacher_processor: the teacher's, which sees the same augmented picture; None where both make the same pixels.
        column: with the pictures.
        augment: picture -> picture; draws from the global generators, which are seeded by (seed, epoch, row) and put
            back. The rows are numbered in a column `row`.
        seed: of the draws.
        channels: 1 for grey pictures, 3 for colours.

    Attributes:
        epoch: of the draws, moved by `NewDraws`. Without it every epoch draws the same.
    """

    def __init__(self, processor, teacher_processor=None, *, column="image", augment=None, seed=0, channels=3):
        self.processor, self.teacher_processor, self.column = processor, teacher_processor, column
        self.augment: Callable | None = augment
        self.seed, self.channels, self.epoch = seed, channels, 0

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        out = {name: values for name, values in batch.items() if name not in (self.column, ROW)}
        if self.column not in batch:  # only other columns were asked for
            return batch
        images = [self._opened(image) for image in batch[self.column]]
        if self.augment is not None:
            images = [self._drawn(image, row) for image, row in zip(images, batch[ROW], strict=True)]
        out["pixel_values"] = self._pixels(self.processor, images)
        if self.teacher_processor is not None:
            out["teacher_pixel_values"] = self._pixels(self.teacher_processor, images)
        return out

    def _opened(self, image) -> Image.Image:
        if isinstance(image, (list, tuple)):
            if len(image) != 1:
                raise ValueError(f"an example of {self.column!r} holds {len(image)} pictures: a classifier reads one")
            image = image[0]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, dtype=np.uint8))
        return image.convert("L" if self.channels == 1 else "RGB")

    def _drawn(self, image: Image.Image, row: int) -> Image.Image:
        with seeded_draws(self.seed, self.epoch, int(row)):
            return self.augment(image)

    def _pixels(self, processor, images: list[Image.Image]) -> list[torch.Tensor]:
        if self.channels == 1:
            images = [np.asarray(image)[..., None] for image in images]
        return list(processor(images, return_tensors="pt")["pixel_values"])


class NewDraws(TrainerCallback):
    """Another augmentation of every example in every epoch; a resumed run draws what the first one would have."""

    def __init__(self, prepares: PreparesImages):
        self.prepares = prepares

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.prepares.epoch = int((state.epoch or 0) + 1e-6)


def prepared(dataset: Dataset, prepares: PreparesImages) -> Dataset:
    """The dataset with its pictures prepared when they are taken; its rows are numbered where augmentation draws."""
    if prepares.augment is not None:
        dataset = dataset.add_column(ROW, list(range(len(dataset))))
    return dataset.with_transform(prepares)


def same_pixels(processor, other, channels: int = 3) -> bool:
    """Whether two image processors make the same of a picture, to a rounding."""
    draw = np.random.default_rng(0)
    for size in ((40, 64), (300, 260)):
        picture = draw.integers(0, 256, (*size, channels), dtype=np.uint8)
        ours, theirs = (p([picture], return_tensors="pt")["pixel_values"] for p in (processor, other))
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-5):
            return False
    return True
