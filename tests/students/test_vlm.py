"""A vision-language student from parts is a stock LLaVA that says what its language model says."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from hf_distill.students.vlm import build_vlm, picture_template
from tests.helpers import tiny_llama, tiny_tokenizer
from tests.students.moe_models import dense_model

VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8)
VISION |= dict(patch_size=4, initializer_range=0.2)
CHAT = "{% for m in messages %}w0 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w60 {% endif %}"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]


def clip():
    torch.manual_seed(3)
    return CLIPVisionModel(CLIPVisionConfig(**VISION, projection_dim=16))


def siglip():
    torch.manual_seed(3)
    return SiglipVisionModel(SiglipVisionConfig(**VISION))


def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = CHAT
    return made


def build(tower=None, language=None, **settings):
    tower = tower or clip()
    kind = SiglipImageProcessorPil if "Siglip" in type(tower).__name__ else CLIPImageProcessorPil
    settings = dict(tokenizer=tokenizer(), image_processor=kind()) | settings
    return build_vlm(tower, language or tiny_llama(), **settings)


def batch_of(processor, text=None):
    text = text or processor.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    return processor(images=[Image.new("RGB", (30, 20), (200, 30, 90))], text=[text], return_tensors="pt")


@pytest.mark.parametrize("tower", [clip, siglip])
@pytest.mark.parametrize("size", [None, 12])
def test_a_picture_has_another_number_of_placeholders_than_features(tower, size):
    model, processor = build(tower(), image_size=size)
    batch = batch_of(processor)
    expected = ((size or 8) // 4) ** 2
    assert (batch["input_ids"] == model.config.image_token_id).sum() == expected == model.config.image_seq_length
    assert model(**batch).logits.isfinite().all()
    other = model(**batch | {"pixel_values": -batch["pixel_values"]}).logits
    assert not torch.allclose(other[:, -1], model(**batch).logits[:, -1]), "the picture is not read"


@pytest.mark.parametrize("tower", [clip, siglip])
def test_the_parts_are_not_those_that_were_given(tower):
    given, language = tower(), tiny_llama().eval()
    before = {name: value.clone() for name, value in [*given.named_parameters(), *language.named_parameters()]}
    model, _ = build(given, language)
    ids = torch.randint(2, 60, (2, 9))
    torch.testing.assert_close(model(input_ids=ids).logits[..., :64], language(input_ids=ids).logits)
    pixels = torch.randn(2, 3, 8, 8)
    ours = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(ours, given.eval()(pixels).last_hidden_state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    now = dict([*given.named_parameters(), *language.named_parameters()])
    assert all(torch.equal(now[name], value) for name, value in before.items()), "parts are shared with the student"
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_a_student_comes_back_different_or_needs_this_package(tmp_path):
    model, processor = build(language=dense_model("tied"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LlavaForConditionalGeneration and not any(info.values()), info
    batch, same = batch_of(processor), batch_of(AutoProcessor.from_pretrained(tmp_path))
    assert all(torch.equal(batch[key], same[key]) for key in batch)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    code = f"""
import sys; sys.modules["hf_distill"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
processor, model = AutoProcessor.from_pretrained({str(tmp_path)!r}), AutoModelForImageTextToText.from_pretrained({str(tmp_path)!r})
from PIL import Image
chat = [{{"role": "user", "content": [{{"type": "image", "image": Image.new("RGB", (9, 9))}}, {{"type": "text", "text": "w1"}}]}}]
batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
print(model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] - batch["input_ids"].shape[1])
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in ("1", "2"), done.stderr[-2000:]


def test_the_image_token_pushes_out_another_or_moves_ids():
    language = tiny_llama()
    model, processor = build(language=language)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == 64
    assert model.lm_head.weight.shape[0] == 65 == model.config.text_config.vocab_size
    assert processor.tokenizer("w5 w6")["input_ids"] == tokenizer()("w5 w6")["input_ids"]
    torch.testing.assert_close(model.lm_head.weight[:64], language.lm_head.weight)
    roomy, _ = build(language=tiny_llama(vocabulary=80))  # a head padded beyond its tokenizer has a row to spare
    assert roomy.lm_head.weight.shape[0] == 80 and roomy.config.image_token_id == 64
    own, processor = build(image_token="w7")
    assert own.config.image_token_id == processor.image_token_id == 10 and own.lm_head.weight.shape[0] == 64


def test_the_seed_does_not_decide_what_is_new():
    first, second, other = (build(seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_folders_are_not_read_like_models(tmp_path):
    torch.manual_seed(3)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION, projection_dim=16)))
    whole.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    tiny_llama().save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    model, processor = build_vlm(str(tmp_path / "clip"), str(tmp_path / "llama"))
    tower = dict(model.model.vision_tower.named_parameters())
    given = dict(whole.vision_model.named_parameters())
    assert tower and all(torch.equal(value, given[name.removeprefix("vision_model.")]) for name, value in tower.items())
    assert model(**batch_of(processor)).logits.isfinite().all()


def test_position_embeddings_are_lost_in_another_size():
    tower = clip()
    old = next(p for n, p in tower.named_parameters() if n.endswith("position_embedding.weight"))
    with torch.no_grad():
        old.copy_(torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0])[:, None].expand(5, 16))
    model, _ = build(tower, image_size=16)
    weight = next(p for n, p in model.named_parameters() if n.endswith("position_embedding.weight"))
    assert weight.shape == (17, 16) and (weight[0] == 9).all()
    grid = weight[1:, 0].reshape(4, 4)
    right, down = grid[:, 1:] - grid[:, :-1], grid[1:] - grid[:-1]
    assert (right > 0).all() and (down > 0).all(), "neighbours are no longer neighbours"
    assert down.mean().item() == pytest.approx(2 * right.mean().item(), rel=1e-3), "rows and columns are exchanged"
    assert model.config.vision_config.image_size == 16 and tower.config.image_size == 8


def test_a_template_loses_messages_or_pictures():
    made = tiny_tokenizer()
    made.chat_template = picture_template(CHAT)
    chat = [*QUESTION, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]
    assert made.apply_chat_template(chat, tokenize=False).split() == "w0 <image> w1 w2 w0 w3 w0 w4".split()
    made.chat_template = picture_template(None)
    text = made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "USER: <image>\nw1 w2\nASSISTANT: w3\nUSER: w4\nASSISTANT: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(tower=ViTModel(ViTConfig(**VISION))), "vision_tower is a vit, and LLaVA reads clip_vision_model"),
        (dict(language=tiny_llama().model), "give a causal language model with its head"),
        (dict(image_size=10), "image_size=10 is not a multiple of the tower's patch_size=4"),
        (dict(image_processor=None), "vision_tower was passed as a model: pass its image_processor"),
        (dict(tokenizer=None), "language_model was passed as a model: pass its tokenizer"),
        (dict(image_processor=CLIPImageProcessorPil(do_resize=False, do_center_crop=False)), "the tower reads 8 x 8"),
    ],
)
def test_parts_that_do_not_fit_are_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
