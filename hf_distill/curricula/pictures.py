"""Pictures in a batch of a vision-language model: placeholders, what two models must share to read one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig, ProcessorMixin

WITHOUT_CLASS_TOKEN = ("siglip",)
REMEDY = (
    "One batch cannot feed both: let the teacher prepare its own inputs, PrivilegedTeacher(teacher, ("
    '"input_ids", "labels", "attention_mask", "pixel_values")) with the TeacherInputs collator'
)


def picture_format(config: PretrainedConfig) -> dict | None:
    """What a batch must look like for a model to read its pictures; None for a model that reads none.

    Example:
        >>> picture_format(LlavaConfig())["placeholders per picture"]  # doctest: +SKIP
        576
    """
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    found = {"placeholder id": getattr(config, "image_token_id", None)}
    if hasattr(config, "vision_feature_select_strategy") and isinstance(vision.image_size, int):
        found |= {"picture size": vision.image_size, "placeholders per picture": _fixed_count(config)}
    else:
        names = ("patch_size", "temporal_patch_size", "spatial_merge_size")
        found |= {name: getattr(vision, name) for name in names if hasattr(vision, name)}
    return found


def _fixed_count(config: PretrainedConfig) -> int:
    vision = config.vision_config
    has_class = not vision.model_type.startswith(WITHOUT_CLASS_TOKEN)
    features = (vision.image_size // vision.patch_size) ** 2 + has_class
    return features - (config.vision_feature_select_strategy == "default")


def check_same_pictures(
    student: PretrainedConfig, teacher: PretrainedConfig, student_processor=None, teacher_processor=None
) -> None:
    """One batch can feed both models.

    Args:
        student, teacher: their configs; nothing is checked for a student that reads no pictures.
        student_processor, teacher_processor: also compared where both have an image processor.

    Raises:
        ValueError: another placeholder, another number of them per picture, other pixels, or a teacher without eyes.
    """
    ours, theirs = picture_format(student), picture_format(teacher)
    if ours is None:
        return
    if theirs is None:
        raise ValueError(f"the student reads pictures and the teacher ({teacher.model_type}) does not. {REMEDY}")
    if ours != theirs:
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        told = "; ".join(f"{name}: student {ours.get(name)}, teacher {theirs.get(name)}" for name in differing)
        raise ValueError(f"student and teacher read pictures differently ({told}). {REMEDY}")
    both = (student_processor, teacher_processor)
    if all(isinstance(processor, ProcessorMixin) and hasattr(processor, "image_processor") for processor in both):
        _check_same_pixels(*(processor.image_processor for processor in both))


def _check_same_pixels(student, teacher) -> None:
    picture = torch.arange(3 * 56 * 84).reshape(3, 56, 84).remainder(251).to(torch.uint8)
    ours, theirs = (p(picture, return_tensors="pt")["pixel_values"].float() for p in (student, teacher))
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 1e-3:
        raise ValueError(
            f"student and teacher make other pixels of one picture ({type(student).__name__} and "
            f"{type(teacher).__name__}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}, means "
            f"{ours.mean().item():.3f} and {theirs.mean().item():.3f}). {REMEDY}"
        )


class WholePictures:
    """A collator that refuses batches in which truncation cut a picture's placeholders.

    Args:
        base: the collator that prepares pictures and texts.
        config: of the model that reads the batch.

    Raises:
        ValueError: fewer placeholders than the batch's pictures need.
    """

    def __init__(self, base: Callable, config: PretrainedConfig):
        self.base, self.config = base, config

    def __getattr__(self, name: str):
        if name == "base":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        batch = self.base(features)
        needed = self._needed(batch)
        if needed is not None:
            found = int((batch["input_ids"] == self.config.image_token_id).sum())
            if found != needed:
                raise ValueError(
                    f"the texts of a batch hold {found} picture placeholders and its pictures need {needed}: "
                    f"truncation to {batch['input_ids'].shape[1]} tokens cut some. Raise max_length, or set it to None"
                )
        return batch

    def _needed(self, batch: dict) -> int | None:
        pixels, grid = batch.get("pixel_values"), batch.get("image_grid_thw")
        if pixels is None or "input_ids" not in batch:
            return None
        if grid is not None:
            return int(grid.prod(-1).sum()) // self.config.vision_config.spatial_merge_size**2
        return len(pixels) * _fixed_count(self.config) if "picture size" in picture_format(self.config) else None
