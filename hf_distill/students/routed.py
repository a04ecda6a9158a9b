"""Routed feed-forward blocks, and sparse classes of families that transformers has none of.

A routed class is the dense one with blocks in the layers that `config.routing` names. Importing this module registers
them with the Auto classes: whoever loads such a student imports `hf_distill.students` first.
"""

from __future__ import annotations

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.utils.output_capturing import OutputRecorder

from hf_distill.signals import upcast


# ---- pure functions -------------------------------------------------------------------------------------------------
def route_top_k(router_logits: Tensor, top_k: int = 2, capacity_factor: float | None = None) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token and their weights, softmax probabilities renormalised over the chosen.

    With a `capacity_factor` an expert takes at most ⌈tokens · top_k / E · capacity_factor⌉ tokens. Places go in the
    order of the tokens, all first choices before any second choice; a choice without a place has weight 0, and the
    weights are renormalised over the choices that kept one (none left: the block gives 0 for that token).

    Args:
        router_logits: (S, E) of any float dtype.

    Returns:
        indices (S, k) int64, best first, and weights (S, k), float32 (float64 for float64 logits).
    """
    tokens, experts = router_logits.shape
    weights, indices = upcast(router_logits).softmax(-1).topk(top_k, dim=-1)
    if capacity_factor is not None:
        capacity = math.ceil(tokens * top_k / experts * capacity_factor)
        in_turn = F.one_hot(indices.T.flatten(), experts)  # (k * S, E), first choices first
        place = (in_turn.cumsum(0) * in_turn).sum(-1).view(top_k, tokens).T
        weights = weights * (place <= capacity)
    return indices, weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def run_experts(hidden: Tensor, indices: Tensor, weights: Tensor, feed_forward) -> Tensor:
    """Σ_k weights[s, k] · feed_forward(expert indices[s, k], hidden[s]), expert by expert. Returns (S, d)."""
    out = torch.zeros_like(hidden)
    for expert in indices.unique().tolist():
        token, choice = (indices == expert).nonzero(as_tuple=True)
        own = feed_forward(expert, hidden[token]) * weights[token, choice, None]
        out = out.index_add(0, token, own.to(out.dtype))
    return out


def routed_ffn(
    hidden: Tensor, router_weight: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k: int = 2
) -> Tensor:
    """A sparse feed-forward block as a function: silu-gated experts, weights renormalised over the chosen.

    Args:
        hidden: (S, d).
        router_weight: (E, d).
        gate_up_proj: (E, 2 I, d), the gate's rows first. down_proj: (E, d, I).

    Returns:
        (S, d).
    """

    def feed_forward(expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down_proj[expert])

    indices, weights = route_top_k(hidden @ router_weight.T, top_k)
    return run_experts(hidden, indices, weights, feed_forward)


# ---- modules, named as in transformers' own sparse classes ----------------------------------------------------------
class Router(nn.Module):
    """Gives (logits, weights, indices) of each token, computed in float32; choices are dropped in training only."""

    def __init__(self, width: int, num_experts: int, top_k: int, capacity_factor: float | None = None):
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(upcast(hidden), upcast(self.weight))
        indices, weights = route_top_k(logits, self.top_k, self.capacity_factor if self.training else None)
        return logits, weights.to(hidden.dtype), indices


@use_experts_implementation
class GatedExperts(nn.Module):
    """Experts of gate, up and down projections as two 3-D parameters."""

    def __init__(self, config: PretrainedConfig, num_experts: int, width: int, inner: int, activation: nn.Module):
        super().__init__()
        self.num_experts, self.act_fn = num_experts, activation
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def feed_forward(expert: int, x: Tensor) -> Tensor:
            gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            return F.linear(self.act_fn(gate) * up, self.down_proj[expert])

        return run_experts(hidden_states, top_k_index, top_k_weights, feed_forward)


@use_experts_implementation(has_gate=False, has_bias=True)
class PlainExperts(nn.Module):
    """Experts of two projections with biases (vision transformers)."""

    def __init__(self, config: PretrainedConfig, num_experts: int, width: int, inner: int, activation: nn.Module):
        super().__init__()
        self.num_experts, self.act_fn = num_experts, activation
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.zeros(num_experts, inner))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def feed_forward(expert: int, x: Tensor) -> Tensor:
            x = self.act_fn(F.linear(x, self.up_proj[expert], self.up_proj_bias[expert]))
            return F.linear(x, self.down_proj[expert], self.down_proj_bias[expert])

        return run_experts(hidden_states, top_k_index, top_k_weights, feed_forward)


class RoutedFFN(nn.Module):
    """A router and its experts in place of a dense feed-forward block, whose sizes and activation they take."""

    def __init__(self, config: PretrainedConfig, dense: nn.Module):
        super().__init__()
        routing = config.routing
        gated = hasattr(dense, "gate_proj")
        up = dense.up_proj if gated else dense.fc1
        activation = dense.act_fn if gated else dense.activation_fn
        count, width, inner = routing["num_experts"], up.in_features, up.out_features
        self.gate = Router(width, count, routing["top_k"], routing.get("capacity_factor"))
        self.experts = (GatedExperts if gated else PlainExperts)(config, count, width, inner, activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(rows)
        return self.experts(rows, indices, weights).view(hidden_states.shape)


# ---- classes --------------------------------------------------------------------------------------------------------
class Routed:
    """What a routed class adds to its dense one."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the decorator in the class's source file, and keeps the dense class's no

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router | GatedExperts | PlainExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class RoutedBackbone(Routed):
    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for i in config.routing["layers"]:
            self.layers[i].mlp = RoutedFFN(config, self.layers[i].mlp)
        self.post_init()


