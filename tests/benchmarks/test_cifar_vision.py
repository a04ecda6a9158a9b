"""The image data and models of the evidence. Tests of the real files skip where DISTILL_DATA does not name them."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from benchmarks import cifar

DATA = Path(os.environ.get("DISTILL_DATA", "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "resnet_cifar10").is_dir(), reason="DISTILL_DATA names no folder with cifar10/ and resnet_cifar10/"
)


@needs_data
def test_the_teacher_is_not_the_published_one():
    teacher = cifar.pretrained_resnet20(DATA)
    assert teacher.num_parameters() == 269_722
    pixels, labels = cifar.images(DATA)
    with torch.no_grad():
        logits = torch.cat([teacher(part).logits for part in cifar.normalised(pixels).split(250)])
    right = logits.argmax(1) == labels
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert (right[:1000].float().mean().item(), right[1000:].float().mean().item()) == pytest.approx((0.999, 0.998))
    assert (loss[:1000].mean().item(), loss[1000:].mean().item()) == pytest.approx((0.00579, 0.00913), abs=2e-5)


def test_train_and_test_images_overlap():
    train, test = cifar.split()
    assert (len(train), len(test)) == (cifar.TRAIN, cifar.TEST)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(2000))
    assert torch.equal(train, cifar.split()[0])


@pytest.mark.parametrize("make", [cifar.resnet, cifar.vit, cifar.mixer])
def test_a_student_is_no_transformers_model(make, tmp_path):
    model = make(3).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits)
        out = model(x, labels=torch.tensor([1, 2]), output_hidden_states=True)
    assert out.loss.ndim == 0 and out.logits.shape == (2, 10) and len(out.hidden_states) >= 4
    assert not torch.equal(make(4).state_dict()[n := next(iter(model.state_dict()))], model.state_dict()[n]) or (
        "token" in n  # ViT's class token starts at zero
    )
    assert torch.equal(make(3).eval()(x).logits, model(x).logits), "the same seed gives another student"


def test_a_shortcut_of_the_resnet_has_weights_or_other_channels():
    block = cifar._Block(2, 4, 2).eval()
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2]) and out[:, [0, 3]].abs().sum() == 0


def test_versions_of_an_image_are_drawn_anew():
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    a, b = cifar.versions(pixels, 4), cifar.versions(pixels, 4)
    assert torch.equal(a, b) and a.shape[0] == 20
    assert torch.equal(a[:5], pixels) and torch.equal(a[5:10], pixels.flip(-1))
    assert not torch.equal(a[10:15], a[15:])
    assert torch.equal(a[:10], cifar.versions(pixels, 2))


def test_missing_data_are_not_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        cifar.images(tmp_path)
