"""What the routers of a sparse student do during training: in the log, in a file, and as a picture at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from functools import partial

import torch
from torch import Tensor, nn

from hf_distill.students.routers import routed_blocks
from hf_distill.training.callbacks import DistillCallback

logger = logging.getLogger(__name__)

DETAILS = ("summary", "layer", "expert")
FILE, PICTURE = "expert_load.jsonl", "expert_load.png"


class RouterTelemetryCallback(DistillCallback):
    """Logs how the tokens of training are spread over the experts since the last log; padding is left out.

    Loads are shares of the choices that kept a place, per layer summing to 1. Logged are `expert_load/max` and
    `expert_load/min` over all experts of all layers, `router_entropy` (mean over tokens and layers; 1 is undecided, 0
    certain) and, where the student drops tokens over capacity, `dropped`, the share of choices without a place.
    Every log also adds a line with all loads to `expert_load.jsonl` in the output folder, from which `expert_load.png`
    is drawn at the end (with matplotlib). After a resume both go on; the first log then counts only the steps since.
    Works in any transformers Trainer; nothing of it is saved with the model.

    Args:
        detail: "summary"; "layer" adds `expert_load/<layer>` (the largest in it) and `router_entropy/<layer>`; "expert"
            adds `expert_load/<layer>/<expert>`.

    Raises:
        ValueError: an unknown detail; at the start of training, a model without routers.
    """

    def __init__(self, detail: str = "summary"):
        if detail not in DETAILS:
            raise ValueError(f"detail must be one of {', '.join(DETAILS)}, got {detail!r}")
        self.detail = detail
        self._sums: dict[int, Tensor] = {}  # per layer: each expert's choices, dropped ones, entropy, tokens
        self._mask: Tensor | None = None
        self._handles: list = []
        self._drops = False
        self._last_step: int | None = None

    # ---- counting ----
    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        blocks = routed_blocks(model)
        if not blocks:
            raise ValueError(f"RouterTelemetryCallback: {type(model).__name__} has no routed layers; leave it out")
        self._remove_hooks()
        self._sums, self._last_step = {}, None
        self._drops = any(getattr(block.router, "capacity_factor", None) for block in blocks.values())
        for name, block in blocks.items():
            layer = int(re.findall(r"\d+", name)[-1])
            self._handles.append(block.router.register_forward_hook(partial(self._count, layer)))
        for module in model.modules():
            if any(isinstance(child, nn.ModuleList) for child in module.children()):  # a stack of layers, or above it
                self._handles.append(module.register_forward_pre_hook(self._keep_mask, with_kwargs=True))
        if state.is_world_process_zero:
            self._keep_rows_until(os.path.join(args.output_dir, FILE), state.global_step)

    def _keep_mask(self, module: nn.Module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    @torch.no_grad()
    def _count(self, layer: int, router: nn.Module, args, output) -> None:
        if not router.training:
            return
        logits, weights, indices = output
        own = torch.ones_like(logits[:, 0], dtype=torch.float32)
        if self._mask is not None and self._mask.numel() == len(own):
            own = self._mask.flatten().to(own)
        kept = (weights > 0) * own[:, None]
        load = own.new_zeros(logits.shape[1]).scatter_add_(0, indices.flatten(), kept.flatten())
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[1])
        tokens = own.sum()
        dropped = tokens * weights.shape[1] - kept.sum()
        sums = torch.cat([load, torch.stack([dropped, (entropy * own).sum(), tokens])])
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    # ---- telling ----
    def on_distill_log(self, args, state, control, *, logs: dict, accelerator, **kwargs) -> None:
        self._tell(args, state, logs)

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        """For trainers without `on_distill_log`, whose record of this log is already written."""
        if logs is None or "loss" not in logs or self._last_step == state.global_step:
            return
        self._tell(args, state, logs)
        if state.log_history:
            state.log_history[-1].update({k: v for k, v in logs.items() if k not in state.log_history[-1]})

    def _tell(self, args, state, logs: dict) -> None:
        self._last_step = state.global_step
        if not self._sums:
            return
        layers = sorted(self._sums)
        sums = torch.stack([self._sums[layer] for layer in layers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        self._sums = {}
        sums = sums.cpu()
        load, (dropped, entropy, tokens) = sums[:, :-3], sums[:, -3:].unbind(1)
        choices = load.sum(1) + dropped
        load = load / load.sum(1, keepdim=True).clamp(min=1)
        entropy = entropy / tokens.clamp(min=1)
        logs |= {"expert_load/max": load.max().item(), "expert_load/min": load.min().item()}
        logs["router_entropy"] = entropy.mean().item()
        if self._drops:
            logs["dropped"] = (dropped.sum() / choices.sum().clamp(min=1)).item()
        for i, layer in enumerate(layers):
            if self.detail == "layer":
                logs |= {f"expert_load/{layer}": load[i].max().item(), f"router_entropy/{layer}": entropy[i].item()}
            elif self.detail == "expert":
                logs |= {f"expert_load/{layer}/{e}": share for e, share in enumerate(load[i].tolist())}
        if state.is_world_process_zero:
            row = {"step": state.global_step, "load": dict(zip(layers, rounded(load), strict=True))}
            row |= {"entropy": dict(zip(layers, rounded(entropy), strict=True))}
            os.makedirs(args.output_dir, exist_ok=True)
            with open(os.path.join(args.output_dir, FILE), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._remove_hooks()
        path = os.path.join(args.output_dir, FILE)
        if state.is_world_process_zero and os.path.isfile(path):
            draw_expert_load(path, os.path.join(args.output_dir, PICTURE))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @staticmethod
    def _keep_rows_until(path: str, step: int) -> None:
        """A run that was killed may have written lines after the checkpoint it resumes from."""
        if not os.path.isfile(path):
            return
        with open(path, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step and step]
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(kept)


def draw_expert_load(path: str, picture: str) -> bool:
    """Draw an `expert_load.jsonl` as a heat map: a row per expert, grouped by layer, over training.

    Returns:
        Whether it was drawn: not without matplotlib, which is said in the log.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no picture of the expert load: matplotlib is not installed (%s has the numbers)", path)
        return False
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if not rows:
        return False
    layers = list(rows[0]["load"])
    experts = len(rows[0]["load"][layers[0]])
    shares = [[row["load"][layer][e] * experts for row in rows] for layer in layers for e in range(experts)]
    figure = Figure(figsize=(8, 1 + 0.18 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", vmin=0, vmax=2, cmap="coolwarm", interpolation="nearest")
    axes.set_yticks([i * experts + (experts - 1) / 2 for i in range(len(layers))], [f"layer {x}" for x in layers])
    for i in range(1, len(layers)):
        axes.axhline(i * experts - 0.5, color="black", linewidth=0.8)
    shown = sorted({round(i * (len(rows) - 1) / 5) for i in range(6)})
    axes.set_xticks(shown, [rows[i]["step"] for i in shown])
    axes.set_xlabel("step")
    figure.colorbar(image, label="load / even share", extend="max")
    figure.savefig(picture, dpi=120)
    return True


def rounded(values: Tensor) -> list:
    """Nested lists with four decimals."""
    return [[round(x, 4) for x in row] if isinstance(row, list) else round(row, 4) for row in values.tolist()]
