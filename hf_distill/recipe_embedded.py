"""The default of classification recipes without flags: data that every machine has, and a teacher trained on the spot.

Pictures are scikit-learn's handwritten digits. Texts are snippets of Python's standard library, whose class is the
package they are from; snippets of one file may lie in both splits, so that the figures say nothing beyond this task.
"""

from __future__ import annotations

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_distill.recipe import EMBEDDED

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
SNIPPET = 120  # characters


def digits() -> DatasetDict:
    """1,347 and 450 grey pictures of 8 x 8 pixels, ten classes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the default pictures are scikit-learn's digits: pip install scikit-learn, or name your own with "
            "--dataset_name"
        ) from error
    found = load_digits()
    pictures = (found.images * 255 / 16).astype("uint8")
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return _split({"image": list(pictures), "label": found.target.tolist()}, features)


def snippets() -> DatasetDict:
    """A few thousand snippets of source, six classes."""
    from hf_distill.embedded.corpus import SPLITS, stdlib_documents

    columns = {"text": [], "label": []}
    for document in (d for split in SPLITS for d in stdlib_documents(split)):
        if document["module"] in PACKAGES:
            for start in range(0, min(len(document["text"]), 4 * SNIPPET), SNIPPET):
                columns["text"].append(document["text"][start : start + SNIPPET])
                columns["label"].append(PACKAGES.index(document["module"]))
    return _split(columns, Features({"text": Value("string"), "label": ClassLabel(names=list(PACKAGES))}))


def _split(columns: dict, features: Features) -> DatasetDict:
    """Three quarters and the rest, in a fixed random order."""
    order = torch.randperm(len(columns["label"]), generator=torch.Generator().manual_seed(0)).tolist()
    cut = 3 * len(order) // 4
    parts = {"train": order[:cut], "test": order[cut:]}
    return DatasetDict(
        {
            part: Dataset.from_dict({name: [values[i] for i in rows] for name, values in columns.items()}, features)
            for part, rows in parts.items()
        }
    )


def digit_models(train: Dataset, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel, ViTImageProcessorPil]:
    """An untrained student, a ViT trained on these pictures in seconds, and the processor of both."""
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    student, teacher = (_vit(train.features["label"].names, *shape, seed) for shape in ((24, 1), (64, 2)))
    pictures = [picture.convert("RGB") for picture in train["image"]]
    inputs = {"pixel_values": torch.cat([processor(p, return_tensors="pt")["pixel_values"] for p in pictures])}
    return student, _trained(teacher, inputs, train["label"], steps=200), processor


def snippet_models(train: Dataset, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel, object]:
    """An untrained student, a BERT trained on these texts in seconds, and the tokenizer of both."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = 48
    student, teacher = (_bert(train.features["label"].names, *shape, tokenizer, seed) for shape in ((16, 1), (48, 1)))
    inputs = dict(tokenizer(list(train["text"]), padding=True, truncation=True, return_tensors="pt"))
    return student, _trained(teacher, inputs, train["label"], steps=200), tokenizer


def _named(names: list[str]) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _vit(names: list[str], hidden: int, layers: int, seed: int) -> PreTrainedModel:
    set_seed(seed)
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4)
    return ViTForImageClassification(
        ViTConfig(**shape, image_size=8, patch_size=2, initializer_range=0.05, hidden_act="relu", **_named(names))
    )


def _bert(names: list[str], hidden: int, layers: int, tokenizer, seed: int) -> PreTrainedModel:
    set_seed(seed)
    shape = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4)
    config = BertConfig(
        **shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        **_named(names),
    )
    return BertForSequenceClassification(config)


def _trained(model: nn.Module, inputs: dict, labels, steps: int, batch: int = 64, rate: float = 2e-3) -> nn.Module:
    """AdamW on random batches with a cosine schedule; the same weights for the same inputs."""
    labels = torch.as_tensor(list(labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch,), generator=draw)
        loss = cross_entropy(model(**{k: v[rows] for k, v in inputs.items()}).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()
