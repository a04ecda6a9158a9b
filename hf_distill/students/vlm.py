"""A small vision-language student from parts: any CLIP or SigLIP tower, a fresh projector, any causal language model.

    student, processor = build_vlm("google/siglip-base-patch16-224", "Qwen/Qwen2.5-0.5B-Instruct")

It is a stock `LlavaForConditionalGeneration` with a `LlavaProcessor`, which transformers loads without this package.
"""

from __future__ import annotations

import copy
import os

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

# towers that LLaVA can read: whether the first of their features is a class token, which it leaves out
TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
CONVERSATION = (
    "{% for message in messages %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# puts a placeholder where a message has a picture, then hands plain texts to the language model's own template
WITH_PICTURES = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set content.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set content.text = content.text + 'IMAGE_TOKEN\\n' -%}
{%- else -%}{%- set content.text = content.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def build_vlm(
    vision_tower: str | PreTrainedModel,
    language_model: str | PreTrainedModel,
    *,
    tokenizer=None,
    image_processor=None,
    image_size: int | None = None,
    image_token: str = "<image>",
    vision_feature_layer: int = -2,
    chat_template: str | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Vision tower - projector (two layers, GELU) - causal language model, as LLaVA-1.5 has them.

    On text alone the model says what the language model says; the projector is new, and a stage that trains only it
    comes first. Build the teacher's and the student's of one family the same way and they share all ids.

    Args:
        vision_tower: a CLIP or SigLIP model: Hub id, folder (of the tower or of the whole model) or vision model.
        language_model: Hub id, folder or model with a head; a model that is passed is copied.
        tokenizer, image_processor: needed where the model was passed; else those of the id or folder.
        image_size: pixels of a side; None is the tower's. Another one interpolates its position embeddings.
        image_token: what stands for a picture in a text; added to the tokenizer where it has none of that name.
        vision_feature_layer: which of the tower's hidden states is projected (LLaVA: the last but one).
        chat_template: None puts pictures into the language model's own template, or a plain one where it has none.
        dtype: of all parts; None is the language model's.
        seed: of the projector, and of a new row for `image_token`.

    Returns:
        The model in eval mode, all parameters trainable, and its processor.

    Raises:
        ValueError: a tower of another kind, a size that is no multiple of its patches, parts that were passed as models
            without their tokenizer or image processor, a processor that makes pictures of another size.
    """
    tower = _tower(vision_tower)
    if image_processor is None:
        image_processor = _of_folder(vision_tower, AutoImageProcessor, "image_processor", "vision_tower")
    if tokenizer is None:
        tokenizer = _of_folder(language_model, AutoTokenizer, "tokenizer", "language_model")
    language = _language_model(language_model)
    dtype = _dtype(dtype) or language.dtype
    if image_size is not None:
        _resize_tower(tower, image_size)
    draw = torch.Generator().manual_seed(seed)
    tokenizer = copy.deepcopy(tokenizer)
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    _make_room(language, len(tokenizer), draw)
    config = _config(tower.config, language.config, tokenizer.convert_tokens_to_ids(image_token), vision_feature_layer)
    model = _assembled(config, tower, language, draw).to(dtype)
    processor = LlavaProcessor(
        image_processor=_sized(copy.deepcopy(image_processor), tower.config.image_size),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(TOWERS[tower.config.model_type]),
        image_token=image_token,
        chat_template=chat_template or picture_template(tokenizer.chat_template, image_token),
    )
    return model.eval(), processor


def picture_template(template: str | None, image_token: str = "<image>") -> str:
    """A chat template whose messages may hold pictures, from a language model's own (None: a plain one)."""
    return WITH_PICTURES.replace("IMAGE_TOKEN", image_token) + (template or CONVERSATION)


# ---- parts ----------------------------------------------------------------------------------------------------------
def _tower(given: str | PreTrainedModel) -> PreTrainedModel:
    """The vision model alone, a copy where a model was given."""
    if isinstance(given, PreTrainedModel):
        _check_tower(given.config)
        return copy.deepcopy(given)
    config = AutoConfig.from_pretrained(given)
    config = getattr(config, "vision_config", config)
    _check_tower(config)
    with init_empty_weights():
        kind = type(AutoModel.from_config(config))
    return kind.from_pretrained(given, config=config)


def _check_tower(config: PretrainedConfig) -> None:
    if config.model_type not in TOWERS:
        raise ValueError(
            f"vision_tower is a {config.model_type}, and LLaVA reads {', '.join(TOWERS)}: give a CLIP or SigLIP model, "
            "as a model its vision part (CLIPVisionModel, SiglipVisionModel)"
        )


def _language_model(given: str | PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(given) if isinstance(given, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(given)
    if model.get_output_embeddings() is None or model.base_model is model:
        raise ValueError(f"language_model is a {type(model).__name__}: give a causal language model with its head")
    return model


def _of_folder(given, auto, what: str, model: str):
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError(f"{model} was passed as a model: pass its {what} too, or give an id or folder")
    return auto.from_pretrained(given)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@torch.no_grad()
def _resize_tower(tower: PreTrainedModel, size: int) -> None:
    """Interpolate the position embeddings in place, so that the tower reads pictures of `size` pixels a side."""
    config, patch = tower.config, tower.config.patch_size
    if size < patch or size % patch:
        raise ValueError(f"image_size={size} is not a multiple of the tower's patch_size={patch}")
    if size == config.image_size:
        return
    embeddings = next(m for m in tower.modules() if isinstance(getattr(m, "position_embedding", None), nn.Embedding))
    old, classes = embeddings.position_embedding.weight, int(TOWERS[config.model_type])
    side, new = config.image_size // patch, size // patch
    grid = old[classes:].T.reshape(1, -1, side, side).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
    weight = torch.cat([old[:classes], grid.flatten(2)[0].T.to(old)])
    embeddings.position_embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.num_patches, embeddings.num_positions = new**2, len(weight)
    embeddings.image_size = config.image_size = size
    embeddings.register_buffer("position_ids", torch.arange(len(weight), device=old.device)[None], persistent=False)


@torch.no_grad()
def _make_room(language: PreTrainedModel, needed: int, draw: torch.Generator) -> None:
    """Heads of one family are padded beyond the tokenizer, so that most have a row to spare already."""
    rows = language.get_input_embeddings().weight.shape[0]
    if needed <= rows:
        return
    language.resize_token_embeddings(needed, mean_resizing=False)
    embeddings, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    for weight in (embeddings,) if head is embeddings else (embeddings, head):
        fresh = torch.randn(needed - rows, weight.shape[1], generator=draw) * weight[:rows].float().std().item()
        weight[rows:] = fresh.to(weight)


def _config(vision: PretrainedConfig, text: PretrainedConfig, image_id: int, layer: int) -> LlavaConfig:
    config = LlavaConfig(
        vision_config=copy.deepcopy(vision),
        text_config=copy.deepcopy(text),
        image_token_index=image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="default" if TOWERS[vision.model_type] else "full",
        vision_feature_layer=layer,
        projector_hidden_act="gelu",
    )
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, getattr(text, name, None))
    return config


def _assembled(config: LlavaConfig, tower, language, draw: torch.Generator) -> LlavaForConditionalGeneration:
    with init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, language.base_model
    model.lm_head = language.get_output_embeddings()
    projector = model.model.multi_modal_projector.to_empty(device=language.device)
    for layer in (projector.linear_1, projector.linear_2):
        weight = torch.randn(layer.weight.shape, generator=draw) * layer.in_features**-0.5  # keeps a feature's size
        layer.weight.data.copy_(weight)
        nn.init.zeros_(layer.bias)
    if language.generation_config is not None:
        model.generation_config = copy.deepcopy(language.generation_config)
    return model.requires_grad_(True)


def _sized(processor, size: int):
    """The image processor, making pictures of size x size as the tower reads them."""
    square = {"height": size, "width": size}
    if getattr(processor, "do_center_crop", False):
        shortest = "shortest_edge" in (processor.size or {})
        processor.size, processor.crop_size = ({"shortest_edge": size} if shortest else dict(square)), dict(square)
    else:
        processor.size = dict(square)
    made = processor(torch.zeros(3, 2 * size, 2 * size, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    if tuple(made.shape[-2:]) != (size, size):
        raise ValueError(
            f"{type(processor).__name__} makes pictures of {tuple(made.shape[-2:])} pixels, the tower reads {size} x "
            f"{size}: pass the tower's own image_processor"
        )
    return processor
