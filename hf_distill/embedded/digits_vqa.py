"""Real images with questions and answers that need no download: scikit-learn's handwritten digits.

Which digit is it? Is it a three? Is it larger than five? Is it even? As many answers are yes as no. An image is in
exactly one split.
"""

from __future__ import annotations

import random
from functools import cache

from datasets import Dataset
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = ("digit", "is", "larger", "even")
SPLITS = ("train", "validation")
VALIDATION = 400  # of 1797 images
CAPTION = "describe the image ."
PIXELS, PATCH = 16, 8  # the 8 x 8 images are shown at 16 x 16: 4 image tokens


@cache
def digit_images() -> tuple[tuple[Image.Image, int], ...]:
    """All images with their digits, in scikit-learn's order.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the embedded images are scikit-learn's digits: pip install scikit-learn") from error
    data = load_digits()
    return tuple(
        (Image.fromarray((pixels * 255 / 16).astype("uint8")).convert("RGB"), int(digit))
        for pixels, digit in zip(data.images, data.target, strict=True)
    )


def split_indices(split: str, seed: int = 0) -> list[int]:
    """The image numbers of a split.

    Example:
        >>> len(split_indices("train")), len(split_indices("validation"))
        (1397, 400)
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    order = list(range(1797))
    random.Random(seed).shuffle(order)
    return order[:-VALIDATION] if split == "train" else order[-VALIDATION:]


def digits_vqa(split: str, kinds: tuple[str, ...] = KINDS, seed: int = 0, images: int | None = None) -> Dataset:
    """One question of each kind about every image of a split, in an order that mixes images and kinds.

    Columns: `image`, `prompt` and `completion` (messages), `kind` (one of KINDS), `digit` (0 to 9).

    Args:
        images: of the split's first so many images; None takes all.

    Raises:
        ValueError: an unknown split or kind.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {kinds!r}")
    pictures, rows = digit_images(), []
    for i in split_indices(split, seed)[:images]:
        image, digit = pictures[i]
        draw = random.Random(f"{seed} {i}")
        asked = {kind: _question(kind, digit, draw) for kind in KINDS}  # all are drawn, so that `kinds` only selects
        rows += [_row(image, *asked[kind], kind=kind, digit=digit) for kind in kinds]
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def digits_captions(split: str, seed: int = 0, images: int | None = None) -> Dataset:
    """A caption of every image of a split, columns as those of `digits_vqa` with kind "caption"."""
    pictures = digit_images()
    rows = [
        _row(pictures[i][0], CAPTION, caption(pictures[i][1]), kind="caption", digit=pictures[i][1])
        for i in split_indices(split, seed)[:images]
    ]
    return Dataset.from_list(rows)


def caption(digit: int) -> str:
    """
    Example:
        >>> caption(3)
        'a handwritten three , odd and small .'
    """
    return f"a handwritten {NAMES[digit]} , {'odd' if digit % 2 else 'even'} and {'large' if digit > 5 else 'small'} ."


def _question(kind: str, digit: int, draw: random.Random) -> tuple[str, str]:
    """A question and its answer."""
    yes = draw.random() < 0.5
    if kind == "digit":
        return "which digit is it ?", NAMES[digit]
    if kind == "even":
        return "is it even ?", "no" if digit % 2 else "yes"
    if kind == "is":
        asked = digit if yes else draw.choice([d for d in range(10) if d != digit])
        return f"is it a {NAMES[asked]} ?", "yes" if yes else "no"
    yes = yes and digit > 0 or digit == 9  # nothing is below zero, and nine is not asked for
    asked = draw.randrange(digit) if yes else draw.randrange(digit, 9)
    return f"is it larger than {NAMES[asked]} ?", "yes" if yes else "no"


def _row(image: Image.Image, question: str, answer: str, **columns) -> dict:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"image": image, "prompt": [prompt], "completion": [completion], **columns}


def texts() -> list[str]:
    """All that is asked and answered, for a tokenizer."""
    questions = [f"is it a {name} ? is it larger than {name} ?" for name in NAMES]
    captions = [caption(digit) for digit in range(10)]
    return [*questions, *captions, *NAMES, CAPTION, "which digit is it ? is it even ? yes no true false"]
