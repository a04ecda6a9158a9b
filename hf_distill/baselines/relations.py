"""Baselines on relations between the examples of a batch: RKD, similarity preserving, correlation congruence."""

from __future__ import annotations

from torch import Tensor, nn

from hf_distill.baselines.base import RELATION, ComparesExamples
from hf_distill.baselines.features import TapsFeatures
from hf_distill.losses import cc_loss, rkd_terms, sp_loss
from hf_distill.signals import Signals
from hf_distill.students.projectors import as_pooled, width_of
from hf_distill.taps import EMBEDDING

LAST = ((EMBEDDING, EMBEDDING),)


class Relational(TapsFeatures, ComparesExamples):
    """One pair of taps, whose examples are compared with each other within each device's batch."""

    def __init__(self, layers, **options):
        super().__init__(layers, **options)
        if len(self.pairs) != 1:
            raise ValueError(f"{type(self).__name__} compares one pair of layers, got {layers!r}")

    def per_of(self, term: str) -> str:
        return "sample" if term == "label" else RELATION

    def pooled(self, student: Signals, teacher: Signals) -> list[Tensor]:
        """(B, D) of each network, at least two examples."""
        pair, mask = self.tapped(student, teacher)[0], self.text_mask(student)
        return self.at_least_two(*(as_pooled(x, prefix, mask) for x, prefix in zip(pair, self.prefixes, strict=True)))


class RKD(Relational):
    """Relational knowledge distillation (1904.05068): CE + 25 · distance + 50 · angle; see `losses.rkd_loss`.

    Args:
        layers: the embeddings before the classifiers by default; maps and tokens are averaged over places.
        distance_weight, angle_weight: of the two terms.
    """

    def __init__(
        self, layers=LAST, *, distance_weight=25.0, angle_weight=50.0, weight=1.0, label_weight=1.0, **options
    ):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def term_weights(self) -> dict[str, float]:
        return {"distance": self.distance_weight, "angle": self.angle_weight}

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        distance, angle = rkd_terms(*self.pooled(student, teacher))
        return {"distance": distance, "angle": angle}


class SimilarityPreserving(Relational):
    """Similarity preserving (1907.09682): CE + 3000 · ‖G_t - G_s‖² / B²; see `losses.sp_loss`.

    Args:
        layers: the last stage or layer by default, flattened; padding of texts does not count.
    """

    def __init__(self, layers=((-1, -1),), *, weight=3000.0, label_weight=1.0, **options):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)

    def names(self) -> tuple[str, ...]:
        return ("similarity",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        pair, mask = self.tapped(student, teacher)[0], self.text_mask(student)
        if mask is not None:
            pair = [x * mask[..., None].to(x) if x.dim() == 3 else x for x in pair]
        return {"similarity": sp_loss(*self.at_least_two(*pair))}


class CorrelationCongruence(Relational):
    """Correlation congruence as RepDistiller runs it: CE + 0.02 · CC of two learned embeddings; see `losses.cc_loss`.

    Args:
        layers: the embeddings before the classifiers by default; maps and tokens are averaged over places.
        width: of the learned embeddings.
    """

    def __init__(self, layers=LAST, *, width: int = 128, weight=0.02, label_weight=1.0, **options):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)
        self.width = width

    def build(self, shapes: list[tuple]) -> None:
        self.embed = nn.ModuleList(nn.Linear(width_of(shape), self.width) for shape in shapes[0])

    def names(self) -> tuple[str, ...]:
        return ("correlation",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        both = self.pooled(student, teacher)
        ours, theirs = (embed(x.to(embed.weight.dtype)) for embed, x in zip(self.embed, both, strict=True))
        return {"correlation": cc_loss(ours, theirs)}
