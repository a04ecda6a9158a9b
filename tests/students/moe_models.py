"""Tiny dense models of every family that can be made sparse, and what each becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    ViTConfig,
)

LAYERS = 3
IMAGE, VIDEO = 60, 61
SHAPE = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,  # not hidden_size / heads, as in the real Qwen3
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
THETA = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rms_norm_eps": 1e-3}


class Family(NamedTuple):
    config: Callable
    auto: type
    sparse: str  # the sparse model's class
    layers: str
    native: bool


def llava(text) -> LlavaConfig:
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, initializer_range=0.2, **vision)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)


def qwen3_vl() -> Qwen3VLConfig:
    text = SHAPE | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=4, out_hidden_size=16)
    vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0], initializer_range=0.2)
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=62, vision_end_token_id=63)
    return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)


def vit() -> ViTConfig:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2)
    return ViTConfig(image_size=8, patch_size=4, num_labels=5, initializer_range=0.2, **sizes)


CAUSAL, VLM, IMAGES = AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForImageClassification
PLAIN = "LlavaForConditionalGeneration"
FAMILIES = {
    "qwen2": Family(lambda: Qwen2Config(**SHAPE | THETA), CAUSAL, "Qwen2MoeForCausalLM", "alternate", True),
    "qwen3": Family(lambda: Qwen3Config(**SHAPE | THETA), CAUSAL, "Qwen3MoeForCausalLM", "alternate", True),
    "tied": Family(
        lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True), CAUSAL, "Qwen3MoeForCausalLM", "second_half", True
    ),
    "qwen3_vl": Family(qwen3_vl, VLM, "Qwen3VLMoeForConditionalGeneration", "alternate", True),
    "llama_all": Family(lambda: LlamaConfig(**SHAPE | THETA), CAUSAL, "MixtralForCausalLM", "all", True),
    "mistral_all": Family(
        lambda: MistralConfig(**SHAPE | THETA, sliding_window=4), CAUSAL, "MixtralForCausalLM", "all", True
    ),
    "llava_qwen2": Family(lambda: llava(Qwen2Config(**SHAPE)), VLM, PLAIN, "alternate", True),
    "llava_llama_all": Family(lambda: llava(LlamaConfig(**SHAPE)), VLM, PLAIN, "all", True),
    "llava_llama": Family(lambda: llava(LlamaConfig(**SHAPE)), VLM, PLAIN, "alternate", False),
    "llama": Family(lambda: LlamaConfig(**SHAPE | THETA), CAUSAL, "RoutedLlamaForCausalLM", "alternate", False),
    "mistral": Family(lambda: MistralConfig(**SHAPE), CAUSAL, "RoutedMistralForCausalLM", "first_half", False),
    "qwen2_window": Family(
        lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        CAUSAL,
        "Qwen2MoeForCausalLM",
        "alternate",
        True,
    ),
    "qwen3_window": Family(
        lambda: Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        CAUSAL,
        "RoutedQwen3ForCausalLM",
        "alternate",
        False,
    ),
    "gemma": Family(lambda: GemmaConfig(**SHAPE), CAUSAL, "RoutedGemmaForCausalLM", "alternate", False),
    "gemma2": Family(lambda: Gemma2Config(**SHAPE), CAUSAL, "RoutedGemma2ForCausalLM", "alternate", False),
    "gemma3": Family(lambda: Gemma3TextConfig(**SHAPE), CAUSAL, "RoutedGemma3ForCausalLM", "alternate", False),
    "vit": Family(vit, IMAGES, "RoutedViTForImageClassification", "alternate", False),
}


def dense_model(name: str, seed: int = 0):
    """A random dense model; norms and biases too, so that a forgotten one shows."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    model = family.auto.from_config(family.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_of(name: str, seed: int = 0) -> dict:
    """A batch of two; pictures for vision-language models."""
    torch.manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(2, 58, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("llava"):
        ids[:, 1:5] = IMAGE
        batch["pixel_values"] = torch.randn(2, 3, 8, 8)
    if name == "qwen3_vl":
        ids[:, 1] = 62
        ids[:, 2:6] = IMAGE
        batch["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return batch
