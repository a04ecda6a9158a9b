"""Teachers that write text and judge it: the interface of all of them, with their store and their account."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

from torch import Tensor
from tqdm.auto import tqdm

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.generations import Generation, GenerationStore, Request
from hf_distill.teachers.usage import Usage

Prompt = str | list[dict] | list[int]


class TextTeacher(Teacher):
    """A teacher that gives text instead of signals. A subclass gives `fingerprint`, `answer` and, if it can,
    `label_log_probs`.

    Args:
        store: folder that keeps every generation (see GenerationStore): what is in it is never generated again, so a
            run that was killed goes on where it stopped. None keeps nothing between calls.

    Attributes:
        usage: what it was asked for.
    """

    gives = frozenset()
    holds_to_schemas = False

    def __init__(self, store: str | os.PathLike | None = None):
        self.usage = Usage()
        self.store = None if store is None else GenerationStore(store, self.fingerprint())

    def fingerprint(self) -> dict:
        """What makes two teachers the same one to a store: plain JSON values."""
        raise NotImplementedError(f"{type(self).__name__} must define fingerprint()")

    def answer(self, requests: list[Request]) -> Iterator[list[tuple[int, Generation]]]:
        """Write the texts, in any order: (place in `requests`, text) of a few at a time. Check them all first."""
        raise NotImplementedError(f"{type(self).__name__} must define answer(requests)")

    def count(self, generation: Generation) -> None:
        """Enter a text that was written into the account."""
        self.usage.add(generation)

    def label_log_probs(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        *,
        images: Sequence | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """(N, L) log-probabilities of each label as the answer to each prompt."""
        raise NotImplementedError(f"{type(self).__name__} cannot tell log-probabilities; use LocalTextTeacher")

    def yes_no(
        self, prompts: Sequence[Prompt], *, images: Sequence | None = None, yes: str = "Yes", no: str = "No"
    ) -> Tensor:
        """(N,) P(yes) against no; see `LocalTextTeacher.label_log_probs`. Plain prompts mostly need " Yes", " No"."""
        return self.label_log_probs(prompts, [yes, no], images=images, normalize=True)[:, 0].exp()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_return_sequences: int = 1,
        stop_strings: Sequence[str] = (),
        seed: int = 0,
        log_probs: bool = False,
        response_schema: dict | None = None,
    ) -> list[Generation]:
        """Texts that go on from the prompts, `num_return_sequences` of the first, then of the second, and so on.

        Args:
            prompts: texts, conversations (lists of {"role", "content"}) for the chat template, or token ids.
            temperature: 0 takes the likeliest token; `seed` and `top_p` then change nothing.
            top_p: draw among the likeliest tokens that together have this probability.
            stop_strings: a text ends before the first of them.
            seed: with the prompt and a text's place among those of its prompt, decides every draw.
            log_probs: also the log-probabilities of the tokens.
            response_schema: JSON schema that the texts must fit; for teachers that can hold to one.

        Raises:
            ValueError: no or empty prompts, settings out of range; of a local teacher, prompts that do not fit its
                context and conversations without a chat template.
        """
        prompts = checked_prompts(prompts)
        settings = _settings(max_new_tokens, temperature, top_p, stop_strings, seed, log_probs)
        if num_return_sequences < 1 or (temperature == 0 and num_return_sequences > 1):
            raise ValueError(
                f"num_return_sequences must be at least 1, and 1 at temperature 0 (all texts would be the same), got "
                f"{num_return_sequences}"
            )
        if response_schema is not None and not self.holds_to_schemas:
            raise ValueError(f"{type(self).__name__} cannot hold to a response_schema; use RemoteTextTeacher, or parse")
        settings["response_schema"] = response_schema
        requests = [Request(p, i, **settings) for p in prompts for i in range(num_return_sequences)]
        owner = None if self.store is None else self.store.teacher
        keys = [request.key(owner) for request in requests]
        found = {key: None if self.store is None else self.store.get(key) for key in keys}
        missing = {key: request for key, request in zip(keys, requests, strict=True) if found[key] is None}
        self.usage.cache_hits += len(keys) - len(missing)
        order = list(missing)
        with tqdm(total=len(order), desc=f"{self.name} writes", unit="text", disable=None, leave=None) as progress:
            for done in self.answer(list(missing.values())) if missing else ():
                answers = [(order[i], missing[order[i]], generation) for i, generation in done]
                if self.store is not None:
                    self.store.add(answers)
                for key, _, generation in answers:
                    found[key] = generation
                    self.count(generation)
                progress.update(len(answers))
        return [found[key] for key in keys]


def checked_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Texts, conversations or token ids. Raises ValueError, naming what is none of them."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"prompts must be a list of texts or conversations with at least one, got {prompts!r}")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, dict):
            raise ValueError(
                f"prompt {i} is one message: a conversation is a list of them, so prompts=[[message, ...]]"
            )
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if not isinstance(prompt, str) and not all(
            isinstance(m, int) or (isinstance(m, dict) and {"role", "content"} <= m.keys()) for m in prompt
        ):
            raise ValueError(f"prompt {i} must be a text or a list of {{'role', 'content'}}, got {prompt!r}")
    return list(prompts)


def _settings(max_new_tokens, temperature, top_p, stop_strings, seed, log_probs) -> dict:
    """Settings of a request. Where nothing is drawn, what steers draws is left out of its identity."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be 0 or positive and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"stop_strings must be a list of texts that are not empty, got {stop_strings!r}")
    return {
        "seed": int(seed) if temperature else 0,
        "max_new_tokens": int(max_new_tokens),
        "temperature": float(temperature),
        "top_p": float(top_p) if temperature else 1.0,
        "stop_strings": tuple(stop_strings),
        "log_probs": bool(log_probs),
    }


__all__ = ["Prompt", "TextTeacher", "Usage", "checked_prompts"]
