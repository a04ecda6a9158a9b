"""Mixup: pictures of a batch, and their labels, mixed in pairs by a collator that evaluation does not use."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import TrainerCallback, default_data_collator

SAMPLINGS = ("exact", "official")
SAMPLE = 256  # entries of each tensor that the seed is made from


class MixupCollator:
    """x_i = λ_i x[r_i] + (1 - λ_i) x[s_i], r and s two permutations of the batch; labels the same; λ ~ Beta(α, α).

    Every floating-point tensor of the batch is mixed, so a teacher's own `teacher_pixel_values` are mixed alike. Of the
    batch come back: the mixed tensors, soft `labels` (B, C), `mix_lambda` (B,) and `labels_hard` (B,), the class of the
    larger share. What is drawn depends on the seed, the epoch and the batch's content alone: a resumed run mixes the
    same, in any worker and on any rank.

    A trainer evaluates with `clean`, the collator that is wrapped. Text is refused: token ids cannot be mixed, and
    their embeddings are each model's own.

    Args:
        base: makes the batch; None is transformers' default collator.
        alpha: of the Beta distribution; 1 draws λ evenly, smaller ones nearer to 0 and 1.
        fraction: share of the examples that are mixed, 0 to 1; the others come as they are, in another order.
        num_labels: classes.
        per_sample: a λ for each example; False draws one for the batch.
        sampling: "exact" mixes round(fraction · B) examples; "official" leaves clean what the official code does:
            int((1 - fraction) · B) draws with replacement, so that more are mixed than is said.
        seed: another one draws otherwise.

    Attributes:
        epoch: set by `MixupEpoch`.

    Raises:
        ValueError: numbers out of range; a batch without labels, or with inputs that are not floating-point.
    """

    def __init__(
        self,
        base: Callable | None = None,
        alpha: float = 1.0,
        fraction: float = 0.1,
        num_labels: int | None = None,
        per_sample: bool = True,
        *,
        sampling: str = "exact",
        seed: int = 0,
    ):
        check_mixing(alpha, fraction, sampling)
        if num_labels is None or num_labels < 2:
            raise ValueError(f"num_labels must be the number of classes, at least 2, got {num_labels}")
        self.clean = default_data_collator if base is None else base
        self.alpha, self.fraction, self.num_labels = alpha, fraction, num_labels
        self.per_sample, self.sampling, self.seed, self.epoch = per_sample, sampling, seed, 0

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        batch = dict(self.clean(features))
        labels = self._checked_labels(batch)
        first, second, lam = self._draw(batch, len(labels))
        mixed = {
            key: mix(value, first, second, lam) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in batch.items()
        }
        soft = mixup_labels(labels[first], labels[second], lam, self.num_labels)
        return mixed | {"labels": soft, "mix_lambda": lam, "labels_hard": soft.argmax(-1)}

    def _checked_labels(self, batch: dict) -> Tensor:
        labels = batch.get("labels")
        if not torch.is_tensor(labels) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"mixup needs one class per example in `labels`, the batch has {', '.join(batch)}")
        whole = [k for k, v in batch.items() if k != "labels" and torch.is_tensor(v) and not v.is_floating_point()]
        if whole:
            raise ValueError(
                f"mixup mixes floating-point inputs (pixels), but the batch holds {', '.join(whole)}: token ids and "
                "masks cannot be mixed. It is for image classification"
            )
        return labels

    def _draw(self, batch: dict, size: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = np.random.default_rng(self._seed_of(batch))
        first, second = draw.permutation(size), draw.permutation(size)
        lam = draw.beta(self.alpha, self.alpha, size if self.per_sample else 1) * np.ones(size)
        if self.sampling == "exact":
            clean = draw.permutation(size)[round(self.fraction * size) :]
        else:
            clean = draw.integers(0, size, int(size * (1 - self.fraction)))
        lam[clean] = 1.0
        return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(lam).float()

    def _seed_of(self, batch: dict) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}".encode(), digest_size=16)
        for key in sorted(batch):
            if torch.is_tensor(batch[key]):
                rows = batch[key].detach().reshape(len(batch[key]), -1)
                places = torch.linspace(0, rows.shape[1] - 1, min(SAMPLE, rows.shape[1])).long()
                digest.update(rows[:, places].double().contiguous().numpy())
        return int.from_bytes(digest.digest(), "little")


class MixupEpoch(TrainerCallback):
    """Tells a MixupCollator the epoch, before its batches are made."""

    def __init__(self, collator: MixupCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int((state.epoch or 0) + 1e-6)


def mix(x: Tensor, first: Tensor, second: Tensor, lam: Tensor) -> Tensor:
    """lam · x[first] + (1 - lam) · x[second], (B, …) with lam (B,); what has lam 1 is x[first] to the bit."""
    lam = lam.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(lam == 1, x[first], lam * x[first] + (1 - lam) * x[second])


def mixup_labels(labels_a: Tensor, labels_b: Tensor, lam: Tensor, num_classes: int) -> Tensor:
    """(B, C) soft labels, lam · onehot(a) + (1 - lam) · onehot(b).

    Args:
        labels_a, labels_b: (B,) classes.
        lam: (B,) or a number's tensor, in the type of the result.
    """
    lam = lam.reshape(-1, 1)
    return lam * one_hot(labels_a, num_classes) + (1 - lam) * one_hot(labels_b, num_classes)


def check_mixing(alpha: float, fraction: float, sampling: str) -> None:
    """Raises ValueError for settings of a MixupCollator that are out of range."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha of the Beta distribution must be positive, got {alpha}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is the share of examples that are mixed, 0 to 1, got {fraction}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
