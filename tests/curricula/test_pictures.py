"""Pictures that one of two models would read wrongly, and placeholders that truncation cut."""

import pytest
import torch
from transformers import CLIPImageProcessorPil, LlamaConfig, SiglipVisionConfig

from hf_distill.curricula.pictures import WholePictures, check_same_pictures, picture_format
from hf_distill.testing.vlm import TinyVLM
from tests.students.moe_models import qwen3_vl

SETUP = TinyVLM()


def config(**changes):
    made = SETUP.dense().config
    for name, value in changes.items():
        owner = made.vision_config if name in ("image_size", "patch_size") else made
        setattr(owner, name, value)
    return made


def test_the_count_is_not_the_number_of_features_a_model_makes():
    model = SETUP.dense()
    features = model.get_image_features(torch.randn(1, 3, 8, 8)).pooler_output[0]
    assert picture_format(model.config)["placeholders per picture"] == len(features) == 4
    assert picture_format(config(vision_feature_select_strategy="full"))["placeholders per picture"] == 5
    siglip = config(vision_feature_select_strategy="full")
    siglip.vision_config = SiglipVisionConfig(image_size=8, patch_size=4)
    assert picture_format(siglip)["placeholders per picture"] == 4
    assert picture_format(LlamaConfig()) is None


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (config(image_size=16), "placeholders per picture: student 4, teacher 16"),
        (config(patch_size=8), "placeholders per picture: student 4, teacher 1"),
        (config(image_token_index=5), "placeholder id: student 64, teacher 5"),
        (LlamaConfig(), r"the teacher \(llama\) does not"),
        (qwen3_vl(), "spatial_merge_size: student None, teacher 2"),
    ],
)
def test_a_batch_feeds_two_models_that_read_pictures_differently(teacher, message):
    with pytest.raises(ValueError, match=message) as error:
        check_same_pictures(config(), teacher)
    assert "PrivilegedTeacher" in str(error.value)


def test_models_that_read_alike_are_refused():
    check_same_pictures(config(), SETUP.teacher().config, SETUP.processing_class(), SETUP.processing_class())
    check_same_pictures(qwen3_vl(), qwen3_vl())
    check_same_pictures(LlamaConfig(), config())  # a text student may learn from a model with eyes


def test_other_pixels_of_the_same_size_go_unnoticed():
    other = SETUP.processing_class()
    size = {"height": 8, "width": 8}
    other.image_processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.1] * 3)
    with pytest.raises(ValueError, match="make other pixels of one picture"):
        check_same_pictures(config(), config(), SETUP.processing_class(), other)


def test_cut_placeholders_are_fed_to_the_model():
    batch = SETUP.probe()
    assert WholePictures(lambda features: batch, config())([]) is batch
    cut = {"input_ids": batch["input_ids"][:, :3], "pixel_values": batch["pixel_values"]}
    with pytest.raises(ValueError, match="hold 6 picture placeholders and its pictures need 8: truncation to 3"):
        WholePictures(lambda features: cut, config())([])
    text = {"input_ids": torch.ones(2, 3).long()}
    assert WholePictures(lambda features: text, config())([]) is text


def test_cut_placeholders_of_a_grid_are_fed_to_the_model():
    grid = {"pixel_values": torch.zeros(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    ids = torch.full((2, 5), 60)
    ids[:, 0] = 3
    whole = grid | {"input_ids": ids}
    assert WholePictures(lambda features: whole, qwen3_vl())([]) is whole
    with pytest.raises(ValueError, match="hold 6 picture placeholders and its pictures need 8"):
        WholePictures(lambda features: grid | {"input_ids": ids[:, :4]}, qwen3_vl())([])
