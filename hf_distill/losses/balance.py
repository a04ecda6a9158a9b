"""Losses on router logits: balanced experts in both published forms, and small logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_distill.signals import upcast

FORMS = ("gshard", "hf")


def balance_loss(
    router_logits: Sequence[Tensor], top_k: int = 2, form: str = "gshard", attention_mask: Tensor | None = None
) -> Tensor:
    """How unevenly tokens are spread over experts; the gradient reaches the router through its mean probabilities.

    With m_e the mean probability of expert e over the tokens:
    "gshard": Σ_layers E · Σ_e m_e · c_e, c_e the share of tokens whose first choice is e. Balanced: 1 per layer.
    "hf", as transformers' `load_balancing_loss_func`: E · Σ_e m_e · f_e once, over the tokens of all layers together,
    f_e assignments to e (all k choices) / tokens. Balanced: `top_k`, for any number of layers.
    So a coefficient c of "gshard" is about c · layers / top_k of "hf".

    Args:
        router_logits: per sparse layer (tokens, E), any float dtype; float64 stays float64, else the loss is float32.
        top_k: experts per token.
        attention_mask: (B, S) or (tokens,), 0 where there is padding; None counts every token. All zeros give 0.

    Raises:
        ValueError: no layers, an unknown form, more choices than experts, a mask of another length.

    Example:
        >>> balance_loss([torch.tensor([[9.0, 0.0], [0.0, 9.0]])], top_k=1).item()
        1.0
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    mask = _token_mask(router_logits, attention_mask)
    layers = [upcast(logits).softmax(-1) for logits in router_logits]
    experts = layers[0].shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} choices of {experts} experts: choose 1 to {experts}")
    if form == "gshard":
        return sum(_product_of_means(p, p.argmax(-1, keepdim=True), mask) for p in layers)
    probabilities = torch.cat([p.to(layers[0].device) for p in layers])
    return _product_of_means(probabilities, probabilities.topk(top_k, -1).indices, mask.repeat(len(layers)))


def router_z_loss(router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Σ_layers mean over tokens of (log Σ_e exp logit_e)², which keeps router logits small (ST-MoE, arXiv 2202.08906).

    Arguments as `balance_loss`.

    Example:
        >>> round(router_z_loss([torch.zeros(5, 2)]).item(), 4)  # (log 2)²
        0.4805
    """
    mask = _token_mask(router_logits, attention_mask)
    total = 0.0
    for logits in router_logits:
        z = upcast(logits).logsumexp(-1)
        own = mask.to(z)
        total = total + (z.square() * own).sum() / own.sum().clamp(min=1)
    return total


def _product_of_means(probabilities: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """E · Σ_e (mean probability of e) · (how often e was chosen / tokens)."""
    own = mask.to(probabilities)
    tokens = own.sum().clamp(min=1)
    mean = (probabilities * own[:, None]).sum(0) / tokens
    weights = own[:, None].expand(chosen.shape)
    counts = torch.zeros_like(mean).scatter_add_(0, chosen.flatten(), weights.flatten())
    return probabilities.shape[-1] * (mean * (counts / tokens).detach()).sum()


def _token_mask(router_logits: Sequence[Tensor], attention_mask: Tensor | None) -> Tensor:
    if len(router_logits) == 0:
        raise ValueError("router_logits holds no layers: the model has no sparse layer, or its outputs were not asked")
    tokens = router_logits[0].shape[0]
    if attention_mask is None:
        return torch.ones(tokens, device=router_logits[0].device)
    if attention_mask.numel() != tokens:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} has {attention_mask.numel()} entries, the routers saw "
            f"{tokens} tokens"
        )
    return attention_mask.flatten()
