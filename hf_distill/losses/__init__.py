"""Losses on logits: divergences of two models' rows, their engines, sparse teachers and foreign tokenizers."""

from hf_distill.losses.cross_tokenizer import align_bytes, uld_loss
from hf_distill.losses.divergences import (
    DIVERGENCES,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    ForwardKL,
    GeneralizedJSD,
    Interpolated,
    Jeffreys,
    LabelCrossEntropy,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    Symmetric,
)
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
from hf_distill.losses.metrics import Agreement, StudentEntropy, TeacherEntropy
from hf_distill.losses.sparse import topk_divergence
from hf_distill.losses.tile import Divergence, Tile
from hf_distill.signals import HeadLogits, MixtureLogits, SampledLogits, SparseLogits

__all__ = [
    "DIVERGENCES",
    "TVD",
    "AdaptiveKL",
    "Agreement",
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
    "adaptive_kl",
    "align_bytes",
    "alpha_beta",
    "forward_kl",
    "generalized_jsd",
    "jeffreys",
    "observe",
    "one_term",
    "reverse_kl",
    "run_terms",
    "skew_forward_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "topk_divergence",
    "tvd",
    "uld_loss",
]
