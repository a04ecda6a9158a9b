"""The family of divergences between a student and a teacher distribution: one definition each.

q = softmax(student / T), p = softmax(teacher / T), sums run over the vocabulary both share. The teacher is a constant.
No T² factor: an objective that wants it puts it in its weight. Entries that either side rules out (-inf) count for
nothing wherever the formula would be infinite there. Gradients are those of the values by the student's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_distill.losses.tile import Divergence, Tile, dot


def _between(name: str, value: float, high_included: bool = True) -> None:
    if not (0 <= value < 1 or (high_included and value == 1)):
        raise ValueError(f"{name} must lie in [0, 1{']' if high_included else ')'}, got {value}")


class Tempered:
    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; 1.0 leaves the logits as they are")


def _add_forward(tile: Tile, temperature: float, row_weight: Tensor, out: Tensor) -> None:
    w, p, mass = (row_weight / temperature)[:, None], tile.p(temperature), 1.0
    if not tile.finite:
        p = p.where(tile.inside(), 0.0)
        mass = p.sum(-1, keepdim=True)
    out.addcmul_(tile.q(temperature), w * mass).addcmul_(p, w, value=-1)


def _add_reverse(tile: Tile, temperature: float, row_weight: Tensor, out: Tensor) -> None:
    q = tile.q(temperature)
    centred = tile.log_ratio(temperature) - tile.reverse_kl(temperature)[:, None]
    if not tile.finite:
        inside = tile.inside()
        centred += inside.to(q.dtype) - q.where(inside, 0.0).sum(-1, keepdim=True)
    out.addcmul_(q, centred.mul_((row_weight / temperature)[:, None]))


def _add_through_log_q(tile: Tile, temperature: float, slope: Tensor, row_weight: Tensor, out: Tensor) -> None:
    """out += row_weight · d value / d logits, from slope = d value / d log q."""
    w = (row_weight / temperature)[:, None]
    total = slope.sum(-1, keepdim=True)
    out.addcmul_(slope, w).addcmul_(tile.q(temperature), w * total, value=-1)


def _add_through_q(tile: Tile, temperature: float, slope: Tensor, row_weight: Tensor, out: Tensor) -> None:
    """out += row_weight · d value / d logits, from slope = d value / d q; overwrites `slope`."""
    q = tile.q(temperature)
    slope -= dot(q, slope)[:, None]
    out.addcmul_(q, slope.mul_((row_weight / temperature)[:, None]))


@dataclass(frozen=True)
class ForwardKL(Tempered):
    """Mode-covering divergence, Σ p · [log p - log q]."""

    temperature: float = 1.0
    sums_over_support: ClassVar[bool] = True

    def value(self, tile: Tile) -> Tensor:
        return tile.forward_kl(self.temperature)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        _add_forward(tile, self.temperature, row_weight, out)


@dataclass(frozen=True)
class SoftCrossEntropy(Tempered):
    """Cross-entropy form of the forward KL, -Σ p · log q: its gradient, its value plus the teacher's entropy."""

    temperature: float = 1.0
    sums_over_support: ClassVar[bool] = True

    def value(self, tile: Tile) -> Tensor:
        log_q = tile.log_q(self.temperature)
        return -dot(tile.p(self.temperature), log_q if tile.finite else log_q.where(tile.inside(), 0.0))

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        _add_forward(tile, self.temperature, row_weight, out)


@dataclass(frozen=True)
class ReverseKL(Tempered):
    """Mode-seeking divergence, Σ q · [log q - log p]."""

    temperature: float = 1.0

    def value(self, tile: Tile) -> Tensor:
        return tile.reverse_kl(self.temperature)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        _add_reverse(tile, self.temperature, row_weight, out)


@dataclass(frozen=True)
class Symmetric(Tempered):
    """(1 - lam) · forward KL + lam · reverse KL."""

    lam: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _between("lam", self.lam)

    def value(self, tile: Tile) -> Tensor:
        return torch.lerp(tile.forward_kl(self.temperature), tile.reverse_kl(self.temperature), self.lam)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        _add_forward(tile, self.temperature, row_weight * (1 - self.lam), out)
        _add_reverse(tile, self.temperature, row_weight * self.lam, out)


@dataclass(frozen=True)
class Jeffreys(Tempered):
    """Mean of the forward and the reverse KL."""

    temperature: float = 1.0

    def value(self, tile: Tile) -> Tensor:
        return Symmetric(0.5, self.temperature).value(tile)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        Symmetric(0.5, self.temperature).add_grad(tile, value, row_weight, out)


