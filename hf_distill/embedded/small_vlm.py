"""Small vision-language models made on the spot: whole words, a CLIP tower, Qwen2, and a plain training loop.

For the embedded default and for evidence: nothing here needs the Hub, and a teacher is ready in about a minute.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_distill.students.vlm import build_vlm

PAD, END, UNKNOWN, IMAGE, USER, ASSISTANT = "<pad>", "<end>", "<unknown>", "<image>", "<user>", "<assistant>"
SPECIAL = (PAD, END, UNKNOWN, IMAGE, USER, ASSISTANT)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<' + message['role'] + '>' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] if message['content'] is string else message['content'][0]['text'] }}
{{- '<end>' }}{% endgeneration %}
{%- elif message['content'] is string %}
{{- message['content'] + '<end>' }}
{%- else %}
{%- for part in message['content'] %}{{- '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}
{{- '<end>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}
"""


# ---- parts ----------------------------------------------------------------------------------------------------------
def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The whole words of `texts`, lower case, in alphabetical order; others are `<unknown>`."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words - set(SPECIAL))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def square_images(pixels: int) -> CLIPImageProcessorPil:
    """Shows every image at `pixels` x `pixels`, whatever its own shape."""
    size = {"height": pixels, "width": pixels}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size)


def vision_tower(pixels: int, patch: int, width: int = 64, layers: int = 2, seed: int = 0) -> CLIPVisionModel:
    """An untrained tower; (pixels / patch)² image tokens."""
    torch.manual_seed(seed)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            image_size=pixels,
            patch_size=patch,
            projection_dim=width,
            initializer_range=0.05,
        )
    )


def language_model(tokenizer, width: int, layers: int, feed_forward: int, seed: int = 0) -> Qwen2ForCausalLM:
    """An untrained Qwen2, in the family whose sparse form transformers knows."""
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=512,
            initializer_range=0.05,  # learns faster at this size than the default 0.02
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    return model


def small_vlm(
    tower: PreTrainedModel, language: PreTrainedModel, tokenizer, image_processor, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """`build_vlm` with the templates and the feature layer of this file."""
    return build_vlm(
        tower,
        language,
        tokenizer=tokenizer,
        image_processor=image_processor,
        vision_feature_layer=-1,
        chat_template=CHAT_TEMPLATE,
        seed=seed,
    )


# ---- training -------------------------------------------------------------------------------------------------------
def picture_batch(processor: LlavaProcessor, dataset: Dataset) -> dict[str, Tensor]:
    """All rows (`prompt`, `completion`, `image`) as one padded batch with labels on the completions."""
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return dict(collate([dict(row) for row in dataset]))


def text_batch(tokenizer, dataset: Dataset) -> dict[str, Tensor]:
    """The words of all rows as one padded batch with labels on every word; no images."""
    chats = [
        tokenizer.apply_chat_template(p + c, tokenize=False)
        for p, c in zip(dataset["prompt"], dataset["completion"], strict=True)
    ]
    batch = dict(tokenizer(chats, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def train(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    batch_size: int = 64,
    watch: Callable[[int], None] | None = None,
) -> PreTrainedModel:
    """Next-token cross-entropy with AdamW, linear warm-up and cosine, on rows drawn from `batch`; ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    draw, count = torch.Generator().manual_seed(seed), len(batch["input_ids"])
    model.train()
    for step in range(steps):
        rows = torch.randint(count, (batch_size,), generator=draw)
        part = {name: values[rows] for name, values in batch.items()}
        width = int(part["attention_mask"].sum(-1).max())  # padding is on the right
        part = {name: values[:, :width] if values.dim() == 2 else values for name, values in part.items()}
        model(**part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(step)
    return model.eval()


# ---- a teacher and its students -------------------------------------------------------------------------------------
def trained_teacher(
    folder: str, texts: list[str], dataset: Dataset, *, pixels: int, patch: int, steps: int = 600, width: int = 128
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A dense model of three layers, trained whole on `dataset`; kept in `folder`, from where later runs load it.

    Args:
        texts: all that the tokenizer must know.
        pixels, patch: see `vision_tower`.
    """
    if not os.path.isdir(folder):
        tokenizer = word_tokenizer(texts)
        language = language_model(tokenizer, width, layers=3, feed_forward=2 * width)
        model, processor = small_vlm(vision_tower(pixels, patch), language, tokenizer, square_images(pixels))
        with tqdm(total=steps, desc="training the teacher", unit="step", disable=None) as bar:
            watch = lambda step: bar.update()  # noqa: E731
            train(model, picture_batch(processor, dataset), steps=steps, learning_rate=2e-3, watch=watch)
        part = f"{folder}.part-{os.getpid()}"
        model.save_pretrained(part)
        processor.save_pretrained(part)
        try:
            os.replace(part, folder)  # whole or not at all
        except OSError:  # another process was faster
            shutil.rmtree(part)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    return model.eval(), LlavaProcessor.from_pretrained(folder)


def small_student(
    teacher: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: Dataset,
    *,
    seed: int = 0,
    width: int = 64,
    layers: int = 4,
    feed_forward: int = 128,
    steps: int = 100,
) -> LlavaForConditionalGeneration:
    """The teacher's vision tower, a new projector, and a language model that has read the words of `dataset` only."""
    language = language_model(processor.tokenizer, width, layers, feed_forward, seed)
    train(language, text_batch(processor.tokenizer, dataset), steps=steps, learning_rate=2e-3, seed=seed)
    tower = teacher.model.vision_tower
    return small_vlm(tower, language, processor.tokenizer, processor.image_processor, seed)[0]
