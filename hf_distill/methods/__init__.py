"""One file per paper."""

from __future__ import annotations

from hf_distill.methods._card import MethodCard, all_cards

METHODS = (
    "tgeo_kd",
    "hard_augment",
    "multi_aspect",
    "miniplm",
    "ddk",
    "preference_kd",
    "trg",
    "ofa_kd",
    "lelp",
    "pld",
    "nd_loss",
    "mix_kd",
    "bdkd",
    "sinkd",
    "swing",
    "teacher_hacking",
    "fidelity",
    "llava_mod",
    "logit_kd",
    "taid",
)


def cards() -> list[MethodCard]:
    """Cards of all methods, ours first, then those of installed packages."""
    return all_cards(METHODS)


__all__ = ["METHODS", "MethodCard", "cards"]
