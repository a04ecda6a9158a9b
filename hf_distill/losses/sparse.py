"""Divergences against a teacher known on k entries per row only."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hf_distill.losses.tile import Divergence, Tile
from hf_distill.signals import SampledLogits, SparseLogits, upcast


def check_sparse(divergence: Divergence, teacher: SparseLogits | SampledLogits) -> None:
    """Says where a divergence and a sparse teacher do not go together.

    Raises:
        ValueError: the tail is "ignore", or the teacher is known by draws, and the divergence is not the forward KL or
            its cross-entropy form; or it asks for another temperature than the teacher's.
    """
    if getattr(divergence, "full_vocabulary", False):
        return
    if not same_temperature(divergence, teacher):
        raise ValueError(
            f"the teacher's log-probabilities have temperature {teacher.temperature}, {divergence} asks for another: "
            'store them at that temperature, or hidden states (mode "hidden"), which serve every temperature'
        )
    sums = getattr(divergence, "sums_over_support", False)
    if isinstance(teacher, SampledLogits):
        if not sums:
            raise ValueError(
                f"{divergence} of a teacher known by draws would be biased; use the forward KL or soft_cross_entropy, "
                "or keep the teacher's hidden states or top-k"
            )
        return
    if teacher.tail == "ignore" and not sums:
        raise ValueError(f'{divergence} needs the tail; use tail="bucket" or "renorm" ("ignore" is for the forward KL)')
    if teacher.tail == "renorm" and teacher.shape[-1] == 1:
        warnings.warn('tail="renorm" with k=1 compares 1 with 1: value and gradient are always 0', stacklevel=4)


def same_temperature(divergence: Divergence, teacher: SparseLogits | SampledLogits) -> bool:
    """Whether a divergence asks for the temperature that a sparse teacher's log-probabilities have."""
    if teacher.temperature is None or getattr(divergence, "full_vocabulary", False):
        return True
    return float(getattr(divergence, "temperature", 1.0)) == teacher.temperature


class SparseTile(Tile):
    """The k entries of a sparse teacher, and with tail="bucket" one more for the rest, in the place of the vocabulary.

    Log-probabilities are normalised over the full vocabulary before they are gathered. The teacher's are taken as
    stored (see `check_sparse`).

    Args:
        full: the tile of the student's whole rows.
        teacher: (rows, k). Ids beyond the student's vocabulary count as padding.
    """

    def __init__(self, full: Tile, teacher: SparseLogits | SampledLogits):
        ids, log_probs = teacher.ids, teacher.log_probs.to(full.student.dtype)
        super().__init__(full.student, log_probs, full.labels, full=full)
        self.tail = getattr(teacher, "tail", "ignore")  # draws stand for the whole vocabulary: nothing is left over
        self.known = log_probs.isfinite() & (ids < full.student.shape[-1])
        self.weights = None
        if isinstance(teacher, SampledLogits):
            self.weights = teacher.weights.to(full.student.dtype).where(self.known, 0.0)
        self.best = log_probs.where(self.known, -torch.inf).argmax(-1, keepdim=True)
        self.ids = ids.where(self.known, ids.gather(-1, self.best)).clamp(max=full.student.shape[-1] - 1)

    def log_q(self, temperature: float = 1.0) -> Tensor:
        key = ("log_q", temperature)
        return self.get(key, lambda: self._reduced(self.full.log_q(temperature).gather(-1, self.ids)))

    def log_p(self, temperature: float = 1.0) -> Tensor:
        return self.get("log_p", lambda: self._reduced(self.teacher))

    def p(self, temperature: float = 1.0) -> Tensor:
        """Of a teacher known by draws: what each draw weighs in an expectation under the teacher."""
        return super().p(temperature) if self.weights is None else self.weights

    def inside(self) -> Tensor:
        return self.get("inside", lambda: self.log_p().isfinite() & self.log_q().isfinite())

    def student_top(self) -> Tensor:
        return self.full.student_top()

    def teacher_top(self) -> Tensor:
        return self.ids.gather(-1, self.best).squeeze(-1)

    def add_grad(self, divergence: Divergence, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        if getattr(divergence, "full_vocabulary", False):
            return divergence.add_grad(self, value, row_weight, out)
        temperature = getattr(divergence, "temperature", 1.0)
        if self.tail == "ignore":
            slope = self.p().where(self.inside(), 0.0) * (row_weight[:, None] / -temperature)
            out.addcmul_(self.full.q(temperature), slope.sum(-1, keepdim=True), value=-1)
            out.scatter_add_(-1, self.ids, slope)
            return
        reduced = torch.zeros_like(self.log_q(temperature))
        divergence.add_grad(self, value, row_weight, reduced)
        self._spread(reduced, temperature, out)

    def _reduced(self, log_probs: Tensor) -> Tensor:
        """(rows, k) log-probabilities over the vocabulary as a distribution over the entries of this tile."""
        log_probs = log_probs.where(self.known, -torch.inf)
        if self.tail == "ignore":
            return log_probs
        total = log_probs.logsumexp(-1, keepdim=True)
        if self.tail == "renorm":
            return log_probs - total.where(total.isfinite(), 0.0)
        return torch.cat([log_probs, total.clamp(max=-1e-7).expm1().neg().log()], -1)

    def _spread(self, reduced: Tensor, temperature: float, out: Tensor) -> None:
        """Adds a gradient on the entries of this tile to the full rows, the bucket's to its tokens by their share."""
        k = self.ids.shape[-1]
        if self.tail == "bucket":
            rest = self.full.q(temperature) * (reduced[:, k:] / self.q(temperature)[:, k:])
            out.add_(rest.scatter_(-1, self.ids, 0.0))
        out.scatter_add_(-1, self.ids, reduced[:, :k])


def topk_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    k: int,
    support: str = "teacher",
    tail: str = "bucket",
    beta: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Generalised Jensen-Shannon divergence on the k largest entries of one side and what is left of the rest.

    Args:
        student_logits, teacher_logits: (..., V), any float dtype; vocabularies are cut to the common part.
        mask: (...), 1 counts and 0 does not. None counts all.
        k: entries per row; k = V with a bucket is the full divergence.
        support: whose largest entries: "teacher", or "student" (self-distillation).
        tail: "bucket", "renorm" or "ignore" as in SparseLogits.
        beta: 0 is forward KL, 1 reverse KL; see GeneralizedJSD.
        reduction: "mean" over counted rows, "sum" or "none".

    Raises:
        ValueError: another support or tail, or k outside 1 to V.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> [round(topk_divergence(student, teacher, None, k).item(), 4) for k in (1, 3)]
        [1.2686, 1.361]
    """
    from hf_distill.losses.divergences import GeneralizedJSD
    from hf_distill.losses.fused import one_term

    width = min(student_logits.shape[-1], teacher_logits.shape[-1])
    if support not in ("teacher", "student"):
        raise ValueError(f'support must be "teacher" or "student", got {support!r}')
    if not 1 <= k <= width:
        raise ValueError(f"k must lie between 1 and the common vocabulary {width}, got {k}")
    student_logits, teacher_logits = student_logits[..., :width], teacher_logits[..., :width].detach()
    ids = (teacher_logits if support == "teacher" else student_logits.detach()).topk(k).indices
    log_p = (upcast(teacher_logits) / temperature).log_softmax(-1).gather(-1, ids)
    divergence = GeneralizedJSD(beta, temperature)
    return one_term(student_logits, SparseLogits(ids, log_p, tail), divergence, mask=mask, reduction=reduction)
