"""Mimic distillation (LLaVA-MoD, arXiv 2408.15881): which positions count, and the losses on (B, T, V) logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.losses.divergences import ForwardKL
from hf_distill.losses.functional import forward_kl, soft_cross_entropy
from hf_distill.losses.tile import Divergence, Tile
from hf_distill.signals import upcast

ALIGNMENTS, TOKENS, LOSSES = ("next_token", "official"), ("response", "all"), ("only_kd", "kd_lm")


def mimic_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask_alignment: str = "next_token",
    distill_tokens: str = "response",
    common_vocab: int | None = None,
    form: str = "kl",
    attention_mask: Tensor | None = None,
) -> Tensor:
    """KL(teacher ‖ student) at temperature 1, a mean over the masked tokens of the whole batch; 0 where there are none.

    Args:
        student_logits, teacher_logits: (B, T, V) of any float dtype, vocabularies cut to the common first entries.
        labels: (B, T), not shifted, -100 outside the answer.
        mask_alignment: "next_token": position t counts when the token at t + 1 is an answer's. "official": when the
            token at t itself is, as the released code has it.
        distill_tokens: "response", or "all": the first T - 1 positions ("official": all T), without padding where an
            `attention_mask` (B, T) tells it.
        common_vocab: entries to compare; None is all that both have.
        form: "kl", or "ce": without the teacher's entropy, the paper's value. One gradient.

    Raises:
        ValueError: an unknown choice, a `common_vocab` beyond either vocabulary, labels beyond it.

    Example:
        >>> z = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
        >>> round(mimic_kd_loss(z, z.flip(-1), torch.tensor([[-100, 1]])).item(), 4)
        1.5232
    """
    one_of("form", form, ("kl", "ce"))
    size = common_size(student_logits.shape[-1], teacher_logits.shape[-1], common_vocab)
    check_labels(labels, size)
    mask = kd_positions(labels, mask_alignment, distill_tokens, attention_mask)
    loss = forward_kl if form == "kl" else soft_cross_entropy
    return loss(student_logits[..., :size], teacher_logits[..., :size], mask=mask)


def mimic_objective(kd: Tensor, lm: Tensor, aux: Tensor | float, loss_type: str = "only_kd") -> Tensor:
    """KD, with the label loss for "kd_lm", plus the balance loss (already weighted).

    Paper: the released code adds the balance loss twice to "kd_lm", inside the model's loss and again in the trainer.
    """
    one_of("loss_type", loss_type, LOSSES)
    return kd + aux if loss_type == "only_kd" else kd + lm + aux


def next_token_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, T, V) with the labels (B, T) one position on; a mean, 0 where all are masked."""
    targets = labels[:, 1:]
    total = F.cross_entropy(upcast(logits[:, :-1]).transpose(1, 2), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) summed log-probabilities of the answers in labels (B, T), -100 outside, under logits (B, T, V)."""
    targets = labels[:, 1:]
    log_probs = upcast(logits[:, :-1]).log_softmax(-1)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return (chosen * (targets != -100)).sum(-1)


def kd_positions(
    labels: Tensor, mask_alignment: str = "next_token", distill_tokens: str = "response", attention_mask=None
) -> Tensor:
    """(B, T) bool: which positions the KD term counts; see `mimic_kd_loss`."""
    one_of("mask_alignment", mask_alignment, ALIGNMENTS)
    one_of("distill_tokens", distill_tokens, TOKENS)
    holds = labels != -100
    if distill_tokens == "all":
        holds = torch.ones_like(holds) if attention_mask is None else attention_mask.bool()
    if mask_alignment == "official":
        return holds
    mask = F.pad(holds[:, 1:], (0, 1), value=False)
    return mask if distill_tokens == "response" else mask & holds  # padding on the left predicts nothing


def marks_rows(distill_tokens: str, mask_alignment: str) -> bool:
    """Whether the KD term counts other positions than the label loss."""
    return (distill_tokens, mask_alignment) != ("response", "next_token")


def common_size(student: int, teacher: int, common_vocab: int | None = None) -> int:
    """Entries that KD compares. Raises ValueError for a `common_vocab` that one of the vocabularies has not."""
    shared = min(student, teacher)
    if common_vocab is not None and not 1 <= common_vocab <= shared:
        raise ValueError(
            f"common_vocab={common_vocab}: the student has {student} entries and the teacher {teacher}, so choose 1 to "
            f"{shared}"
        )
    return common_vocab or shared


def check_labels(labels: Tensor, size: int) -> None:
    """Raises ValueError for a label that is not among the first `size` entries, which both models know."""
    wrong = (labels >= size).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(
            f"label {int(labels[tuple(place)])} at {place} of a batch lies beyond the {size} entries that student and "
            "teacher are compared on: tokenise with the models' own tokenizer, or raise common_vocab"
        )


@dataclass(frozen=True)
class FirstEntries:
    """A divergence on the first `size` entries, both distributions renormalised there."""

    size: int
    divergence: Divergence = ForwardKL()

    def value(self, tile: Tile) -> Tensor:
        return self.divergence.value(self._cut(tile))

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        self.divergence.add_grad(self._cut(tile), value, row_weight, out[:, : self.size])

    def _cut(self, tile: Tile) -> Tile:
        def make() -> Tile:
            return Tile(tile.student[:, : self.size], tile.teacher[:, : self.size], finite=tile.finite)

        return tile.get(("first", self.size), make)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a setting that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
