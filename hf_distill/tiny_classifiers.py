"""`--tiny` for classifiers: random 2-layer models of the configured families on eight made-up pictures or texts."""

from __future__ import annotations

import os

import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessorPil,
)

from hf_distill.teachers.cached import is_cache

CLASSES = ("first", "second", "third")
SIZE = 32
_TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_PATCHES = _TOKENS | {"image_size": SIZE, "patch_size": 8}
# a small shape of each family
IMAGE_SHAPES = {
    "vit": _PATCHES | {"intermediate_size": 64},
    "dinov2": _PATCHES | {"mlp_ratio": 2},
    "convnext": _STAGES | {"num_stages": 2, "image_size": SIZE},
    "convnextv2": _STAGES | {"num_stages": 2, "image_size": SIZE},
    "resnet": _STAGES | {"embedding_size": 8, "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": SIZE, "finegrained_output": False},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": SIZE},
}
_TEXT = _TOKENS | {"intermediate_size": 64, "max_position_embeddings": 512}
TEXT_SHAPES = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "electra": _TEXT | {"embedding_size": 32},
    "deberta-v2": _TEXT,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
}
# parts of ids whose config cannot be read without a network; the first that is found counts
FAMILIES = {
    "dinov2": "dinov2",
    "convnextv2": "convnextv2",
    "convnext": "convnext",
    "mobilenet_v2": "mobilenet_v2",
    "resnet": "resnet",
    "swin": "swin",
    "vit": "vit",
    "distilbert": "distilbert",
    "roberta": "roberta",
    "deberta": "deberta-v2",
    "electra": "electra",
    "minilm": "bert",
    "bert": "bert",
    "food": "vit",
}


def family_of(named: str | None, task: str) -> str:
    """The family of an id or folder that a tiny model stands in for.

    Raises:
        ValueError: it cannot be told without a network, or there is no tiny shape of it.
    """
    shapes = IMAGE_SHAPES if task == "image" else TEXT_SHAPES
    if named is None:
        return next(iter(shapes))
    if os.path.isdir(named):
        family = AutoConfig.from_pretrained(named).model_type
    else:
        family = next(
            (f for part, f in FAMILIES.items() if part in named.lower() and not named.startswith("timm/")), ""
        )
    if family not in shapes:
        raise ValueError(
            f"--tiny cannot make a small model of {named!r} for {task} classification offline; it knows "
            f"{', '.join(shapes)}"
        )
    return family


def tiny_classifiers(args, model, task: str, tokenizer: str) -> None:
    """Write the stand-ins under `<output_dir>/tiny` and point the settings at them.

    The two models' pictures are normalised differently, so that the teacher reads its own.
    """
    folder = os.path.join(args.output_dir, "tiny")
    path = args.teacher_model_name_or_path
    if path is not None and is_cache(path):
        raise ValueError(f"--tiny makes up its own teacher and data, and {path} is a cache of others: drop one")
    args.teacher_model_name_or_path = _write(path, os.path.join(folder, "teacher"), task, tokenizer, seed=1)
    args.teacher_model_revision = None
    model.model_name_or_path = _write(
        model.model_name_or_path or path, os.path.join(folder, "student"), task, tokenizer, seed=2
    )
    model.model_revision = "main"


def _write(named: str | None, folder: str, task: str, tokenizer: str, seed: int) -> str:
    family = family_of(named, task)
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    if task == "image":
        config = AutoConfig.for_model(family, **IMAGE_SHAPES[family], **labels)
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        mean = [0.5 if seed == 2 else 0.45] * 3
        ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=mean).save_pretrained(folder)
        return folder
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.model_input_names = ["input_ids", "attention_mask"]
    config = AutoConfig.for_model(
        family, **TEXT_SHAPES[family], vocab_size=len(words), pad_token_id=words.pad_token_id, **labels
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def made_up_classes(task: str, second_text: str | None = None) -> Dataset:
    """Eight rows of `image`, or of `text` and a second one of that name, and `label`."""
    labels = [i % len(CLASSES) for i in range(8)]
    kind = ClassLabel(names=list(CLASSES))
    if task == "text":
        texts = [f"range({i}) gives {' '.join(map(str, range(i))) or 'nothing'}" for i in range(8)]
        columns = {"text": texts} | ({second_text: texts[::-1]} if second_text else {})
        features = Features({name: Value("string") for name in columns} | {"label": kind})
        return Dataset.from_dict(columns | {"label": labels}, features)
    pixels = torch.randint(0, 256, (8, 40, 36, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = {"image": list(pixels.numpy()), "label": labels}
    return Dataset.from_dict(pictures, Features({"image": Image(), "label": kind}))
