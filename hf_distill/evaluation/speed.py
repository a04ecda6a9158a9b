"""Speed and memory of several models beside each other: reading a prompt, writing an answer, one forward pass."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


@torch.no_grad()
def forward_cost(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Tensor]], *, rounds: int = 5
) -> dict[str, dict[str, float]]:
    """What one forward pass takes: the best of `rounds` interleaved rounds, and the memory beside the weights.

    Args:
        models: name -> a model in eval mode.
        inputs: name -> what that model reads.

    Returns:
        name -> {"seconds", "activation_bytes"}.

    Raises:
        ValueError: rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    found = {name: {"seconds": float("inf"), "activation_bytes": 0} for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            device = next(model.parameters()).device
            here = {key: values.to(device) for key, values in inputs[name].items()}
            if round_ == 0:  # warms up, too
                found[name]["activation_bytes"] = peak_bytes(lambda model=model, here=here: model(**here), device)
            else:
                seconds = _seconds(lambda model=model, here=here: model(**here), device)
                found[name]["seconds"] = min(found[name]["seconds"], seconds)
    return found


def peak_bytes(run, device: torch.device) -> int:
    """The most memory that tensors made by `run` held at one time."""
    if device.type == "cpu":
        with _LiveBytes() as live:
            run()
        return live.peak
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    run()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed; a CPU's allocator keeps no count."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _storage(x) not in self.known | given:
                storage = x.untyped_storage()
                self.known.add(_storage(x))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, _storage(x), storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
