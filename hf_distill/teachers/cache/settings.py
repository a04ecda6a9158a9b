"""A mode's settings, completed and checked by what the teacher says of one example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_distill.signals import HeadLogits, Signals, SparseLogits
from hf_distill.teachers.cache.codecs import (
    DTYPES,
    INT8,
    Codec,
    FullLogits,
    Hidden,
    Sampled,
    Scores,
    TopK,
    dtype_name,
    log_probs_in_tiles,
)

ScoreFunction = Callable[[Signals], dict[str, Tensor]]


def label_log_probs(signals: Signals) -> dict[str, Tensor]:
    """log p(label) of every loss row: what perplexities, data selection and reference models are made of."""
    tiles = log_probs_in_tiles(signals.logits, 1.0)
    labels, parts, begin = signals.labels, [], 0
    for tile in tiles:
        own = labels[begin : begin + len(tile), None]
        parts.append(tile.gather(-1, own).squeeze(-1))
        begin += len(tile)
    return {"log_probs": torch.cat(parts) if parts else torch.zeros(0)}


def codec_for(
    mode: str, probe: Signals, scores: ScoreFunction | None, vocabulary: int | None = None, **options
) -> Codec:
    """The mode's settings, completed and checked by what the teacher said of the first batch."""
    if mode == "scores":
        per = options["per"]
        if per not in ("token", "sample"):
            raise ValueError(f'per must be "token" or "sample", got {per!r}')
        values = {n: (dtype_name(v.dtype), tuple(v.shape[1:])) for n, v in probe.features.items()}
        return Scores(values, per, f"{scores.__module__}.{getattr(scores, '__qualname__', type(scores).__name__)}")
    logits, dtype, kinds = probe.logits, options["dtype"], (*DTYPES, INT8) if mode == "hidden" else tuple(DTYPES)
    if dtype not in ("auto", *kinds):
        raise ValueError(f"dtype must be one of auto, {', '.join(kinds)} in mode {mode!r}, got {dtype!r}")
    if mode == "topk" and isinstance(logits, SparseLogits) and logits.temperature == options["temperature"]:
        if not 1 <= options["k"] <= logits.shape[-1]:
            raise ValueError(
                f"k must lie between 1 and the {logits.shape[-1]} that the teacher tells, got {options['k']}"
            )
        return TopK(vocabulary, options["k"], logits.temperature, "float32" if dtype == "auto" else dtype)
    if not isinstance(logits, (HeadLogits, torch.Tensor)):
        kind = type(logits).__name__
        raise ValueError(
            f"mode {mode!r} needs one teacher's own logits, got {kind}: cache each teacher by itself, an endpoint in "
            'mode="topk" at temperature 1'
        )
    if mode == "hidden":
        if not isinstance(logits, HeadLogits):
            raise ValueError('this teacher has no rows before a head: use mode="logits" (few classes) or "topk"')
        computed = dtype_name(logits.hidden.dtype)
        return Hidden(logits.hidden.shape[-1], computed if dtype == "auto" else dtype, computed)
    vocabulary = logits.shape[-1]
    if mode == "logits":
        given = "float32" if isinstance(logits, HeadLogits) else dtype_name(logits.dtype)
        return FullLogits(vocabulary, given if dtype == "auto" else dtype)
    dtype, temperature = "float32" if dtype == "auto" else dtype, options["temperature"]
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if mode == "topk":
        if not 1 <= options["k"] <= vocabulary:
            raise ValueError(f"k must lie between 1 and the vocabulary's {vocabulary}, got {options['k']}")
        return TopK(vocabulary, options["k"], temperature, dtype)
    draws, alpha = options["draws"], options["alpha"]
    if not 1 <= draws < 2**15 or not alpha > 0:
        raise ValueError(f"draws (1 to 32767) and alpha must be positive, got {draws} and {alpha}")
    return Sampled(vocabulary, draws, alpha, temperature, dtype, options["seed"])