@dataclass(frozen=True)
class GeneralizedJSD(Tempered):
    """beta · KL(p‖m) + (1 - beta) · KL(q‖m), m = beta · p + (1 - beta) · q (Eq. 1 of arXiv 2306.13649).

    beta multiplies the teacher. beta 0 is forward KL and beta 1 reverse KL by definition; the value jumps there, since
    the interior tends to 0 at both ends (divided by beta, or 1 - beta, it tends to those KLs).
    """

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _between("beta", self.beta)

    @property
    def sums_over_support(self) -> bool:
        return self.beta == 0

    def _end(self) -> Divergence | None:
        return {0: ForwardKL, 1: ReverseKL}[self.beta](self.temperature) if self.beta in (0, 1) else None

    def _student_log_ratio(self, tile: Tile) -> Tensor:
        log_m = tile.mixture(self.temperature, 1 - self.beta).log()
        return tile.filled(torch.sub(tile.log_q(self.temperature), log_m, out=log_m))

    def value(self, tile: Tile) -> Tensor:
        if end := self._end():
            return end.value(tile)
        T = self.temperature
        student = dot(tile.q(T), tile.get((self, "student"), lambda: self._student_log_ratio(tile)))
        log_m = tile.mixture(T, 1 - self.beta).log()
        teacher = dot(tile.p(T), tile.filled(torch.sub(tile.log_p(T), log_m, out=log_m)))
        return self.beta * teacher + (1 - self.beta) * student

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        if end := self._end():
            return end.add_grad(tile, value, row_weight, out)
        slope = tile.memo.pop((self, "student"), None)
        slope = self._student_log_ratio(tile) if slope is None else slope
        _add_through_q(tile, self.temperature, slope, row_weight * (1 - self.beta), out)


@dataclass(frozen=True)
class SkewForwardKL(Tempered):
    """KL(p ‖ lam · p + (1 - lam) · q) (DistiLLM, arXiv 2402.03898); lam 0 is forward KL."""

    lam: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _between("lam", self.lam, high_included=False)

    @property
    def sums_over_support(self) -> bool:
        return self.lam == 0

    def value(self, tile: Tile) -> Tensor:
        T = self.temperature
        if self.lam == 0:
            return tile.forward_kl(T)
        log_m = tile.mixture(T, 1 - self.lam).log()
        return dot(tile.p(T), tile.filled(torch.sub(tile.log_p(T), log_m, out=log_m)))

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        T = self.temperature
        if self.lam == 0:
            return _add_forward(tile, T, row_weight, out)
        slope = tile.q(T) / tile.mixture(T, 1 - self.lam)
        _add_through_log_q(tile, T, slope.mul_(tile.p(T)), row_weight * (self.lam - 1), out)


@dataclass(frozen=True)
class SkewReverseKL(Tempered):
    """KL(q ‖ (1 - lam) · p + lam · q) (DistiLLM, arXiv 2402.03898); lam 0 is reverse KL."""

    lam: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _between("lam", self.lam, high_included=False)

    def _log_ratio(self, tile: Tile) -> Tensor:
        log_m = tile.mixture(self.temperature, self.lam).log()
        return tile.filled(torch.sub(tile.log_q(self.temperature), log_m, out=log_m))

    def value(self, tile: Tile) -> Tensor:
        if self.lam == 0:
            return tile.reverse_kl(self.temperature)
        return dot(tile.q(self.temperature), self._log_ratio(tile))

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        T = self.temperature
        if self.lam == 0:
            return _add_reverse(tile, T, row_weight, out)
        slope = self._log_ratio(tile).addcdiv_(tile.q(T), tile.mixture(T, self.lam), value=-self.lam)
        _add_through_q(tile, T, slope, row_weight, out)


@dataclass(frozen=True)
class TVD(Tempered):
    """Total variation distance, ½ Σ |p - q|."""

    temperature: float = 1.0

    def value(self, tile: Tile) -> Tensor:
        return (tile.q(self.temperature) - tile.p(self.temperature)).abs_().sum(-1) / 2

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        slope = (tile.q(self.temperature) - tile.p(self.temperature)).sign_()
        _add_through_q(tile, self.temperature, slope, row_weight / 2, out)


