"""Tiny classifiers and data for the baselines' tests."""

import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ResNetConfig,
    ViTConfig,
    default_data_collator,
)

from hf_distill import DataCollatorForDistillation, DistillTrainer, FrozenTeacher
from tests.helpers import SGD, plain_arguments

CLASSES = 3
INDEXED = DataCollatorForDistillation(default_data_collator, labels_of="samples", example_columns=("index",))


def vit(hidden: int = 8, layers: int = 2, seed: int = 0, **settings):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
        initializer_range=0.2,
        **settings,
    )
    return AutoModelForImageClassification.from_config(config)


def resnet(hidden: int = 4, layers: int = 2, seed: int = 0, **settings):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=hidden,
        hidden_sizes=[hidden * 2**i for i in range(layers)],
        depths=[1] * layers,
        layer_type="basic",
        num_labels=CLASSES,
        **settings,
    )
    return AutoModelForImageClassification.from_config(config)


def bert(hidden: int = 8, layers: int = 2, seed: int = 0, **settings):
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        vocab_size=32,
        num_labels=CLASSES,
        initializer_range=0.2,
        **settings,
    )
    return AutoModelForSequenceClassification.from_config(config)


FAMILIES = {"vit": vit, "resnet": resnet, "bert": bert}


def labels(n: int) -> list[int]:
    return [i % CLASSES for i in range(n)]


def dataset(family: str, n: int = 8) -> Dataset:
    """Images 16 x 16, or texts of 5 to 8 tokens padded to 8; with each example's row in `index`."""
    draw = torch.Generator().manual_seed(5)
    columns = {"labels": labels(n), "index": list(range(n))}
    if family == "bert":
        ids = torch.randint(1, 32, (n, 8), generator=draw)
        mask = (torch.arange(8) < 5 + torch.arange(n)[:, None] % 4).long()
        return Dataset.from_dict(columns | {"input_ids": (ids * mask).tolist(), "attention_mask": mask.tolist()})
    pixels = torch.randn(n, 3, 16, 16, generator=draw)
    return Dataset.from_dict(columns | {"pixel_values": pixels.tolist()}).with_format("torch")


def trainer(folder, family: str, objective, *, student=None, teacher=None, n: int = 8, **settings) -> DistillTrainer:
    own = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, max_steps=2)
    return DistillTrainer(
        student if student is not None else FAMILIES[family](seed=1),
        teacher=FrozenTeacher(teacher if teacher is not None else FAMILIES[family](12, 3, seed=2)),
        objective=objective,
        args=plain_arguments(folder, **SGD | own | settings),
        data_collator=INDEXED,
        train_dataset=dataset(family, n),
        eval_dataset=dataset(family, 5),
    )
