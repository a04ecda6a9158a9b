"""How a local teacher decodes: draws that belong to a request and not to its batch, and stop strings."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from hf_distill.teachers.generations import Request


def sample_token(logits: Tensor, draw: Tensor, top_p: float = 1.0) -> Tensor:
    """The token whose share of the cumulative distribution holds `draw`, likeliest tokens first.

    Args:
        logits: (rows, V).
        draw: (rows,) uniform in [0, 1).
        top_p: keep the likeliest tokens up to the one that reaches this probability.

    Example:
        >>> logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(3, 3)
        >>> sample_token(logits, torch.tensor([0.5, 0.7, 0.95]))
        tensor([1, 2, 0])
        >>> sample_token(logits, torch.tensor([0.5, 0.7, 0.95]), top_p=0.8)
        tensor([1, 2, 2])
    """
    probs, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    below = probs.cumsum(-1) - probs
    cumulative = torch.where(below < top_p, probs, 0.0).cumsum(-1)
    total = cumulative[:, -1:]
    # below the total, so that rounding cannot choose a token of probability 0
    level = torch.minimum(draw.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return order.gather(-1, (cumulative <= level).sum(-1, keepdim=True)).squeeze(-1)


class Draw(LogitsProcessor):
    """Leaves one token per row: the likeliest, or one drawn with the row's own numbers. Keeps log-probabilities."""

    def __init__(self, requests: Sequence[Request], width: int, device: torch.device, vocabulary: int | None = None):
        first, self.vocabulary = requests[0], vocabulary
        self.temperature, self.top_p, self.width = first.temperature, first.top_p, width
        self.log_probs: list[Tensor] | None = [] if first.log_probs else None
        if self.temperature:
            draws = [numbers(request) for request in requests]
            self.draws = torch.tensor(draws, dtype=torch.float32, device=device).clamp_(max=1 - 2**-24)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.vocabulary is not None and self.vocabulary < scores.shape[-1]:  # a padded head: no tokens from there on
            scores = scores.clone()
            scores[:, self.vocabulary :] = -torch.inf
        if self.temperature:
            step = min(input_ids.shape[1] - self.width, self.draws.shape[1] - 1)
            token = sample_token(scores / self.temperature, self.draws[:, step], self.top_p)[:, None]
        else:
            token = scores.argmax(-1, keepdim=True)
        if self.log_probs is not None:
            self.log_probs.append(scores.log_softmax(-1).gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def numbers(request: Request) -> list[float]:
    """A request's uniform numbers, one per token; more tokens go on from the same start."""
    prompt = json.dumps(request.prompt, sort_keys=True, ensure_ascii=False)
    generator = random.Random(f"{request.seed} {request.index} {prompt}")
    return [generator.random() for _ in range(request.max_new_tokens)]


class StopAtStrings(StoppingCriteria):
    """Ends a row once its own new text holds a stop string, and remembers after how many tokens.

    transformers' own criterion also matches a string that begins in the prompt.
    """

    def __init__(self, tokenizer, stop_strings: Sequence[str], width: int):
        self.tokenizer, self.stop_strings, self.width = tokenizer, stop_strings, width
        # a token holds a byte at least; a few more for a character or a leading space cut at the window's start
        self.window = max(len(s.encode()) for s in stop_strings) + 4
        self.length: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        new = input_ids[:, self.width :]
        for row, ids in enumerate(new[:, -self.window :].tolist()):
            if row not in self.length:
                text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                if any(s in text for s in self.stop_strings):
                    self.length[row] = new.shape[1]
        return torch.tensor([row in self.length for row in range(len(new))], device=input_ids.device)


def left_padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids and attention_mask (B, S), the last token of every row in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


__all__ = ["Draw", "StopAtStrings", "left_padded", "numbers", "sample_token"]
