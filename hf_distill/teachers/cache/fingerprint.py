"""Whose answers a cache holds: enough of teacher, tokenizer and data to say what changed."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

SAMPLE = 256  # entries per tensor


def weights_digest(model: nn.Module) -> str:
    """Of every parameter's and buffer's name, shape, dtype and 256 evenly spaced entries."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
            entries = flat[places.to(flat.device)].cpu().contiguous()
            digest.update(entries.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(processing_class) -> str | None:
    """Of all that decides how text becomes ids; None without a tokenizer."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(tokenizer, "get_vocab"):
        return None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(fast.to_str()) if fast is not None else {"vocabulary": tokenizer.get_vocab()}
    for name in ("truncation", "padding"):  # set anew by every call
        facts.pop(name, None)
    return _digest(json.dumps(facts, sort_keys=True))


def template_digest(processing_class) -> str | None:
    template = getattr(processing_class, "chat_template", None)
    return None if template is None else _digest(json.dumps(template, sort_keys=True))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def teacher_fingerprint(teacher) -> dict:
    """Compared: revision, weights, dtype, bits, how its logits are read, and what an endpoint serves.

    Its name is told, not compared.
    """
    described = teacher.describe()
    model = getattr(teacher, "model", None)
    served = getattr(teacher, "served", None)
    return ({} if served is None else {"served": served}) | {
        "revision": teacher.revision,
        "weights": None if model is None else weights_digest(model),
        "dtype": described.get("teacher_dtype"),
        "bits": described.get("teacher_bits"),
        "dense_logits": getattr(teacher, "dense_logits", None),
    }


def tokenizer_fingerprint(processing_class) -> dict:
    return {"tokenizer": tokenizer_digest(processing_class), "chat_template": template_digest(processing_class)}


def differences(stored: dict, given: dict, prefix: str = "") -> list[str]:
    """One line per fact that differs."""
    lines = []
    for name in sorted(stored.keys() | given.keys()):
        old, new = stored.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {_shown(old)} in the cache, {_shown(new)} now")
    return lines


def _shown(value) -> str:
    return "nothing" if value is None else str(value)
