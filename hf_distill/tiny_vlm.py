"""`--tiny` for vision-language runs: random towers and language models of the same families, made-up pictures."""

from __future__ import annotations

import os

import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_distill.students.vlm import build_vlm
from hf_distill.tiny import model_type_of, tiny_model

# (tower, language model) of ids whose config cannot be read without a network, by the start of the id
FAMILIES = {
    "google/siglip": ("siglip", None),
    "openai/clip": ("clip", None),
    "llava-hf/llava-interleave-qwen": ("siglip", "qwen2"),
    "llava-hf/llava-1.5": ("clip", "llama"),
}
PIXELS, PATCH = 16, 8
TOWERS = {
    "siglip": (SiglipVisionConfig, SiglipVisionModel, SiglipImageProcessorPil),
    "clip": (CLIPVisionConfig, CLIPVisionModel, CLIPImageProcessorPil),
}


def tiny_vlms(args, model, recipe, embedded_tokenizer: str) -> None:
    """Write the stand-ins under `<output_dir>/tiny` and point the settings at them.

    Raises:
        ValueError: a tower or a teacher whose family cannot be told from its name.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_tokenizer)
    folder = os.path.join(args.output_dir, "tiny")
    tower, language = families_of(args.teacher_model_name_or_path)
    teacher, processor = build_vlm(
        tiny_tower(tower, seed=1),
        tiny_model(language, len(tokenizer) + 64, tokenizer, seed=1),
        tokenizer=tokenizer,
        image_processor=tiny_image_processor(tower),
    )
    args.teacher_model_name_or_path = _save(os.path.join(folder, "teacher"), teacher, processor)
    args.teacher_model_revision = None
    own = families_of(recipe.vision_tower_name_or_path)[0]
    recipe.vision_tower_name_or_path = _save(
        os.path.join(folder, "tower"), tiny_tower(own, seed=2), tiny_image_processor(own)
    )
    student = tiny_model(model_type_of(model.model_name_or_path), len(tokenizer), tokenizer, seed=2)
    model.model_name_or_path = _save(os.path.join(folder, "student"), student, tokenizer)
    model.model_revision = "main"


def _save(folder: str, *parts) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def families_of(named: str | None) -> tuple[str, str | None]:
    """The families of an id's vision tower and language model (None: it is a tower alone).

    Raises:
        ValueError: an id that FAMILIES does not know.
    """
    for start, families in FAMILIES.items():
        if named is not None and named.startswith(start):
            return families
    raise ValueError(f"--tiny cannot tell the families of {named!r} offline; it knows {', '.join(FAMILIES)}")


def tiny_tower(kind: str, seed: int) -> PreTrainedModel:
    """A random two-layer tower for images of 16 pixels: 4 patches."""
    config, tower, _ = TOWERS[kind]
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return tower(config(image_size=PIXELS, patch_size=PATCH, **sizes))


def tiny_image_processor(kind: str):
    size = {"height": PIXELS, "width": PIXELS}
    crop = {"crop_size": size} if kind == "clip" else {}
    return TOWERS[kind][2](size=size, **crop)


def made_up_pictures() -> Dataset:
    """Eight pictures of one colour with a question and an answer."""
    return Dataset.from_list([{"image": _picture(i), "messages": _chat(i)} for i in range(8)])


def made_up_pairs() -> Dataset:
    """Eight pictures with a right and a wrong answer."""
    rows = []
    for i in range(8):
        question, right = _chat(i)
        wrong = {"role": "assistant", "content": "no colour at all"}
        rows.append({"image": _picture(i), "prompt": [question], "chosen": [right], "rejected": [wrong]})
    return Dataset.from_list(rows)


def _picture(i: int) -> Image.Image:
    return Image.new("RGB", (24, 20), (i * 30, 10, 200 - i * 20))


def _chat(i: int) -> list[dict]:
    question = {"role": "user", "content": "What colour is it?"}
    return [question, {"role": "assistant", "content": f"range({i})" if i % 2 else "red"}]
