"""The data, teachers and students of the evidence on classification.

Teachers that nobody has trained are trained on the spot, in about a minute, and kept in the work folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Array3D, Dataset, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks import cifar
from benchmarks.classification import Remembered, Task, predictions
from hf_distill import FrozenTeacher
from hf_distill.evaluation.classification import accuracy

VERSIONS = 4  # of each training image
STUDENTS = {
    "ResNet-8, width 8": lambda seed: cifar.resnet(seed).to(memory_format=torch.channels_last),
    "ViT, width 48, 4 layers, patch 4": cifar.vit,
    "MLP-Mixer, width 48, 4 layers, patch 4": lambda seed: cifar.mixer(seed, hidden_size=48),
}


# ---- CIFAR-10 -------------------------------------------------------------------------------------------------------
def cifar10(
    data: Path, work: Path, *, student: str = "ResNet-8, width 8", tail: float = 1.0, noise: float = 0.0
) -> Task:
    """Args:
    tail: rarest class beside the commonest in the training split; counts fall geometrically over the classes.
    noise: share of training labels that are drawn anew among the other classes; column `noisy` tells which.
    """
    pixels, labels = cifar.images(data)
    train, test = cifar.split()
    if tail < 1:
        train = _long_tail(train, labels, tail)
    given, noisy = _with_noise(labels[train], noise)
    views = cifar.normalised(cifar.versions(pixels[train], VERSIONS))
    every = image_dataset(views, given.repeat(VERSIONS), noisy=noisy.repeat(VERSIONS))
    images = len(train)
    held_out = torch.arange(images) % 4 == 3  # of the images, all their versions
    tune = torch.where(~held_out.repeat(VERSIONS))[0]
    right = image_dataset(cifar.normalised(pixels[train][held_out]), labels[train][held_out])
    teacher = cifar.pretrained_resnet20(data)
    counts = labels[train].bincount(minlength=10).tolist()
    return Task(
        teacher=Remembered(teacher, views, name="ResNet-20 of CIFAR-10"),
        make_student=STUDENTS[student],
        train=every,
        tune=every.select(tune.tolist()),
        validation=right,
        tests={"test": image_dataset(cifar.normalised(pixels[test]), labels[test])},
        facts={
            "teacher": "ResNet-20 pretrained on CIFAR-10 (269,722 parameters). It has seen these images in its own "
            "training and is nearly one-hot on them",
            "student": student,
            "data": f"{images} training images"
            + (f" ({counts} per class)" if tail < 1 else "")
            + (f", {noise:.0%} of whose labels are wrong" if noise else "")
            + f" in {VERSIONS} fixed versions each (as it is, mirrored, two random mirrors and shifts by up to 4 "
            "pixels), 400 test images",
        },
    )


def _long_tail(rows: Tensor, labels: Tensor, tail: float) -> Tensor:
    own = labels[rows]
    most = own.bincount(minlength=10).min().item()
    keep = [rows[own == c][: max(round(most * tail ** (c / 9)), 2)] for c in range(10)]
    return torch.cat(keep)[torch.randperm(sum(map(len, keep)), generator=torch.Generator().manual_seed(0))]


def _with_noise(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    noisy = torch.rand(len(labels), generator=draw) < share
    other = (labels + torch.randint(1, 10, labels.shape, generator=draw)) % 10
    return torch.where(noisy, other, labels), noisy


def image_dataset(pixel_values: Tensor, labels: Tensor, **columns: Tensor) -> Dataset:
    shape = tuple(pixel_values.shape[1:])
    kinds = {"pixel_values": Array3D(shape, "float32"), "labels": Value("int64")}
    kinds |= {name: Value(str(column.dtype).removeprefix("torch.")) for name, column in columns.items()}
    rows = {"pixel_values": pixel_values.numpy(), "labels": labels.numpy()}
    rows |= {name: column.numpy() for name, column in columns.items()}
    return Dataset.from_dict(rows, features=Features(kinds)).with_format("torch")


# what is true of a class: airplane automobile bird cat deer dog frog horse ship truck
ASPECTS = {
    "Can it fly?": "1010000000",
    "Is it a vehicle?": "1100000011",
    "Does it have wheels?": "1100000001",
    "Does it travel on roads?": "0100000001",
    "Is it made to carry heavy cargo?": "0000000011",
    "Does it float on water?": "0000000010",
    "Does it have wings?": "1010000000",
    "Does it have four legs?": "0001111100",
    "Does it have fur?": "0001110100",
    "Is it kept at home as a pet?": "0001010000",
    "Does it have hooves?": "0000100100",
    "Can it have antlers?": "0000100000",
    "Can people ride on its back?": "0000000100",
    "Does it have smooth wet skin?": "0000001000",
    "Does it lay eggs?": "0010001000",
    "Does it eat meat?": "0011011000",
    "Does it bark?": "0000010000",
}


def with_aspects(train: Dataset, task: Task, *, shuffled: bool = False) -> Dataset:
    """The train set with `aspect_probs`: templated answers by class, in place of a vision-language model's."""
    table = torch.tensor([[float(c) for c in answers] for answers in ASPECTS.values()]).T  # (classes, questions)
    table = 0.95 * table + 0.05 * (1 - table)
    if shuffled:  # the same answers, of another class each
        table = table[torch.randperm(10, generator=torch.Generator().manual_seed(1))]
    labels = torch.as_tensor(train.with_format(None)["labels"])
    answers = table[labels]
    if shuffled:  # and not even the same class for all its images
        answers = answers[torch.randperm(len(answers), generator=torch.Generator().manual_seed(2))]
    return train.add_column("aspect_probs", list(answers.numpy()))


