"""vLLM's `prompt_logprobs`: per token of a prompt {id: {"logprob", "rank", "decoded_token"}}, the first one null.

Each entry holds the k likeliest ids and the token that stands there, so k or k + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_distill.teachers.endpoint import BadReply

ALLOWED_EXCESS = 0.01  # of the log of a sum of probabilities: servers round, and compute in bfloat16
ALLOWED_NAMES = 0.1  # share of token texts that may be written otherwise


def entries_of(reply: dict, ids: list[int]) -> list[dict | None]:
    """One entry per token of the prompt, each with the token that was sent.

    Raises:
        BadReply: there are none, or they are of other tokens.
    """
    entries = reply["choices"][0].get("prompt_logprobs")
    if not isinstance(entries, list):
        raise BadReply(
            "log-probabilities of the prompt were asked for and none came (`prompt_logprobs` was dropped): only vLLM "
            "and servers of its protocol have them; `transformers serve` and most paid APIs do not"
        )
    if len(entries) != len(ids):
        raise BadReply(
            f"it told of {len(entries)} tokens where the prompt has {len(ids)}: another tokenizer stands behind it, it "
            "adds or leaves out a token at the start, or it cut the prompt"
        )
    for s, (entry, token) in enumerate(zip(entries[1:], ids[1:], strict=True), 1):
        if not isinstance(entry, dict) or str(token) not in entry:
            raise BadReply(
                f"token {s} of the prompt is {token} and it told of {str(entry)[:100]}: another tokenizer stands "
                "behind it"
            )
    return entries


def top_k(entries: list[dict | None], positions: list[int], k: int, vocabulary: int) -> dict[str, Tensor]:
    """The k likeliest ids and their log-probabilities after each position, (n, k), likeliest first.

    Ids from `vocabulary` on (rows of a padded head) are left to the tail: their places repeat an id with -inf.

    Raises:
        BadReply: fewer than k, or no log-probabilities.
    """
    ids, log_probs = [], []
    for position in positions:
        entry = entries[position + 1]
        if len(entry) < k:
            raise BadReply(f"{len(entry)} log-probabilities came for a token where {k} were asked for")
        try:
            found = sorted(((float(e["logprob"]), int(i)) for i, e in entry.items()), reverse=True)[:k]
        except (TypeError, KeyError, ValueError) as error:
            raise BadReply(f"an entry of prompt_logprobs cannot be read: {str(entry)[:100]}") from error
        if not all(math.isfinite(value) for value, _ in found) or found[0][0] > ALLOWED_EXCESS:
            raise BadReply(f"what it told are no log-probabilities: {found[:3]}")
        known = [(value, i) for value, i in found if i < vocabulary]
        if not known:
            raise BadReply(
                f"all ids it told lie beyond the tokenizer's {vocabulary}: another tokenizer stands behind it"
            )
        known += [(-math.inf, known[0][1])] * (k - len(known))
        log_probs.append([value for value, _ in known])
        ids.append([i for _, i in known])
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int64).reshape(-1, k),
        "log_probs": torch.tensor(log_probs, dtype=torch.float32).reshape(-1, k),
    }
    excess = tensors["log_probs"].logsumexp(-1)
    if len(excess) and excess.max() > ALLOWED_EXCESS:
        raise BadReply(
            f"probabilities sum to {excess.max().exp().item():.4f}: they are not those of the softmax over all tokens "
            "(vLLM: start it with --logprobs-mode raw_logprobs)"
        )
    return tensors


def check_names(entries: list[dict | None], tokenizer) -> None:
    """The server means the same text by the same ids, where it says what it means.

    Raises:
        BadReply: it does not.
    """
    told = {
        int(i): e["decoded_token"].strip()
        for entry in entries[1:]
        for i, e in entry.items()
        if isinstance(e.get("decoded_token"), str) and "\ufffd" not in e["decoded_token"]
    }
    size = len(tokenizer)
    ours = {i: tokenizer.decode([i]).strip() for i in told if i < size}
    wrong = [i for i, text in ours.items() if text != told[i] and "\ufffd" not in text]
    if len(wrong) > ALLOWED_NAMES * len(ours):
        shown = "; ".join(f"{i} is {ours[i]!r} here and {told[i]!r} there" for i in wrong[:3])
        raise BadReply(f"another tokenizer stands behind it: id {shown} ({len(wrong)} of {len(ours)} ids differ)")


__all__ = ["check_names", "entries_of", "top_k"]
