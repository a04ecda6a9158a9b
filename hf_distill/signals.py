"""What a model says about a batch, as plain tensors. Student and teacher give the same type."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """float32 of any smaller float type; float64 stays float64, so that exact checks stay exact."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Rows:
    """Which positions of a batch carry loss; written once, by the collator.

    Attributes:
        index: (N,) int64 into the flattened (B * S) positions; row i predicts `labels[i]`.
        labels: (N,) int64, never -100.
        document: (N,) int64, the number of the row's document inside the batch, 0 to D - 1 (packed rows hold several).
        example: (D,) int64, the dataset example inside the batch that each document came from.
    """

    index: Tensor
    labels: Tensor
    document: Tensor
    example: Tensor


@dataclass(frozen=True)
class HeadLogits:
    """Logits that are not computed yet: the rows that carry loss, and the head that would project them.

    z = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap); without a softcap z = scale · (hidden Wᵀ + bias).

    Attributes:
        hidden: (N, H) rows.
        weight: (V, H), a plain tensor (already gathered from its shards).
        bias: (V,) or None.
        scale: multiplies the projection (Cohere's logit scale, 1 / Granite's logits scaling).
        softcap: Gemma's final soft cap, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    def tile(self, rows: slice, vocabulary: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits (rows, vocabulary) of some rows over the first `vocabulary` entries, in float32 (float64 if given).

        `dtype` is the type of the matrix product's inputs; None takes the weight's.
        """
        dtype = dtype or self.weight.dtype
        z = self.hidden[rows].to(dtype) @ self.weight[:vocabulary].to(dtype).T
        z = upcast(z)
        if self.bias is not None:
            z = z + self.bias[:vocabulary]
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def dense(self) -> Tensor:
        """All logits (N, V). For checks and small vocabularies; training never needs it."""
        return self.tile(slice(None))


TAILS = ("bucket", "renorm", "ignore")


@dataclass(frozen=True)
class SparseLogits:
    """A teacher known only on k entries per row: token ids and log-probabilities over the full vocabulary.

    Attributes:
        ids: (..., k) int64. Padding slots repeat any id and carry -inf.
        log_probs: (..., k) float, normalised over the full vocabulary (at the temperature they were stored with).
        tail: what the other entries are: "bucket" (one entry with the rest of the mass; the default), "renorm" (both
            sides renormalised on the support) or "ignore" (left out; biased).
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"

    def __post_init__(self):
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(f"ids {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)} differ in shape")

    @property
    def shape(self) -> torch.Size:
        return self.log_probs.shape


Logits = Tensor | HeadLogits | SparseLogits


@dataclass(frozen=True)
class Signals:
    """What a model says about a batch. Everything is optional; an objective's `needs` says what it reads.

    Attributes:
        logits: for language models HeadLogits of the N rows that carry loss; else a tensor (B, C).
        labels: (N,) aligned with the rows of `logits`, or (B,).
        mask: aligned with the rows of `logits`; None counts all (HeadLogits hold only rows that count).
        hidden_states: per layer (B, S, H), embeddings first; their mask is `batch["attention_mask"]`.
        attentions: per layer (B, heads, S, S).
        features: named extra tensors.
        rows: where the rows lie in the batch.
        batch: the batch as the model saw it.
    """

    logits: Logits | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)
    rows: Rows | None = None
    batch: dict = field(default_factory=dict)
