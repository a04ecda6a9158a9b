"""Losses as pure functions: divergences of two models' logits and their engines, features, relations, memory banks."""

from hf_distill.losses.balance import balance_loss, router_z_loss
from hf_distill.losses.classification import (
    dist_loss,
    dist_terms,
    dkd_loss,
    dkd_terms,
    kd_loss,
    nkd_loss,
    nkd_terms,
    standardize_logits,
)
from hf_distill.losses.contrastive import crd_loss, crd_update
from hf_distill.losses.cross_tokenizer import align_bytes, uld_loss
from hf_distill.losses.divergences import (
    DIVERGENCES,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    ForwardKL,
    GeneralizedJSD,
    Jeffreys,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    Symmetric,
)
from hf_distill.losses.features import at_loss, fitnet_loss, hcl_loss
from hf_distill.losses.functional import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    generalized_jsd,
    jeffreys,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    tvd,
)
from hf_distill.losses.fused import observe, one_term, run_terms
from hf_distill.losses.metrics import Agreement, CalibrationBin, StudentEntropy, TeacherEntropy, TopKOverlap
from hf_distill.losses.preference import preference_loss
from hf_distill.losses.relations import cc_loss, rkd_loss, rkd_terms, sp_loss
from hf_distill.losses.sparse import topk_divergence
from hf_distill.losses.targets import Interpolated, LabelCrossEntropy
from hf_distill.losses.tile import Divergence, Tile
from hf_distill.losses.transport import sinkhorn_cost, sinkhorn_distance, sinkhorn_plan
from hf_distill.signals import HeadLogits, MixtureLogits, SampledLogits, SparseLogits

__all__ = [
    "DIVERGENCES",
    "TVD",
    "AdaptiveKL",
    "Agreement",
    "CalibrationBin",
    "AlphaBeta",
    "Divergence",
    "ForwardKL",
    "GeneralizedJSD",
    "HeadLogits",
    "Interpolated",
    "Jeffreys",
    "LabelCrossEntropy",
    "MixtureLogits",
    "ReverseKL",
    "SampledLogits",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SparseLogits",
    "StudentEntropy",
    "Symmetric",
    "TeacherEntropy",
    "Tile",
    "TopKOverlap",
    "adaptive_kl",
    "align_bytes",
    "alpha_beta",
    "at_loss",
    "balance_loss",
    "cc_loss",
    "crd_loss",
    "crd_update",
    "dist_loss",
    "dist_terms",
    "dkd_loss",
    "dkd_terms",
    "fitnet_loss",
    "forward_kl",
    "generalized_jsd",
    "hcl_loss",
    "jeffreys",
    "kd_loss",
    "nkd_loss",
    "nkd_terms",
    "observe",
    "one_term",
    "preference_loss",
    "reverse_kl",
    "rkd_loss",
    "rkd_terms",
    "router_z_loss",
    "run_terms",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sinkhorn_cost",
    "sinkhorn_distance",
    "sinkhorn_plan",
    "soft_cross_entropy",
    "sp_loss",
    "standardize_logits",
    "topk_divergence",
    "tvd",
    "uld_loss",
]
