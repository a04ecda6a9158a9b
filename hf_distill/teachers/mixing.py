"""Pure functions of ensembles: mixing and scattering logits, and part of a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_distill.heads import ROW_KEYS, rows_of
from hf_distill.signals import HeadLogits, Logits, MixtureLogits, SparseLogits
from hf_distill.teachers.base import PREFIX


def mix(parts: Sequence[Logits], weights: Tensor, space: str = "probability") -> MixtureLogits | SparseLogits:
    """Several teachers' logits of the same rows as one distribution; mixtures among them are taken apart.

    Args:
        weights: (M,) or (..., M), summing to 1 over M.

    Raises:
        ValueError: a mixture of the other space, or sparse logits beside others.
    """
    if any(isinstance(part, SparseLogits) for part in parts):
        if space != "probability" or not all(isinstance(part, SparseLogits) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(f"sparse teachers mix among themselves and by probability, got {kinds} in space {space!r}")
        return mix_sparse(parts, weights)
    flat: list[HeadLogits | Tensor] = []
    factors: list[Tensor] = []
    for part, weight in zip(parts, weights.unbind(-1), strict=True):
        if isinstance(part, MixtureLogits):
            if part.space != space:
                raise ValueError(f"a {space!r} mixture cannot hold one of {part.space!r}: give both one space")
            flat += part.parts
            factors.append(weight[..., None] * part.weights)
        elif isinstance(part, (HeadLogits, Tensor)):
            flat.append(part)
            factors.append(weight[..., None])
        else:
            raise ValueError(f"{type(part).__name__} cannot be mixed; use teachers that give logits or SparseLogits")
    if len({factor.dim() for factor in factors}) > 1:
        factors = [factor.expand(*flat[0].shape[:-1], factor.shape[-1]) for factor in factors]
    return MixtureLogits(tuple(flat), torch.cat(factors, -1), space)


def mix_sparse(parts: Sequence[SparseLogits], weights: Tensor) -> SparseLogits:
    """Σ_m w_m p_m over the union of the teachers' entries.

    With tail "renorm" it is the exact mixture of the renormalised teachers. With the others a teacher counts nothing
    for an entry that only its companions kept: that mass stays in its tail.

    Args:
        parts: of one tail; log_probs (..., k_m).
        weights: (M,) or (..., M), summing to 1 over M.
    """
    tails = {part.tail for part in parts}
    if len(tails) > 1:
        raise ValueError(f"sparse teachers mix with one tail, got {', '.join(sorted(tails))}")
    tail = tails.pop()
    log_probs = [p.log_probs.log_softmax(-1) if tail == "renorm" else p.log_probs for p in parts]
    probs = torch.cat([lp.exp() * w[..., None] for lp, w in zip(log_probs, weights.unbind(-1), strict=True)], -1)
    ids, order = torch.cat([part.ids for part in parts], -1).sort(-1)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = starts.long().cumsum(-1) - 1
    mixed = torch.zeros_like(probs).scatter_add_(-1, place, probs.gather(-1, order))
    temperature = _one({part.temperature for part in parts}, "temperature")
    return SparseLogits(ids[..., :1].expand_as(ids).scatter(-1, place, ids), mixed.log(), tail, temperature)


def scatter(parts: Sequence[tuple[Tensor, Logits]], total: int) -> Logits:
    """Logits of `total` rows from groups that cover each row once.

    Tensors and sparse logits become one; heads become a mixture whose weights are 0 and 1.

    Args:
        parts: (row numbers (n,) ascending, logits of these rows) per group.

    Raises:
        ValueError: groups that no one type can hold.
    """
    if len(parts) == 1:
        return parts[0][1]
    if all(isinstance(logits, Tensor) for _, logits in parts):
        width = min(logits.shape[-1] for _, logits in parts)
        out = parts[0][1].new_zeros(total, width)
        for index, logits in parts:
            out[index] = logits[:, :width].to(out.dtype)
        return out
    if all(isinstance(logits, SparseLogits) for _, logits in parts):
        k, like = max(logits.shape[-1] for _, logits in parts), parts[0][1]
        ids, log_probs = like.ids.new_zeros(total, k), like.log_probs.new_full((total, k), -torch.inf)
        for index, logits in parts:
            ids[index, : logits.shape[-1]] = logits.ids
            log_probs[index, : logits.shape[-1]] = logits.log_probs.to(log_probs.dtype)
        tail, temperature = (_one({getattr(x, name) for _, x in parts}, name) for name in ("tail", "temperature"))
        return SparseLogits(ids, log_probs, tail, temperature)
    spread = [_spread(index, logits, total) for index, logits in parts]
    spaces = {logits.space for logits in spread if isinstance(logits, MixtureLogits)} or {"probability"}
    mine = [torch.zeros(total, device=index.device).index_fill_(0, index, 1.0) for index, _ in parts]
    return mix(spread, torch.stack(mine, -1), _one(spaces, "space"))


def _spread(index: Tensor, logits: Logits, total: int) -> Logits:
    """Logits of some rows among `total`; what the others hold has no meaning."""

    def put(x: Tensor) -> Tensor:
        return x.new_zeros(total, *x.shape[1:]).index_copy_(0, index, x)

    if isinstance(logits, Tensor):
        return put(logits)
    if isinstance(logits, HeadLogits):
        return replace(logits, hidden=put(logits.hidden))
    if isinstance(logits, MixtureLogits):
        weights = logits.weights.expand(len(index), -1)
        parts = tuple(_spread(index, part, total) for part in logits.parts)
        return MixtureLogits(parts, put(weights), logits.space)
    raise ValueError(f"{type(logits).__name__} cannot be routed beside other logits; cache all teachers or none")


def _one(values: set, what: str):
    if len(values) > 1:
        raise ValueError(f"teachers that are put together must have one {what}, got {', '.join(map(str, values))}")
    return values.pop()


def batch_of_examples(batch: dict, examples: Tensor, per_token: Collection[str] = ()) -> dict:
    """The batch of some examples only, with its loss rows, their documents and examples numbered anew.

    Args:
        examples: (n,) ascending.
        per_token: keys with one entry per loss row; all others have one per example.

    Raises:
        ValueError: a tensor whose first dimension does not count the batch's examples.
    """
    size, device = size_of(batch)
    new = torch.full((size,), -1, device=device)
    new[examples] = torch.arange(len(examples), device=device)
    out, kept = {}, {}
    for prefix in (p for p in ("", PREFIX) if p + "loss_rows" in batch):
        rows, width = rows_of(batch, prefix), batch[prefix + "labels"].shape[1]
        keep, documents = new[rows.index // width] >= 0, new[rows.example] >= 0
        kept[prefix] = keep
        out[prefix + "loss_rows"] = new[rows.index[keep] // width] * width + rows.index[keep] % width
        out[prefix + "row_labels"] = rows.labels[keep]
        out[prefix + "row_document"] = (documents.long().cumsum(0) - 1)[rows.document[keep]]
        out[prefix + "document_example"] = new[rows.example[documents]]
    for key, value in batch.items():
        if key.removeprefix(PREFIX) in ROW_KEYS:
            continue
        if key in per_token:
            out[key] = value[kept[""]]
        elif isinstance(value, Tensor) and value.dim():
            if len(value) != size:
                raise ValueError(
                    f"{key} of shape {tuple(value.shape)} cannot be divided among the {size} examples of the batch; "
                    "name per-token cached columns in token_columns="
                )
            out[key] = value[examples]
        else:
            out[key] = [value[i] for i in examples.tolist()] if isinstance(value, (list, tuple)) else value
    return out


def size_of(batch: dict) -> tuple[int, torch.device]:
    """Examples in a batch that is not packed, and where it lies."""
    tensors = (batch.get("labels"), *(v for k, v in batch.items() if k.removeprefix(PREFIX) not in ROW_KEYS))
    first = next(v for v in tensors if isinstance(v, Tensor) and v.dim())
    return len(first), first.device


__all__ = ["batch_of_examples", "mix", "mix_sparse", "scatter", "size_of"]