# ---- digits that move -----------------------------------------------------------------------------------------------
def digits(data: Path, work: Path) -> Task:
    """scikit-learn's digits in the middle of a canvas; the teacher knows digits that are elsewhere, too."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = pad(torch.tensor(found.images / 16, dtype=torch.float32)[:, None], (4, 4, 4, 4))
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:400], order[1200:]
    middle = image_dataset(x[train], y[train])
    # the teacher's images are not the student's: digits 400 to 1199, moved about
    teacher = _image_teacher(
        work / "teachers" / "digits", _moved(x[order[400:1200]], 4, 12), y[order[400:1200]].repeat(12)
    )
    return Task(
        teacher=FrozenTeacher(teacher, name="ResNet-8 of moved digits"),
        make_student=lambda seed: cifar.mixer(seed, hidden_size=32, layers=2, image_size=16, num_channels=1),
        train=middle,
        tune=middle.select(range(300)),
        validation=middle.select(range(300, 400)),
        tests={
            "test": image_dataset(_moved(x[test], 3, 1), y[test]),
            "centred": image_dataset(x[test], y[test]),
        },
        facts={
            "teacher": "ResNet-8 (width 16) trained on 800 other digits shifted by up to 4 pixels",
            "student": "MLP-Mixer, width 32, 2 layers, patch 4",
            "data": "scikit-learn's digits, 400 training images in the middle of a 16 × 16 canvas; 597 test digits "
            "shifted by up to 3 pixels, and the same centred",
        },
    )


def moved_by_hand(train: Dataset, task: Task, *, reach: int = 3, count: int = 8) -> Dataset:
    """`count` random shifts of every image, by up to `reach` pixels."""
    plain = train.with_format("torch")
    return image_dataset(_moved(plain["pixel_values"][:], reach, count), plain["labels"][:].repeat(count))


def _moved(x: Tensor, reach: int, count: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    shifts = torch.randint(-reach, reach + 1, (count * len(x), 2), generator=draw).tolist()
    return torch.stack([torch.roll(x[i % len(x)], shift, (1, 2)) for i, shift in enumerate(shifts)])


def _image_teacher(folder: Path, x: Tensor, y: Tensor):
    if not (folder / "config.json").is_file():
        model = cifar.resnet(0, width=16, num_channels=x.shape[1], image_size=x.shape[-1])
        _fit(model, image_dataset(x, y), folder, steps=1000, rate=3e-3)
    return AutoModelForImageClassification.from_pretrained(folder)


# ---- sentences ------------------------------------------------------------------------------------------------------
def sentences(data: Path, work: Path, *, name: str, train_rows: int = 2000) -> Task:
    """sst2 or trec; a larger encoder learns from all training sentences, the students see the first `train_rows`."""
    texts, labels, test_texts, test_labels = _sst2(data) if name == "sst2" else _trec(data)
    classes = max(labels) + 1
    tokenizer = _words(texts)
    train, test = _text_dataset(tokenizer, texts, labels), _text_dataset(tokenizer, test_texts, test_labels)
    collator = DataCollatorWithPadding(tokenizer)
    folder = work / "teachers" / name
    if not (folder / "config.json").is_file():
        _fit(
            _encoder(tokenizer, 128, 2, classes, 0),
            train,
            folder,
            steps=TEACHER_STEPS[name],
            rate=5e-4,
            collator=collator,
        )
    teacher = AutoModelForSequenceClassification.from_pretrained(folder)
    own = train.select(range(min(train_rows, len(train))))
    cut = round(0.8 * len(own))
    task = Task(
        teacher=FrozenTeacher(teacher, tokenizer, name=f"BERT-shaped encoder of {name}"),
        make_student=lambda seed: _encoder(tokenizer, 32, 1, classes, seed),
        train=own,
        tune=own.select(range(cut)),
        validation=own.select(range(cut, len(own))),
        tests={"test": test},
        collator=collator,
        processing_class=tokenizer,
        facts={},
    )
    logits, right = predictions(teacher, task, test)
    task.facts = {
        "teacher": f"BERT-shaped, width 128, 2 layers, trained here on {len(train)} sentences; test accuracy "
        f"{accuracy(logits, right):.3f}",
        "student": "BERT-shaped, width 32, 1 layer",
        "data": f"{name}, {classes} classes; {len(own)} of the teacher's training sentences, {len(test)} to test",
    }
    return task


TEACHER_STEPS = {"sst2": 600, "trec": 500}


def _sst2(data: Path) -> tuple:
    parts = []
    for part in ("train", "dev"):
        rows = [line.rsplit("\t", 1) for line in _lines(data / "sst2" / f"{part}.tsv")]
        parts += [[text for text, _ in rows], [int(label) for _, label in rows]]
    return tuple(parts)


def _trec(data: Path) -> tuple:
    rows = [line.split("\t") for line in _lines(data / "trec" / "train.tsv")]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    names = sorted({row[0] for row in rows})
    texts, labels = [rows[i][2] for i in order], [names.index(rows[i][0]) for i in order]
    return texts[:-1000], labels[:-1000], texts[-1000:], labels[-1000:]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data must name the folder that holds {path.parent.name}/")
    return path.read_text(encoding="utf-8").splitlines()


def _words(texts: list[str], size: int = 4000) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", model_max_length=48
    )


def _text_dataset(tokenizer, texts: list[str], labels: list[int]) -> Dataset:
    ids = tokenizer([f"[CLS] {text}" for text in texts], truncation=True, return_token_type_ids=False)
    return Dataset.from_dict({**ids, "labels": labels})


def _encoder(tokenizer, hidden: int, layers: int, classes: int, seed: int) -> BertForSequenceClassification:
    set_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        num_labels=classes,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
    )
    return BertForSequenceClassification(config)


def _fit(model, train: Dataset, folder: Path, *, steps: int, rate: float, collator=None) -> None:
    """A teacher, on the labels alone."""
    args = TrainingArguments(
        output_dir=str(folder.with_name(folder.name + "-run")),
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=64,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=train, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval().save_pretrained(folder)
