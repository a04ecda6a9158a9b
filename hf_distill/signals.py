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
class Finish:
    """What makes logits of a product (rows, V') of hidden rows and a head's first V' entries; see HeadLogits."""

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        z = product if self.bias is None else product + self.bias[: product.shape[-1]]
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def chain(self, logits: Tensor, g: Tensor) -> Tensor:
        """Gradient by the product from the gradient `g` by the logits, in place."""
        if self.softcap is not None:
            g *= 1 - (logits / self.softcap) ** 2
        return g if self.scale == 1.0 else g.mul_(self.scale)


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
        product = self.hidden[rows].to(dtype) @ self.weight[:vocabulary].to(dtype).T
        return self.finish(upcast(product))

    @property
    def finish(self) -> Finish:
        return Finish(self.bias, self.scale, self.softcap)

    def dense(self) -> Tensor:
        """All logits (N, V). For checks and small vocabularies; training never needs it."""
        return self.tile(slice(None))


TAILS = ("bucket", "renorm", "ignore")


@dataclass(frozen=True)
class SparseLogits:
    """A teacher known only on k entries per row: token ids and log-probabilities over the full vocabulary.

    Attributes:
        ids: (..., k) int64. Padding slots repeat any id and carry -inf.
        log_probs: (..., k) float, normalised over the full vocabulary.
        tail: what the other entries are: "bucket" (one entry with the rest of the mass; the default), "renorm" (both
            sides renormalised on the support) or "ignore" (left out; biased).
        temperature: that the log_probs have; another one asked for is an error. None leaves it to the caller.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    temperature: float | None = None

    def __post_init__(self):
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.ids.shape != self.log_probs.shape:
            raise ValueError(f"ids {tuple(self.ids.shape)} and log_probs {tuple(self.log_probs.shape)} differ in shape")

    @property
    def shape(self) -> torch.Size:
        return self.log_probs.shape


@dataclass(frozen=True)
class SampledLogits:
    """A teacher known by draws from it: k token ids per row whose importance weights make every expectation unbiased.

    E[Σ_j weights_j · f(ids_j)] = Σ_v p_v · f(v) for any f, so a divergence that is linear in p given the student (the
    forward KL and its cross-entropy form) has an unbiased gradient (arXiv 2503.16870, Section 4).

    Attributes:
        ids: (..., k) int64, drawn with replacement from a proposal; repeated draws may be merged.
        weights: (..., k) float, count / draws · p / proposal; 0 for padding. Not renormalised: that would be biased.
        log_probs: (..., k) float, the teacher's log-probabilities of the ids over the full vocabulary.
        temperature: see SparseLogits.
    """

    ids: Tensor
    weights: Tensor
    log_probs: Tensor
    temperature: float | None = None

    def __post_init__(self):
        if not self.ids.shape == self.weights.shape == self.log_probs.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (self.ids, self.weights, self.log_probs))
            raise ValueError(f"ids, weights and log_probs must have one shape, got {shapes}")

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape


SPACES = ("probability", "logit")


@dataclass(frozen=True)
class MixtureLogits:
    """Several teachers as one distribution; no tensor of it is larger than one teacher's tile.

    Attributes:
        parts: HeadLogits, or tensors (..., V), of the same rows. They are compared on their common first entries.
        weights: (M,) or (..., M), not negative, summing to 1 over M.
        space: "probability" (Σ_m w_m softmax(z_m / T), the default) or "logit" (softmax(Σ_m w_m z_m / T)).
    """

    parts: tuple[HeadLogits | Tensor, ...]
    weights: Tensor
    space: str = "probability"

    def __post_init__(self):
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")
        if not self.parts:
            raise ValueError("a mixture needs at least one part, got none")
        rows = {tuple(part.shape[:-1]) for part in self.parts}
        if len(rows) > 1:
            raise ValueError(f"the parts of a mixture must have the same rows, got {sorted(rows)}")
        if self.weights.shape not in (self.shape[:-1] + (len(self.parts),), (len(self.parts),)):
            raise ValueError(
                f"weights of a mixture must be ({len(self.parts)},) or one such set per row, got "
                f"{tuple(self.weights.shape)}"
            )

    @property
    def shape(self) -> torch.Size:
        first = self.parts[0].shape
        return torch.Size((*first[:-1], min(part.shape[-1] for part in self.parts)))


Logits = Tensor | HeadLogits | SparseLogits | SampledLogits | MixtureLogits


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