@dataclass(frozen=True)
class AdaptiveKL(Tempered):
    """Forward and reverse KL, weighted per row by where student and teacher differ (AKL, arXiv 2404.02657).

    The head is what the teacher's largest probabilities hold up to `mu`, and always the largest; forward KL gets the
    share of Σ |p - q| that lies in the head, reverse KL the rest. The shares are constants, both ½ for equal rows.
    """

    mu: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _between("mu", self.mu)

    def _head_share(self, tile: Tile) -> Tensor:
        ordered, order = tile.p(self.temperature).sort(-1, descending=True)
        head = ordered.cumsum(-1) <= self.mu
        head[:, :1] = True
        gap = (tile.p(self.temperature) - tile.q(self.temperature)).abs_().gather(-1, order)
        total = gap.sum(-1)
        return torch.where(total > 0, gap.where(head, 0.0).sum(-1) / total, 0.5)

    def value(self, tile: Tile) -> Tensor:
        share = tile.get((self, "share"), lambda: self._head_share(tile))
        return torch.lerp(tile.reverse_kl(self.temperature), tile.forward_kl(self.temperature), share)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        share = tile.get((self, "share"), lambda: self._head_share(tile))
        _add_forward(tile, self.temperature, row_weight * share, out)
        _add_reverse(tile, self.temperature, row_weight * (1 - share), out)


@dataclass(frozen=True)
class AlphaBeta(Tempered):
    """-1/(αβ) · Σ [p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)] and its limits (ABKD, arXiv 2505.04560).

    (1, 0) is forward KL, (0, 1) reverse KL, (½, ½) four times the squared Hellinger distance, (α, 1 - α) the
    α-divergence. Powers are cut at e^60, so that negative exponents stay finite.
    """

    # Paper: its code divides the three limit branches by α (or β) once; the limit of the general case is 1/α² (1/β²).
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()

    @property
    def sums_over_support(self) -> bool:
        return (self.alpha, self.beta) == (1, 0)

    def _kl(self) -> Divergence | None:
        ends = {(1, 0): ForwardKL, (0, 1): ReverseKL}
        return ends[self.alpha, self.beta](self.temperature) if (self.alpha, self.beta) in ends else None

    def _power(self, tile: Tile, teacher: float, student: float) -> Tensor:
        """p^teacher · q^student."""
        T = self.temperature
        if teacher == 0:
            exponent = tile.log_q(T) * student
        elif student == 0:
            exponent = tile.log_p(T) * teacher
        else:
            exponent = (tile.log_p(T) * teacher).add_(tile.log_q(T), alpha=student)
        return exponent.clamp_(max=60.0).exp_()

    def _counted(self, tile: Tile, x: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        return x if tile.finite or min(a, b) > 0 else x.where(tile.inside(), 0.0)

    def value(self, tile: Tile) -> Tensor:
        if kl := self._kl():
            return kl.value(tile)
        a, b, ratio = self.alpha, self.beta, tile.log_ratio(self.temperature)
        if a == b == 0:
            return dot(ratio, ratio) / 2
        if b == 0:
            p, q = self._power(tile, a, 0), self._power(tile, 0, a)
            terms, factor = q - p - a * p * ratio, 1 / a**2
        elif a == 0:
            p, q = self._power(tile, b, 0), self._power(tile, 0, b)
            terms, factor = p - q + b * q * ratio, 1 / b**2
        elif a + b == 0:
            terms, factor = self._power(tile, a, b) - 1 + a * ratio, 1 / a**2
        else:
            terms = self._power(tile, a, b).mul_(a + b)
            terms.sub_(self._power(tile, a + b, 0), alpha=a).sub_(self._power(tile, 0, a + b), alpha=b)
            factor = -1 / (a * b * (a + b))
        return factor * self._counted(tile, terms).sum(-1)

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        if kl := self._kl():
            return kl.add_grad(tile, value, row_weight, out)
        a, b = self.alpha, self.beta
        if a == 0:
            slope = self._power(tile, 0, b) * tile.log_ratio(self.temperature)
        else:
            slope = (self._power(tile, 0, a + b) - self._power(tile, a, b)).div_(a)
        _add_through_log_q(tile, self.temperature, self._counted(tile, slope), row_weight, out)


DIVERGENCES: dict[str, type] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jeffreys": Jeffreys,
    "generalized_jsd": GeneralizedJSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TVD,
    "adaptive_kl": AdaptiveKL,
    "alpha_beta": AlphaBeta,
    "soft_cross_entropy": SoftCrossEntropy,
}
