"""The losses every classification student is compared with, as objectives; and all objectives by name."""

from hf_distill.baselines.base import Baseline, ComparesExamples, StudentAlone
from hf_distill.baselines.contrastive import CRD
from hf_distill.baselines.features import AttentionTransfer, FitNet, TapsFeatures
from hf_distill.baselines.logits import DIST, DKD, NKD, HintonKD
from hf_distill.baselines.relations import RKD, CorrelationCongruence, SimilarityPreserving
from hf_distill.baselines.review import ReviewHint
from hf_distill.objectives import FeatureKD, LogitKD, NextToken, Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "logit_kd": LogitKD,
    "feature_kd": FeatureKD,
    "kd": HintonKD,
    "dkd": DKD,
    "dist": DIST,
    "nkd": NKD,
    "fitnet": FitNet,
    "at": AttentionTransfer,
    "rkd": RKD,
    "sp": SimilarityPreserving,
    "cc": CorrelationCongruence,
    "crd": CRD,
    "review": ReviewHint,
}

__all__ = [
    "CRD",
    "DIST",
    "DKD",
    "NKD",
    "OBJECTIVES",
    "RKD",
    "AttentionTransfer",
    "Baseline",
    "ComparesExamples",
    "CorrelationCongruence",
    "FitNet",
    "HintonKD",
    "ReviewHint",
    "SimilarityPreserving",
    "StudentAlone",
    "TapsFeatures",
]
