"""The routers of a sparse student: where they are, what they say, what of them trains, and keeping experts in use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_distill.heads import base_model_of
from hf_distill.losses.balance import FORMS, balance_loss, router_z_loss
from hf_distill.objectives import Objective
from hf_distill.signals import Signals

ATTACHED = "_router_outputs_attached"


class Block(NamedTuple):
    """A sparse block: its router's module and its experts', below any adapter, and how many a token goes to."""

    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int


class ParameterCount(NamedTuple):
    total: int
    activated: int


def routed_blocks(model: nn.Module) -> dict[str, Block]:
    """The sparse blocks of a model by path, those of transformers' classes and of `students.routed` (PEFT allowed)."""
    found = {}
    for name, module in base_model_of(model).named_modules():
        router, experts = (_unwrapped(getattr(module, part, None)) for part in ("gate", "experts"))
        weights = [] if experts is None else [p for p in experts.parameters(recurse=False) if p.dim() == 3]
        if weights and hasattr(router, "top_k"):
            found[name] = Block(router, experts, weights[0].shape[0], router.top_k)
    return found


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module


def activated_parameters(model: nn.Module) -> ParameterCount:
    """Parameters in all, and those that one token uses: without E - k of the E experts of each sparse layer.

    Counted on the real model: tied parameters once, adapters included.
    """
    total = sum(p.numel() for p in model.parameters())
    base, idle = base_model_of(model), 0
    for name, block in routed_blocks(model).items():
        size = sum(p.numel() for p in base.get_submodule(name).experts.parameters())
        idle += size * (block.num_experts - block.top_k) // block.num_experts
    return ParameterCount(total, total - idle)


def check_lora_reaches_experts(model: nn.Module, peft_config) -> None:
    """A PEFT config must train the routers and experts of a sparse student.

    `target_modules`, "all-linear" included, names Linear modules; experts and routers are bare parameters, which it
    passes over in silence.

    Raises:
        ValueError: some would stay frozen; the message has the `target_parameters` to add.
    """
    targets = list(getattr(peft_config, "target_parameters", None) or ())
    saved = list(getattr(peft_config, "modules_to_save", None) or ())
    names = [
        f"{name}.{part}.{leaf}".removeprefix(".")
        for name, block in routed_blocks(model).items()
        for part, module in (("experts", block.experts), ("gate", block.router))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 or part == "gate"
    ]
    frozen = [
        name
        for name in names
        if not any(name == target or name.endswith("." + target) for target in targets)
        and not any(part in saved for part in name.split("."))
    ]
    if frozen:
        needed = list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in names))
        raise ValueError(
            f"{type(peft_config).__name__} would leave {len(frozen)} of {len(names)} expert and router parameters "
            f"frozen ({frozen[0]}, ...): target_modules does not reach them. Add target_parameters={needed} "
            "(with lora_dropout=0)"
        )


# ---- router outputs -------------------------------------------------------------------------------------------------
def attach_router_outputs(model: nn.Module) -> None:
    """Let every model around the routed layers give the `router_logits` that they record.

    Vision-language models and classifiers drop them from their outputs. Asked with `output_router_logits=True`, the
    backbone's output and the whole model's have them after this, each a tuple of (tokens, E), one per sparse layer.
    Once is enough; nothing of it is saved. It reads the outputs of the routed stack and not of each router, which would
    run again when gradient checkpointing recomputes a layer.

    Raises:
        ValueError: a model without routers; reentrant gradient checkpointing, under which router logits have no
            gradient (also raised in training, where it was switched on later).
    """
    base = base_model_of(model)
    blocks = routed_blocks(base)
    if not blocks:
        raise ValueError(
            f"{type(base).__name__} has no routed layers, so there is no router to balance: see upcycle_to_moe"
        )
    first = next(iter(blocks))
    around = [m for name, m in base.named_modules() if isinstance(m, PreTrainedModel) and _holds(name, first)]
    *outer, stack = around  # outermost first
    if any(_is_reentrant(module) for module in around):
        raise _reentrant(stack)
    if getattr(stack, ATTACHED, False):
        return
    setattr(stack, ATTACHED, True)
    kept = _Kept()
    stack.register_forward_hook(kept.take)
    for module in outer:
        module.register_forward_pre_hook(kept.enter)
        module.register_forward_hook(kept.put, always_call=True)


class _Kept:
    """Router logits on their way from the stack to the models around it, let go when the outermost has ended."""

    def __init__(self):
        self.logits: tuple[Tensor, ...] | None = None
        self.depth = 0

    def take(self, stack: nn.Module, args, output) -> None:
        logits = getattr(output, "router_logits", None) or None
        if logits is not None and stack.training and torch.is_grad_enabled() and not logits[0].requires_grad:
            if any(_is_reentrant(module) for module in stack.modules()):
                raise _reentrant(stack)
        self.logits = logits if self.depth else None

    def enter(self, module: nn.Module, args) -> None:
        self.depth += 1

    def put(self, module: nn.Module, args, output) -> None:
        self.depth -= 1
        if isinstance(output, ModelOutput) and self.logits is not None:
            # an attribute: DDP makes outputs again from their entries, and these classes have no such field
            output.router_logits = getattr(output, "router_logits", None) or self.logits
        if not self.depth:
            self.logits = None


def _holds(path: str, inner: str) -> bool:
    return not path or inner.startswith(path + ".")


def _is_reentrant(module: nn.Module) -> bool:
    if not getattr(module, "gradient_checkpointing", False):
        return False
    options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(options.get("use_reentrant", False))


def _reentrant(stack: nn.Module) -> ValueError:
    return ValueError(
        f"reentrant gradient checkpointing runs {type(stack).__name__}'s layers without a graph, so a balance loss "
        'would have no gradient: set gradient_checkpointing_kwargs={"use_reentrant": False}'
    )


# ---- objective ------------------------------------------------------------------------------------------------------
class BalanceLoss(Objective):
    """Keeps the experts of a sparse student in use; to be added to what it learns: `LogitKD() + 0.01 * BalanceLoss()`.

    A mean over micro-batches of `losses.balance_loss` over their attended tokens. For "gshard" it is 1 per sparse layer
    when balanced; transformers' own "hf" is top_k in all, so 0.01 of one is not 0.01 of the other.

    Args:
        form: "gshard" (LLaVA-MoD's) or "hf".
        z_weight: of `losses.router_z_loss`, beside it.

    Raises:
        ValueError: at the start of training, for a student without routers or under reentrant checkpointing.
    """

    needs = frozenset({"student.router_logits"})
    per = "batch"
    couples_batch = "the share of tokens that goes to each expert is taken over one micro-batch"
    uses_teacher = False

    def __init__(self, form: str = "gshard", z_weight: float = 0.0):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if not z_weight >= 0:
            raise ValueError(f"z_weight must not be negative, got {z_weight}")
        self.form, self.z_weight = form, z_weight

    def setup(self, student: nn.Module, teacher) -> None:
        attach_router_outputs(student)
        self.top_k = next(iter(routed_blocks(student).values())).top_k

    def other_terms(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, Tensor]:
        logits, mask = student.features["router_logits"], student.batch.get("attention_mask")
        terms = {"balance": balance_loss(logits, self.top_k, self.form, mask)}
        if self.z_weight:
            terms["router_z"] = router_z_loss(logits, mask)
        return terms

    def weights(self, progress: float) -> dict[str, float]:
        return {"router_z": self.z_weight}
