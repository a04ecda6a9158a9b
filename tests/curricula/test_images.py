"""Pictures prepared when they are taken, and augmentation whose draws belong to (seed, epoch, row)."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import ViTImageProcessorPil

from hf_distill.curricula.images import (
    NewDraws,
    PreparesImages,
    crop_and_flip,
    prepared,
    resized_crop_and_flip,
    same_pixels,
)
from hf_distill.curricula.seeded import seeded_draws


def processor(size: int = 16, **options) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size}, **options)


def rows(n: int = 6, mode: str = "RGB") -> Dataset:
    draw = np.random.default_rng(0)
    shape = (16, 16, 3) if mode == "RGB" else (16, 16)
    columns = {"image": [draw.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)], "labels": list(range(n))}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "labels": Value("int64")}))


def test_a_row_is_not_what_the_processor_makes_of_its_picture():
    found = prepared(rows(), PreparesImages(processor(), processor(8, image_mean=[0.1] * 3)))
    row = found[2]
    expected = processor()(rows()[2]["image"], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(row["pixel_values"], expected)
    assert row["teacher_pixel_values"].shape == (3, 8, 8) and set(row) == {
        "pixel_values",
        "teacher_pixel_values",
        "labels",
    }
    assert list(found["labels"]) == list(range(6))  # no picture is opened for it
    assert len(found.select([1, 3])) == 2 and found.select([3])[0]["labels"] == 3


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 16, 16)), (3, (3, 16, 16))])
def test_grey_pictures_have_the_wrong_channels(channels, shape):
    plain = processor(image_mean=[0.5] * channels, image_std=[0.5] * channels)
    assert prepared(rows(mode="L"), PreparesImages(plain, channels=channels))[0]["pixel_values"].shape == shape


def test_draws_depend_on_what_else_is_drawn_or_do_not_change_with_the_epoch():
    prepares = PreparesImages(processor(), augment=crop_and_flip, seed=3)
    found = prepared(rows(), prepares)
    first = [found[i]["pixel_values"] for i in range(6)]
    torch.rand(7)
    state = torch.get_rng_state()
    assert all(torch.equal(found[i]["pixel_values"], first[i]) for i in (5, 0, 3))
    assert torch.equal(found.select([4])[0]["pixel_values"], first[4]), "a row's draws are its own"
    assert torch.equal(torch.get_rng_state(), state)
    NewDraws(prepares).on_epoch_begin(None, SimpleNamespace(epoch=1.0), None)
    second = [found[i]["pixel_values"] for i in range(6)]
    assert sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) >= 5
    NewDraws(prepares).on_epoch_begin(None, SimpleNamespace(epoch=0.5), None)  # resumed in the first epoch
    assert all(torch.equal(found[i]["pixel_values"], first[i]) for i in range(6))
    copy = pickle.loads(pickle.dumps(prepares))  # to a worker
    assert torch.equal(copy({"image": [rows()[1]["image"]], "row": [1]})["pixel_values"][0], first[1])


def test_both_models_see_different_crops():
    found = prepared(rows(), PreparesImages(processor(), processor(), augment=crop_and_flip))
    assert all(torch.equal(found[i]["pixel_values"], found[i]["teacher_pixel_values"]) for i in range(6))


def test_a_crop_is_not_a_part_of_the_padded_picture():
    picture = np.arange(1, 257, dtype=np.uint8).reshape(16, 16)
    padded = np.pad(picture, 2)
    parts = [padded[y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    parts += [part[:, ::-1] for part in parts]
    seen = set()
    for i in range(60):
        with seeded_draws(i):
            crop = np.asarray(crop_and_flip(Pictures.fromarray(picture)))
        places = [j for j, part in enumerate(parts) if np.array_equal(crop, part)]
        assert places
        seen.add(places[0])
    assert len(seen) > 25


def test_a_resized_crop_leaves_the_picture():
    picture = Pictures.fromarray(np.full((20, 33, 3), 200, dtype=np.uint8))
    for i in range(30):
        with seeded_draws(i):
            crop = np.asarray(resized_crop_and_flip(picture))
        assert crop.shape[0] == crop.shape[1] <= 33 and (crop == 200).all()


def test_processors_that_make_the_same_pixels_are_told_apart():
    assert same_pixels(processor(), processor())
    assert not same_pixels(processor(), processor(8))
    assert not same_pixels(processor(), processor(image_std=[0.4] * 3))


def test_an_example_of_two_pictures_is_read():
    with pytest.raises(ValueError, match="holds 2 pictures"):
        PreparesImages(processor(), column="images")({"images": [[rows()[0]["image"]] * 2]})
