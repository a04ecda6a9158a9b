"""Random draws from a teacher that keep every expectation unbiased (arXiv 2503.16870, "Sparse Logit Sampling")."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.signals import SampledLogits


def sample_logits(
    log_probs: Tensor, draws: int = 50, alpha: float = 1.0, generator: torch.Generator | None = None
) -> SampledLogits:
    """Draw ids with replacement from p^alpha / Z; repeated ids are merged.

    Args:
        log_probs: (N, V), normalised.
        draws: per row; also the width of the result, whose unused places have weight 0.
        alpha: 1 draws from the teacher itself; smaller ones see more of its tail.
        generator: on the device of `log_probs`.

    Returns:
        SampledLogits (N, draws): E[Σ_j weights_j · f(ids_j)] = Σ_v p_v · f(v).

    Raises:
        ValueError: draws or alpha not positive.
    """
    if draws < 1 or draws > 2**15 - 1:
        raise ValueError(f"draws must lie between 1 and {2**15 - 1}, got {draws}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    ids, counts, drawn, log_z = draw(log_probs, draws, alpha, generator)
    return SampledLogits(
        ids, importance_weights(counts, drawn, log_z, draws, alpha), drawn.masked_fill(counts == 0, -torch.inf)
    )


def draw(
    log_probs: Tensor, draws: int, alpha: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, how often each was drawn (0: unused place), their log-probabilities, all (N, draws), and log Z (N, 1)."""
    tilted = alpha * log_probs
    log_z = tilted.logsumexp(-1, keepdim=True)
    drawn = torch.multinomial((tilted - log_z).exp(), draws, replacement=True, generator=generator).sort(-1).values
    fresh = torch.ones_like(drawn)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = fresh.cumsum(-1) - 1
    ids = torch.zeros_like(drawn).scatter_(-1, place, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(-1, place, torch.ones_like(drawn))
    return ids, counts, log_probs.gather(-1, ids), log_z


def importance_weights(counts: Tensor, log_probs: Tensor, log_z: Tensor | None, draws: int, alpha: float) -> Tensor:
    """count / draws · p / proposal; 0 for unused places. With alpha 1 p is the proposal and log Z is not read."""
    weights = counts / draws
    if alpha == 1.0:
        return weights
    return weights * ((1 - alpha) * log_probs + log_z).exp().where(counts > 0, 0.0)
