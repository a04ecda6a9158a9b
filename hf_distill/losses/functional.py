"""The divergences as functions of two sets of logits.

All take

    student_logits: (..., V) tensor of any float dtype, or HeadLogits. float64 stays float64, else the sum is float32.
    teacher_logits: (..., V) tensor, HeadLogits or SparseLogits, no gradient; vocabularies are cut to the common part.
    mask: (...), 1 counts and 0 does not. None counts all. All zeros gives 0, not nan.
    temperature: divides both logits (a sparse teacher's were divided when they were stored). Default 1.0.
    reduction: "mean" over counted rows (default), "sum", or "none", which gives (...) (tensors only).

and raise ValueError for an argument outside its range or reduction "none" with HeadLogits.
"""

from __future__ import annotations

import torch

from hf_distill.losses import divergences as family
from hf_distill.losses.fused import one_term


def forward_kl(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", cross_entropy_form=False
) -> torch.Tensor:
    """Forward KL, Σ p · [log p - log q]; see ForwardKL.

    Args:
        cross_entropy_form: drop Σ p · log p, as DistiLLM and TAID do: the same gradient, another value.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> [round(forward_kl(z, z.flip(-1), cross_entropy_form=form).item(), 4) for form in (False, True)]
        [1.5232, 1.8885]
    """
    divergence = (family.SoftCrossEntropy if cross_entropy_form else family.ForwardKL)(temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def soft_cross_entropy(student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean") -> torch.Tensor:
    """Cross-entropy with the teacher's distribution, -Σ p · log q; see SoftCrossEntropy.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(soft_cross_entropy(z, z.flip(-1)).item(), 4)
        1.8885
    """
    divergence = family.SoftCrossEntropy(temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def reverse_kl(student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean") -> torch.Tensor:
    """Reverse KL, Σ q · [log q - log p]; see ReverseKL.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(reverse_kl(z, z.flip(-1)).item(), 4)
        1.5232
    """
    return one_term(student_logits, teacher_logits, family.ReverseKL(temperature), mask=mask, reduction=reduction)


def jeffreys(student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean") -> torch.Tensor:
    """Mean of forward and reverse KL; see Jeffreys.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(jeffreys(z, z.flip(-1)).item(), 4)
        1.5232
    """
    return one_term(student_logits, teacher_logits, family.Jeffreys(temperature), mask=mask, reduction=reduction)


def generalized_jsd(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", beta=0.5
) -> torch.Tensor:
    """beta · KL(p‖m) + (1 - beta) · KL(q‖m), m = beta · p + (1 - beta) · q; see GeneralizedJSD.

    Args:
        beta: share of the teacher in the mixture; 0 is forward KL, 1 reverse KL. Default 0.5 (GKD, arXiv 2306.13649).

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(generalized_jsd(z, z.flip(-1)).item(), 4)
        0.3278
    """
    divergence = family.GeneralizedJSD(beta, temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def skew_forward_kl(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", lam=0.1
) -> torch.Tensor:
    """KL(p ‖ lam · p + (1 - lam) · q); see SkewForwardKL.

    Args:
        lam: share of p in the mixture; 0 is forward KL. Default 0.1 (DistiLLM, arXiv 2402.03898).

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(skew_forward_kl(z, z.flip(-1)).item(), 4)
        1.0988
    """
    divergence = family.SkewForwardKL(lam, temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def skew_reverse_kl(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", lam=0.1
) -> torch.Tensor:
    """KL(q ‖ (1 - lam) · p + lam · q); see SkewReverseKL.

    Args:
        lam: share of q in the mixture; 0 is reverse KL. Default 0.1 (DistiLLM, arXiv 2402.03898).

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(skew_reverse_kl(z, z.flip(-1)).item(), 4)
        1.0988
    """
    divergence = family.SkewReverseKL(lam, temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def tvd(student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean") -> torch.Tensor:
    """Total variation distance, ½ Σ |p - q|; see TVD.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(tvd(z, z.flip(-1)).item(), 4)
        0.7616
    """
    return one_term(student_logits, teacher_logits, family.TVD(temperature), mask=mask, reduction=reduction)


def adaptive_kl(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", mu=0.5
) -> torch.Tensor:
    """Forward and reverse KL, weighted per row by where the distributions differ; see AdaptiveKL.

    Args:
        mu: teacher probability that makes the head. Default 0.5 (arXiv 2404.02657).

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(adaptive_kl(z, z.flip(-1)).item(), 4)
        1.5232
    """
    divergence = family.AdaptiveKL(mu, temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)


def alpha_beta(
    student_logits, teacher_logits, *, mask=None, temperature=1.0, reduction="mean", alpha=0.5, beta=0.5
) -> torch.Tensor:
    """The α-β-divergence and its limits; see AlphaBeta.

    Args:
        alpha, beta: exponents. Default 0.5 each, as in the scripts of ABKD (arXiv 2505.04560); tuned values there are
            alpha 0.2 to 0.6 and beta 0.4 to 0.7.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> round(alpha_beta(z, z.flip(-1)).item(), 4)
        1.4078
    """
    divergence = family.AlphaBeta(alpha, beta, temperature)
    return one_term(student_logits, teacher_logits, divergence, mask=mask, reduction=reduction)
