"""Tokens per second of several models beside each other, as they read a prompt and as they write an answer."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def tokens_per_second(
    models: Mapping[str, PreTrainedModel], inputs: Mapping[str, Tensor], *, new_tokens: int = 16, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """The best of `rounds` interleaved rounds, so that a busy machine slows all models alike.

    Args:
        models: name -> a model in eval mode; all read the same inputs.
        inputs: of `generate`, `input_ids` and `attention_mask` among them.
        new_tokens: written by each row, an end of answer or not.

    Returns:
        name -> {"read": prompt tokens per second, "write": new tokens per second}.

    Raises:
        ValueError: new_tokens or rounds below 1.
    """
    if new_tokens < 1 or rounds < 1:
        raise ValueError(f"new_tokens and rounds must be at least 1, got {new_tokens} and {rounds}")
    prompt, written = int(inputs["attention_mask"].sum()), len(inputs["input_ids"]) * new_tokens
    best = {name: {"read": float("inf"), "write": float("inf")} for name in models}
    for _ in range(rounds + 1):  # the first warms up and is usually slower
        for name, model in models.items():
            here = {key: values.to(model.device) for key, values in inputs.items()}
            tasks = {
                "read": lambda model=model, here=here: model(**here, use_cache=False),
                "write": lambda model=model, here=here: model.generate(
                    **here, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
                ),
            }
            for task, run in tasks.items():
                best[name][task] = min(best[name][task], _seconds(run, model.device))
    amounts = {"read": prompt, "write": written}
    return {name: {task: amounts[task] / seconds for task, seconds in own.items()} for name, own in best.items()}


def _seconds(run, device: torch.device) -> float:
    """Process CPU time on a CPU, since what else the machine does must not count; wall-clock time elsewhere."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    start = clock()
    run()
    wait()
    return clock() - start
