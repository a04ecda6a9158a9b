"""Preference losses on summed log-probabilities of answers; the reference is the teacher."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_distill.signals import upcast

LOSS_TYPES = ("sigmoid", "kto_pair", "sigmoid_norm")


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """How much better than the reference a policy tells good answers from bad ones.

    With a = policy - reference of the chosen answer and b the same of the rejected one:
    "sigmoid" (DPO): mean_i -log σ(β (a_i - b_i)); with label smoothing ε, (1 - ε) of it and ε of the flipped pair.
    "kto_pair" (LLaVA-MoD's script): K⁺ = max(0, mean a), K⁻ = max(0, mean b); the mean over all 2 B answers of
    1 - σ(β (a_i - K⁻)) and 1 - σ(β (K⁺ - b_i)). The K keep their gradient, and each half is held against the other's.
    "sigmoid_norm" (DPKD, arXiv 2406.19774; *reconstruction from memory*, TRL's loss of that name): "sigmoid" of
    a / length and b / length, so that long answers do not decide.
    Equal policies give log 2, and 0.5 for "kto_pair".

    Args:
        policy_chosen_logps, policy_rejected_logps: (B,) log-probabilities summed over each answer's tokens, any float
            dtype; float64 stays float64, else the loss is float32.
        ref_chosen_logps, ref_rejected_logps: (B,) the teacher's, each over its own tokens. No gradient.
        label_smoothing: 0 to below 0.5, how often a pair is believed to be the wrong way round; not for "kto_pair".
        chosen_lengths, rejected_lengths: (B,) tokens of each answer, for "sigmoid_norm".

    Returns:
        The loss, and the detached rewards β a and β b, each (B,).

    Raises:
        ValueError: an unknown loss, a setting out of range, tensors of other shapes than (B,), B at least 1.

    Example:
        >>> answers = torch.tensor([-3.0, -5.0])
        >>> loss, rewards = preference_loss(answers, answers - 1, answers, answers, beta=1.0, loss_type="kto_pair")
        >>> round(loss.item(), 4), rewards["rewards_rejected"].tolist()
        (0.3845, [-1.0, -1.0])
    """
    logps = (policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    _check(logps, beta, loss_type, label_smoothing)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = map(upcast, logps)
    chosen, rejected = policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()
    rewards = {"rewards_chosen": (beta * chosen).detach(), "rewards_rejected": (beta * rejected).detach()}
    if loss_type == "kto_pair":
        kl_chosen, kl_rejected = chosen.mean().clamp(min=0), rejected.mean().clamp(min=0)
        gains = torch.cat([beta * (chosen - kl_rejected), beta * (kl_chosen - rejected)])
        return (1 - gains.sigmoid()).mean(), rewards
    if loss_type == "sigmoid_norm":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("sigmoid_norm divides by the answers' lengths: give chosen_lengths and rejected_lengths")
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss.mean(), rewards


def _check(logps: tuple[Tensor, ...], beta: float, loss_type: str, label_smoothing: float) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be 0 or more and below 0.5, got {label_smoothing}")
    if label_smoothing and loss_type == "kto_pair":
        raise ValueError("kto_pair takes no label_smoothing: set it to 0, or use sigmoid")
    shapes = [tuple(x.shape) for x in logps]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"log-probabilities must be four tensors of one shape (B,), B at least 1, got {shapes}")
