"""CIFAR-10 for the evidence: a real pretrained ResNet, small students of three families, one fixed split.

Data: a folder `cifar10` with train_*.npz (`images` uint8 (N, 32, 32, 3), `labels`) and a folder `resnet_cifar10` with
resnet20.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_distill.curricula.seeded import SeededAugmentation

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TRAIN, TEST = 1600, 400


# ---- models ---------------------------------------------------------------------------------------------------------
class _Classifier(PreTrainedModel):
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.05)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    def answer(self, states: list[Tensor], pooled: Tensor, labels, hidden: bool | None):
        logits = self.linear(pooled)
        loss = None if labels is None else cross_entropy(logits, labels)
        states = tuple(states) if hidden else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=states)


class CifarResNetConfig(PreTrainedConfig):
    model_type = "cifar_resnet"
    blocks: int = 3
    width: int = 16
    image_size: int = 32
    num_channels: int = 3


class _Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.stride, self.more = stride, (wide - narrow) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.more:  # option A: no weights in the shortcut
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return relu(out + x)


class CifarResNet(_Classifier):
    """He et al.'s ResNet of CIFAR: three stages of `blocks` basic blocks, `width`, 2 and 4 times as many channels.

    Its hidden states are the maps of the stem and of the three stages.
    """

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        widths = [config.width * factor for factor in (1, 1, 2, 4)]
        self.conv1 = nn.Conv2d(config.num_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i in (1, 2, 3):
            first = _Block(widths[i - 1], widths[i], 1 if i == 1 else 2)
            rest = (_Block(widths[i], widths[i], 1) for _ in range(config.blocks - 1))
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states=None, **kwargs):
        states = [relu(self.bn1(self.conv1(pixel_values)))]
        for stage in (self.layer1, self.layer2, self.layer3):
            states.append(stage(states[-1]))
        return self.answer(states, states[-1].mean((2, 3)), labels, output_hidden_states)


class MixerConfig(PreTrainedConfig):
    model_type = "tiny_mixer"
    hidden_size: int = 64
    layers: int = 4
    patch_size: int = 4
    image_size: int = 32
    num_channels: int = 3


class _Mixing(nn.Module):
    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).mT).mT
        return x + self.over_channels(self.norm2(x))


class Mixer(_Classifier):
    """A small MLP-Mixer; its hidden states are tokens (B, N, D), the embeddings first."""

    config_class = MixerConfig

    def __init__(self, config: MixerConfig):
        super().__init__(config)
        tokens = (config.image_size // config.patch_size) ** 2
        self.embed = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(_Mixing(tokens, config.hidden_size) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states=None, **kwargs):
        states = [self.embed(pixel_values).flatten(2).mT]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.answer(states, self.norm(states[-1]).mean(1), labels, output_hidden_states)


for _config, _model in ((CifarResNetConfig, CifarResNet), (MixerConfig, Mixer)):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)


def resnet(seed: int, width: int = 8, blocks: int = 1, num_labels: int = 10, **config) -> CifarResNet:
    """A ResNet of 6 * blocks + 2 layers, untrained."""
    set_seed(seed)
    return CifarResNet(CifarResNetConfig(width=width, blocks=blocks, num_labels=num_labels, **config))


def vit(seed: int, hidden: int = 48, layers: int = 4, num_labels: int = 10, image_size: int = 32):
    set_seed(seed)
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        intermediate_size=2 * hidden,
        image_size=image_size,
        patch_size=4,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def mixer(seed: int, num_labels: int = 10, **config) -> Mixer:
    set_seed(seed)
    return Mixer(MixerConfig(num_labels=num_labels, **config))


def pretrained_resnet20(data: Path) -> CifarResNet:
    """The teacher, in eval mode.

    Raises:
        FileNotFoundError: its weights are not in `data`/resnet_cifar10.
    """
    model = resnet(0, width=16, blocks=3)
    model.load_state_dict(load_file(_there(data / "resnet_cifar10" / "resnet20.safetensors")))
    return model.eval()


# ---- images ---------------------------------------------------------------------------------------------------------
def images(data: Path) -> tuple[Tensor, Tensor]:
    """(2000, 3, 32, 32) uint8 and (2000,) classes, in the order of the files."""
    names = ("train_0000_0999.npz", "train_1000_1999.npz")
    parts = [np.load(_there(data / "cifar10" / name)) for name in names]
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
    pixels = next(v for v in found.values() if v.ndim == 4)
    classes = next(v for v in found.values() if v.ndim == 1)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes).long()


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) as the teacher reads it."""
    return (pixels.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def split() -> tuple[Tensor, Tensor]:
    """Rows of the 1,600 training and of the 400 test images; the same in every run."""
    order = torch.randperm(TRAIN + TEST, generator=torch.Generator().manual_seed(0))
    return order[:TRAIN], order[TRAIN:]


def versions(pixels: Tensor, count: int, seed: int = 0) -> Tensor:
    """(count · N, 3, H, W): the images, their mirror images, then random mirrors shifted by up to 4 pixels.

    A fixed set, so that what a teacher says of it is computed once: version v of image i is row v · N + i.
    """

    def moved(example: dict) -> dict:
        image = example["image"].flip(-1) if torch.rand(()) < 0.5 else example["image"]
        y, x = torch.randint(9, (2,)).tolist()
        return {"image": pad(image, (4, 4, 4, 4))[:, y : y + image.shape[1], x : x + image.shape[2]]}

    out = [pixels, pixels.flip(-1)][:count]
    for version in range(2, count):
        drawn = SeededAugmentation([{"image": image} for image in pixels], moved, seed=seed + version)
        out.append(torch.stack([drawn[i]["image"] for i in range(len(drawn))]))
    return torch.cat(out)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data must name the folder that holds {path.parent.name}/")
    return path
