"""Baselines on class logits: KD, DKD, DIST, NKD, and logit standardisation before the first two."""

from __future__ import annotations

from torch import Tensor

from hf_distill.baselines.base import RELATION, Baseline, ComparesExamples
from hf_distill.losses import dist_terms, dkd_terms, kd_loss, nkd_terms, standardize_logits
from hf_distill.signals import Signals


class _Tempered(Baseline):
    def __init__(self, *, temperature: float, **weights):
        super().__init__(**weights)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature


class _Standardised(_Tempered):
    def __init__(self, *, standardize: bool, temperature, weight, label_weight, plain: tuple, warmup: float):
        # Paper: logit standardisation (2403.01427) takes base temperature 2, weight 9 and 0.1 on the labels
        given = (temperature, weight, label_weight)
        defaults = (2.0, 9.0, 0.1) if standardize else plain
        temperature, weight, label_weight = (d if g is None else g for g, d in zip(given, defaults, strict=True))
        super().__init__(temperature=temperature, weight=weight, label_weight=label_weight, warmup=warmup)
        self.standardize = standardize

    def pair(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        logits = (self.class_logits(signals) for signals in (student, teacher))
        return tuple(standardize_logits(z) if self.standardize else z for z in logits)


class HintonKD(_Standardised):
    """Knowledge distillation (1503.02531): 0.1 · CE + 0.9 · T² KL at T = 4, the numbers of CIFAR; see `losses.kd_loss`.

    `LogitKD` is the same with any divergence and schedules.

    Args:
        temperature, weight, label_weight: None takes the paper's: 4, 0.9, 0.1; standardised 2, 9, 0.1.
        standardize: both models' logits are standardised first (2403.01427); the cross-entropy is on the raw ones.
        warmup: see `Baseline`.
    """

    def __init__(self, *, temperature=None, weight=None, label_weight=None, warmup=0.0, standardize=False):
        super().__init__(
            standardize=standardize,
            temperature=temperature,
            weight=weight,
            label_weight=label_weight,
            plain=(4.0, 0.9, 0.1),
            warmup=warmup,
        )

    def names(self) -> tuple[str, ...]:
        return ("kd",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        return {"kd": kd_loss(*self.pair(student, teacher), self.temperature)}


class DKD(_Standardised):
    """Decoupled knowledge distillation (2203.08679): CE + ramp · (alpha · TCKD + beta · NCKD); see `losses.dkd_loss`.

    Args:
        alpha, beta: of the target and the non-target part; 8 is ResNet32x4 to ResNet8x4, 0.5 to 8 elsewhere.
        temperature, weight, label_weight: None takes 4, 1, 1; standardised 2, 9, 0.1.
        warmup: 20 of 240 epochs.
        standardize: see `HintonKD`.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature=None,
        weight=None,
        label_weight=None,
        warmup: float = 20 / 240,
        standardize: bool = False,
    ):
        super().__init__(
            standardize=standardize,
            temperature=temperature,
            weight=weight,
            label_weight=label_weight,
            plain=(4.0, 1.0, 1.0),
            warmup=warmup,
        )
        self.alpha, self.beta = alpha, beta

    def term_weights(self) -> dict[str, float]:
        return {"target": self.alpha, "non_target": self.beta}

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        target, others = dkd_terms(*self.pair(student, teacher), student.labels, self.temperature)
        return {"target": target, "non_target": others}


class NKD(_Tempered):
    """Normalised knowledge distillation (2303.13005): CE + target + gamma · non-target; see `losses.nkd_loss`."""

    def __init__(self, *, gamma=1.5, temperature=1.0, weight=1.0, label_weight=1.0, warmup=0.0):
        super().__init__(temperature=temperature, weight=weight, label_weight=label_weight, warmup=warmup)
        self.gamma = gamma

    def term_weights(self) -> dict[str, float]:
        return {"target": 1.0, "non_target": self.gamma}

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        logits = (self.class_logits(signals) for signals in (student, teacher))
        target, others = nkd_terms(*logits, student.labels, self.temperature)
        return {"target": target, "non_target": others}


class DIST(_Tempered, ComparesExamples):
    """DIST (2205.10536): CE + beta · inter + gamma · intra; see `losses.dist_loss`. `intra` is within each device."""

    couples_batch = "correlates the examples of a batch (intra-class relation)"
    per = {"label": "sample", "inter": "sample", "intra": RELATION}

    def __init__(self, *, beta=2.0, gamma=2.0, temperature=4.0, weight=1.0, label_weight=1.0, warmup=0.0):
        super().__init__(temperature=temperature, weight=weight, label_weight=label_weight, warmup=warmup)
        self.beta, self.gamma = beta, gamma

    def term_weights(self) -> dict[str, float]:
        return {"inter": self.beta, "intra": self.gamma}

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        logits = self.at_least_two(*(self.class_logits(signals) for signals in (student, teacher)))
        inter, intra = dist_terms(*logits, self.temperature)
        return {"inter": inter, "intra": intra}