class RoutedHead(Routed):
    backbone: type

    def __init__(self, config: PretrainedConfig):
        # the dense backbone, which is built first and replaced, refuses any other kernel than eager
        kernel, config._experts_implementation = config._experts_implementation, "eager"
        super().__init__(config)
        config._experts_implementation = kernel or self.get_correct_experts_implementation(None)
        dense = getattr(self, self.base_model_prefix)
        options = {"add_pooling_layer": dense.pooler is not None} if hasattr(dense, "pooler") else {}
        setattr(self, self.base_model_prefix, self.backbone(config, **options))
        self.post_init()


def _config(dense: type) -> type:
    """The family's config with `routing`: layers, num_experts, top_k, capacity_factor."""
    members = {"model_type": f"routed_{dense.model_type}", "routing": None, "__module__": __name__}
    annotations = {"routing": dict | None}
    config = strict(type(f"Routed{dense.__name__}", (dense,), members | {"__annotations__": annotations}))
    AutoConfig.register(config.model_type, config)
    return config


def _backbone(dense: type, config: type) -> type:
    recorded = dense._can_record_outputs | {"router_logits": OutputRecorder(Router, index=0)}
    members = {"_can_record_outputs": recorded, "config_class": config, "__module__": __name__}
    routed = type(f"Routed{dense.__name__}", (RoutedBackbone, dense), members)
    AutoModel.register(config, routed)
    return routed


def _head(dense: type, backbone: type, auto: type) -> type:
    members = {"backbone": backbone, "config_class": backbone.config_class, "__module__": __name__}
    routed = type(f"Routed{dense.__name__}", (RoutedHead, dense), members)
    auto.register(backbone.config_class, routed)
    return routed


RoutedLlamaConfig = _config(LlamaConfig)
RoutedLlamaModel = _backbone(LlamaModel, RoutedLlamaConfig)
RoutedLlamaForCausalLM = _head(LlamaForCausalLM, RoutedLlamaModel, AutoModelForCausalLM)

RoutedMistralConfig = _config(MistralConfig)
RoutedMistralModel = _backbone(MistralModel, RoutedMistralConfig)
RoutedMistralForCausalLM = _head(MistralForCausalLM, RoutedMistralModel, AutoModelForCausalLM)

RoutedQwen2Config = _config(Qwen2Config)
RoutedQwen2Model = _backbone(Qwen2Model, RoutedQwen2Config)
RoutedQwen2ForCausalLM = _head(Qwen2ForCausalLM, RoutedQwen2Model, AutoModelForCausalLM)

RoutedQwen3Config = _config(Qwen3Config)
RoutedQwen3Model = _backbone(Qwen3Model, RoutedQwen3Config)
RoutedQwen3ForCausalLM = _head(Qwen3ForCausalLM, RoutedQwen3Model, AutoModelForCausalLM)

RoutedGemmaConfig = _config(GemmaConfig)
RoutedGemmaModel = _backbone(GemmaModel, RoutedGemmaConfig)
RoutedGemmaForCausalLM = _head(GemmaForCausalLM, RoutedGemmaModel, AutoModelForCausalLM)

RoutedGemma2Config = _config(Gemma2Config)
RoutedGemma2Model = _backbone(Gemma2Model, RoutedGemma2Config)
RoutedGemma2ForCausalLM = _head(Gemma2ForCausalLM, RoutedGemma2Model, AutoModelForCausalLM)

RoutedGemma3TextConfig = _config(Gemma3TextConfig)
RoutedGemma3TextModel = _backbone(Gemma3TextModel, RoutedGemma3TextConfig)
RoutedGemma3ForCausalLM = _head(Gemma3ForCausalLM, RoutedGemma3TextModel, AutoModelForCausalLM)

RoutedViTConfig = _config(ViTConfig)
RoutedViTModel = _backbone(ViTModel, RoutedViTConfig)
RoutedViTForImageClassification = _head(ViTForImageClassification, RoutedViTModel, AutoModelForImageClassification)
