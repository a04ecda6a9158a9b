"""Sparse students: the feed-forward blocks of a dense model become routed experts (sparse upcycling).

    student = upcycle_to_moe(dense, layers="alternate", num_experts=4, top_k=2)

Every expert starts as a copy of the trained block and the chosen experts' weights sum to 1, so the sparse model begins
as the same function. Training pulls the experts apart, since each meets other tokens; a `BalanceLoss` keeps all in use.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass, field

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from hf_distill.students import routed
from hf_distill.students.routers import routed_blocks

MODES = ("alternate", "sparse", "first_half", "second_half", "all")
# families for which transformers has a sparse class that can hold the dense one's function, by their text config
TWINS = {
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3_vl_text": "qwen3_vl_moe_text",
    "llama": "mixtral",
    "mistral": "mixtral",
}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral", "qwen3_vl": "Qwen3VL"}
SPARSE_CLASSES = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "qwen3_vl_moe": "Qwen3VLMoe"}
SPARSE_HINTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "routing")


@dataclass
class UpcycleConfig:
    """Settings of `upcycle_to_moe`, each checked when made. Defaults are LLaVA-MoD's (2408.15881) where it has any."""

    layers: str = field(
        default="alternate",
        metadata={"help": f"Which layers become sparse: {', '.join(MODES)}, or layer numbers such as 0,2,4."},
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per sparse layer, copies of the dense block."})
    top_k: int = field(default=2, metadata={"help": "Experts that each token goes to."})
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the routers' first weights."})
    seed: int = field(default=0, metadata={"help": "Of the routers' first weights."})
    native_only: bool = field(
        default=False, metadata={"help": "Refuse families and layers that need a class registered by hf_distill."}
    )
    capacity_factor: float | None = field(
        default=None, metadata={"help": "In training, drop choices of an expert beyond this times its even share."}
    )

    def __post_init__(self):
        if isinstance(self.layers, str) and self.layers not in MODES:
            if not re.fullmatch(r"\d+(,\s*\d+)*", self.layers):
                raise ValueError(f"layers={self.layers!r}: expected {', '.join(MODES)}, or layer numbers such as 0,2,4")
            self.layers = [int(i) for i in self.layers.split(",")]
        if self.num_experts < 2:
            raise ValueError(f"num_experts={self.num_experts}: a sparse layer needs at least 2 experts")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} active experts of num_experts={self.num_experts}: choose 1 to {self.num_experts}"
            )
        if not self.router_std > 0:
            raise ValueError(
                f"router_std={self.router_std}: a router of zeros ties all experts, so that every token goes to the "
                f"same {self.top_k} and the others never learn; give a positive value such as 0.02"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor={self.capacity_factor}: give a positive value, or None to drop nothing")


def upcycle_to_moe(
    model: PreTrainedModel,
    layers: str | list[int] = "alternate",
    num_experts: int = 4,
    top_k: int = 2,
    router_std: float = 0.02,
    seed: int = 0,
    native_only: bool = False,
    capacity_factor: float | None = None,
) -> PreTrainedModel:
    """A sparse copy of a dense model with the same outputs, in eval mode; `model` is not changed.

    Where transformers has a sparse class of the family the student is of that class and needs nothing of ours to load:
    Qwen2, Qwen3, Qwen3-VL, and Llama and Mistral with all layers sparse (Mixtral). Vision-language models around such a
    text model keep their class. Other families and layers (Llama with some layers, Gemma, ViT) get a class of
    `students.routed`, which is registered by `import hf_distill.students`.
    The config's `router_aux_loss_coef` is 0: balance is what the training objective asks for (`BalanceLoss`).

    Args:
        model: loaded unquantised, without adapters and without offloading. VLMs become sparse in their text model.
        layers: "alternate" (alias "sparse": 0, 2, 4, ...), "first_half", "second_half", "all", or layer numbers.
        num_experts: experts per sparse layer; the other settings as in UpcycleConfig.

    Raises:
        ValueError: a quantised, wrapped or already sparse model, settings that cannot work, a family or block that
            cannot be routed, `native_only` where transformers has no class for it, outputs that changed.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> dense = Qwen3ForCausalLM(Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=4))
        >>> type(upcycle_to_moe(dense)).__name__
        'Qwen3MoeForCausalLM'
    """
    settings = UpcycleConfig(layers, num_experts, top_k, router_std, seed, native_only, capacity_factor)
    chosen, config, kind = plan_upcycle(model, settings)
    with init_empty_weights(include_buffers=False):
        sparse = kind(config)
    blocks = routed_blocks(sparse)
    if len(blocks) != len(chosen):
        raise _unsupported(model, f"{kind.__name__} would have {len(blocks)} sparse layers, not {len(chosen)}")
    _copy_weights(model, sparse, list(blocks), settings)
    _copy_buffers(model, sparse)
    if getattr(model, "generation_config", None) is not None:
        sparse.generation_config = copy.deepcopy(model.generation_config)
    _check_same_function(model, sparse)
    return sparse.eval()


def plan_upcycle(model: PreTrainedModel, settings: UpcycleConfig) -> tuple[list[int], PretrainedConfig, type]:
    """The layers that become sparse, and the sparse model's config and class; no weight is read or copied.

    Raises:
        ValueError: as `upcycle_to_moe`, all but what only its weights can show.
    """
    _check_dense(model)
    chosen = moe_layers(settings.layers, _layer_count(model))
    return chosen, *_sparse_config(model, chosen, settings)


def moe_layers(layers: str | list[int], count: int) -> list[int]:
    """The layer numbers that a mode means for `count` layers.

    Example:
        >>> moe_layers("alternate", 5), moe_layers("second_half", 5)
        ([0, 2, 4], [2, 3, 4])
    """
    if isinstance(layers, str):
        ranges = {"first_half": range(count // 2), "second_half": range(count // 2, count), "all": range(count)}
        chosen = list(ranges.get(layers, range(0, count, 2)))
    else:
        chosen = list(layers)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen) or chosen != sorted(set(chosen)):
            raise ValueError(f"layers={layers}: give different layer numbers in ascending order")
        outside = [i for i in chosen if not 0 <= i < count]
        if outside:
            raise ValueError(f"layers={layers}: {outside} out of range, the model has layers 0 to {count - 1}")
    if not chosen:
        raise ValueError(f"layers={layers!r} of {count} names no layer: choose at least one")
    return chosen


# ---- what can be made sparse ----------------------------------------------------------------------------------------
def _check_dense(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"upcycle_to_moe takes transformers models, got {type(model).__name__}; give merge_and_unload() of a PEFT "
            "model, and the model itself instead of a wrapper"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter: merge it into the weights before upcycling")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ValueError(
            "the model is quantised, and packed weights cannot be copied into experts; load it without "
            "quantization_config, upcycle it, and quantise the teacher instead"
        )
    text = model.config.get_text_config()
    if routed_blocks(model) or any(getattr(text, name, None) for name in SPARSE_HINTS):
        raise ValueError(f"{_family(model)} is sparse already: upcycle its dense version")
    offloaded = [name for name, value in model.named_parameters() if value.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]} has no data (meta device); load the model without offloading")


def _layer_count(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    if text.is_encoder_decoder or not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise _unsupported(model, "it is not one stack of layers")
    return text.num_hidden_layers


def _sparse_config(model: PreTrainedModel, chosen: list[int], settings: UpcycleConfig) -> tuple[PretrainedConfig, type]:
    """The sparse model's config and class."""
    dense = model.config
    text = dense.get_text_config()
    why_not = _why_not_native(text, chosen, settings)
    if why_not and settings.native_only:
        raise ValueError(f"native_only: {_family(model)} has no sparse class in transformers, {why_not}")
    sparse_text = _routed_text(model, chosen, settings) if why_not else _native_text(text, chosen, settings)
    sparse_text._attn_implementation = text._attn_implementation
    if model.dtype == torch.float64:
        sparse_text._experts_implementation = "eager"  # grouped_mm has no float64
    if text is dense:
        config = sparse_text
    elif dense.model_type == "qwen3_vl":
        config = _qwen3_vl_moe(dense, sparse_text)
    else:
        config = copy.deepcopy(dense)
        config.text_config = sparse_text
    config.name_or_path = ""
    return config, _sparse_class(model, config)


def _why_not_native(text: PretrainedConfig, chosen: list[int], settings: UpcycleConfig) -> str | None:
    twin = TWINS.get(text.model_type)
    if twin is None:
        return f"which knows {', '.join(TWINS)}"
    if settings.capacity_factor is not None:
        return "which never drops tokens: leave capacity_factor None"
    if twin == "mixtral" and len(chosen) < text.num_hidden_layers:
        return 'where Mixtral is sparse in every layer: choose layers="all"'
    if twin == "mixtral" and getattr(text, "attention_bias", False):
        return "where Mixtral's attention has no biases"
    if twin == "qwen3_moe" and "sliding_attention" in (text.layer_types or ()):
        return "where Qwen3Moe has one window for all layers"
    return None


def _native_text(text: PretrainedConfig, chosen: list[int], settings: UpcycleConfig) -> PretrainedConfig:
    kind = CONFIG_MAPPING[TWINS[text.model_type]]
    values = text.to_dict() | {
        "num_experts": settings.num_experts,
        "num_local_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
        "moe_intermediate_size": text.intermediate_size,
        "shared_expert_intermediate_size": 1,  # Qwen2Moe's, of zeros: it never gets a gradient; FSDP fails on width 0
        "norm_topk_prob": True,
        "mlp_only_layers": [i for i in range(text.num_hidden_layers) if i not in chosen],
        "decoder_sparse_step": 1,
        "qkv_bias": True,  # Qwen2 always has them
        "router_aux_loss_coef": 0.0,
    }
    known = {f.name for f in dataclasses.fields(kind)} - {"architectures", "transformers_version"}
    known |= {"head_dim"}  # read by every attention, a field of few configs
    return kind(**{name: value for name, value in values.items() if name in known})


def _routed_text(model: PreTrainedModel, chosen: list[int], settings: UpcycleConfig) -> PretrainedConfig:
    text = model.config.get_text_config()
    kind = getattr(routed, f"Routed{type(text).__name__}", None)
    if kind is None:
        why = _why_not_native(text, chosen, settings)
        raise _unsupported(
            model, f"hf_distill.students.routed has no class of this family, nor has transformers, {why}"
        )
    routing = {"layers": chosen, "num_experts": settings.num_experts, "top_k": settings.top_k}
    if settings.capacity_factor is not None:
        routing["capacity_factor"] = settings.capacity_factor
    values = text.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        values.pop(name, None)
    return kind(**values, routing=routing)


def _qwen3_vl_moe(dense: PretrainedConfig, text: PretrainedConfig) -> PretrainedConfig:
    kind = CONFIG_MAPPING["qwen3_vl_moe"]
    known = {f.name for f in dataclasses.fields(kind)} - {"architectures", "transformers_version"}
    values = {name: value for name, value in dense.to_dict().items() if name in known}
    vision = values["vision_config"] | {"model_type": "qwen3_vl_moe_vision"}
    return kind(**values | {"text_config": text.to_dict(), "vision_config": vision})


def _sparse_class(model: PreTrainedModel, config: PretrainedConfig) -> type:
    """The class of the sparse model: its dense one's where only the text config changed."""
    name, family = type(model).__name__, model.config.model_type
    if config.model_type == family:
        return type(model)
    if config.model_type in SPARSE_CLASSES:
        home, wanted = transformers, name.replace(CLASSES[family], SPARSE_CLASSES[config.model_type], 1)
    else:
        home, wanted = routed, f"Routed{name}"
    kind = getattr(home, wanted, None)
    if kind is None:
        raise _unsupported(model, f"there is no {wanted} in {home.__name__}")
    return kind


# ---- weights --------------------------------------------------------------------------------------------------------
def _copy_weights(dense: nn.Module, sparse: nn.Module, blocks: list[str], settings: UpcycleConfig) -> None:
    """Fill the empty `sparse` in place; what `dense` ties or freezes is tied and frozen."""
    source = dict(dense.named_parameters(remove_duplicate=False))
    draw = torch.Generator().manual_seed(settings.seed)
    copies: dict[int, nn.Parameter] = {}
    for name, empty in list(sparse.named_parameters(remove_duplicate=False)):
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        if block is not None:
            ffn = dense.get_submodule(block)
            value = _block_tensor(ffn, name.removeprefix(block + "."), empty.shape, draw, settings.router_std)
            parameter = nn.Parameter(value, requires_grad=next(ffn.parameters()).requires_grad)
        else:
            original = source.get(name)
            if original is None or original.shape != empty.shape:
                found = "nothing" if original is None else f"shape {tuple(original.shape)}"
                raise _unsupported(dense, f"{name} {tuple(empty.shape)} needs the same of the dense model, got {found}")
            if id(original) not in copies:
                copies[id(original)] = nn.Parameter(original.detach().clone(), original.requires_grad)
            parameter = copies[id(original)]
        path, _, leaf = name.rpartition(".")
        setattr(sparse.get_submodule(path), leaf, parameter)


def _copy_buffers(dense: nn.Module, sparse: nn.Module) -> None:
    """Buffers that are not saved come from the config when the student is loaded, so it must give the same ones."""
    source, own = dict(dense.named_buffers()), dict(sparse.named_buffers())
    saved = sparse.state_dict().keys()
    for name, buffer in own.items():
        path, _, leaf = name.rpartition(".")
        original = source.get(name, buffer)
        changes = f"{path}.original_{leaf}" in own  # in the forward, for long inputs
        made = buffer.to(original.device, torch.float32)
        if name not in saved and not changes and not torch.allclose(made, original.float(), rtol=1e-2):
            raise _unsupported(dense, f"as {type(sparse).__name__} its {name} would be another one")
        setattr(sparse.get_submodule(path), leaf, original.detach().clone())


def _block_tensor(ffn: nn.Module, name: str, shape: torch.Size, draw: torch.Generator, std: float) -> Tensor:
    """What the tensor `name` of a routed block starts as."""
    pieces = {
        "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
        "up_proj": ("fc1.weight",),
        "up_proj_bias": ("fc1.bias",),
        "down_proj": ("down_proj.weight",) if hasattr(ffn, "down_proj") else ("fc2.weight",),
        "down_proj_bias": ("fc2.bias",),
    }
    weights = dict(ffn.named_parameters())
    like = next(iter(weights.values()))
    if name == "gate.weight":
        return (torch.randn(shape, generator=draw) * std).to(like)
    if name.startswith("shared_expert"):
        return torch.zeros(shape).to(like)
    parts = pieces[name.removeprefix("experts.")]
    unknown = weights.keys() - {part for names in pieces.values() for part in names}
    if unknown or not all(part in weights for part in parts):
        raise ValueError(
            f"the experts have no place for {', '.join(sorted(unknown)) or 'this block'}: feed-forward blocks that can "
            f"be routed are gate_proj, up_proj, down_proj without biases, or fc1, fc2; got {type(ffn).__name__}"
        )
    value = torch.cat([weights[part].detach() for part in parts])
    return value.expand(shape).clone()


@torch.no_grad()
def _check_same_function(dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Raises ValueError where a probe's outputs differ: the families' configs mean different things."""
    inputs = _probe(dense)
    modes = {module: module.training for module in dense.modules()}
    dense.eval()
    try:
        before = dense(**inputs)[0].float()
    finally:
        for module, mode in modes.items():
            module.training = mode
    after = sparse.eval()(**inputs)[0].float()
    difference = (after - before).abs().max() / before.abs().max().clamp(min=1e-6)
    if not difference <= (1e-4 if dense.dtype in (torch.float32, torch.float64) else 3e-2):
        raise _unsupported(
            dense, f"as {type(sparse).__name__} its outputs differ by {difference.item():.2%} before any training"
        )


def _probe(model: PreTrainedModel) -> dict[str, Tensor]:
    device, config = next(model.parameters()).device, model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        draw = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(1, config.num_channels, *size, generator=draw).to(device, model.dtype)}
    special = {v for k, v in vars(config).items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = [i for i in (j * 7919 % vocabulary for j in range(24)) if i not in special][:12]
    return {"input_ids": torch.tensor([ids], device=device), "use_cache": False}


def _family(model: PreTrainedModel) -> str:
    return f"{model.config.get_text_config().model_type} ({type(model).__name__})"


def _unsupported(model: PreTrainedModel, why: str) -> ValueError:
    return ValueError(f"cannot make {_family(model)} sparse: {why}")
