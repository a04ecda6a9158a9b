"""Students as functions, model -> model. Importing this registers the classes that transformers has not."""

from hf_distill.students.from_teacher import from_teacher
from hf_distill.students.heads import SubclassHead, with_subclasses
from hf_distill.students.moe import UpcycleConfig, upcycle_to_moe
from hf_distill.students.routed import route_top_k, routed_ffn
from hf_distill.students.routers import (
    BalanceLoss,
    activated_parameters,
    attach_router_outputs,
    check_lora_reaches_experts,
    routed_blocks,
)
from hf_distill.students.vlm import build_vlm

__all__ = [
    "BalanceLoss",
    "SubclassHead",
    "UpcycleConfig",
    "activated_parameters",
    "attach_router_outputs",
    "build_vlm",
    "check_lora_reaches_experts",
    "from_teacher",
    "route_top_k",
    "routed_blocks",
    "routed_ffn",
    "upcycle_to_moe",
    "with_subclasses",
]
