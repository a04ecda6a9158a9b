"""Taps: what any module of a model puts out, read by its path while the model runs.

An objective names them in `needs`, as `"features:<path>"` (of one side: `"student.features:<path>"`), and finds them in
`Signals.features["<path>"]`. A path is

- that of a module as `named_modules()` spells it, with or without PEFT's prefix: "vit.layers.3";
- the same with ":input" for the module's first input: "classifier:input";
- "hidden_states.<i>": that entry of `output_hidden_states` (0 the embeddings, -1 the last);
- "embedding": the input of the classification head's last linear layer.

Hooks are there for the length of one forward only. So gradient checkpointing, which runs layers again in the backward
pass, stores nothing twice; a teacher that shares the student's modules reads its own forward; a copy, a saved model or
an exported one has no hook. A compiled backbone is traced with its hooks and runs without a graph break.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

KIND, HIDDEN, INPUT, EMBEDDING = "features", "hidden_states.", ":input", "embedding"
PEFT_PREFIX = "base_model.model."
_TWICE = "twice"


class Gives(frozenset):
    """Kinds of signals a teacher gives; "features" stands for every tap."""

    def __rsub__(self, needs: frozenset) -> frozenset:
        return frozenset(need for need in needs if need.split(":")[0] not in self)

    def __ror__(self, other: frozenset) -> Gives:
        return Gives(frozenset(other) | frozenset(self))


def tap(path: str | int, side: str = "") -> str:
    """The entry of `needs` that reads a path; an int is an index into `hidden_states`."""
    return (f"{side}." if side else "") + f"{KIND}:{name_of(path)}"


def name_of(path: str | int) -> str:
    """The name under which a tap stands in `Signals.features`."""
    return f"{HIDDEN}{path}" if isinstance(path, int) else path


def paths_in(needs: frozenset[str]) -> list[str]:
    """The paths that `needs` reads, in a fixed order."""
    return sorted(need.split(":", 1)[1] for need in needs if need.startswith(KIND + ":"))


def kinds(needs: frozenset[str]) -> frozenset[str]:
    """The kinds of signals read: the names without their paths, and "hidden_states" where a path reads them."""
    hidden = {"hidden_states" for path in paths_in(needs) if hidden_index(path) is not None}
    return frozenset(need.split(":")[0] for need in needs) | hidden


def hidden_index(path: str) -> int | None:
    """The index of a "hidden_states.<i>" path, else None."""
    number = path.removeprefix(HIDDEN)
    return int(number) if number != path and number.lstrip("-").isdigit() else None


def find(model: nn.Module, path: str) -> tuple[nn.Module, bool]:
    """The module of a path, and whether its input is read instead of its output.

    Args:
        model: the transformers model, below a PEFT wrapper.

    Raises:
        ValueError: no such module; the message lists paths that come near.
    """
    if path == EMBEDDING:
        return classifier_of(model), True
    name = path.removesuffix(INPUT).removeprefix(PEFT_PREFIX)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules() if n]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:5]
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}; near matches: {', '.join(near)}. Other paths are "
            f'"{HIDDEN}<i>" and "{EMBEDDING}"'
        ) from None
    return module, path.endswith(INPUT)


def classifier_of(model: nn.Module) -> nn.Module:
    """The last linear layer with one output per class; the copy of it that trains beside adapters.

    Raises:
        ValueError: there is none.
    """
    classes = getattr(model.config, "num_labels", None)
    heads = [name for name, m in model.named_modules() if getattr(m, "out_features", None) == classes]
    others = (getattr(model, "base_model_prefix", "") + ".", "distill_objective.")  # an objective may have heads too
    heads = [name for name in heads if not name.startswith(others)]
    if not heads:
        raise ValueError(
            f'{type(model).__name__} has no linear layer with {classes} outputs outside its backbone, so "{EMBEDDING}" '
            'is not known: name the module, for example "classifier:input"'
        )
    name = heads[-1]
    for wrapped in (".modules_to_save.", ".base_layer"):  # PEFT's: with the adapter off another one of its copies runs
        name = name.split(wrapped)[0]
    return model.get_submodule(name)


@contextlib.contextmanager
def tapped(model: nn.Module, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Inside it, one forward of the model fills the dict with the tapped tensors.

    Raises:
        ValueError: unknown paths; a module that did not run, ran more than once or gave no tensor; an output that
            reentrant checkpointing cut from its gradient.
    """
    features: dict[str, Tensor] = {}
    found = {path: find(model, path) for path in paths_in(needs) if hidden_index(path) is None}
    grad = torch.is_grad_enabled()
    handles = [_hook(path, *place, features) for path, place in found.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
    for path, (module, of_input) in found.items():
        features[path] = tensor = _kept(model, path, features)
        cut = grad and not of_input and not tensor.requires_grad
        if cut and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"the output of {path!r} has no gradient though its weights train: reentrant gradient checkpointing "
                'cuts it; set gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def add_hidden_states(features: dict[str, Tensor], needs: frozenset[str], hidden_states: tuple[Tensor, ...]) -> None:
    """Put the tapped entries of `hidden_states` beside the modules'. Raises ValueError where there are too few."""
    for path in paths_in(needs):
        index = hidden_index(path)
        if index is None:
            continue
        if not -len(hidden_states) <= index < len(hidden_states):
            raise ValueError(
                f"{path} does not exist: the model gives {len(hidden_states)} hidden states, the embeddings first"
            )
        features[path] = hidden_states[index]


def _hook(path: str, module: nn.Module, of_input: bool, features: dict):
    def keep(value) -> None:
        features[path] = _TWICE if path in features else value

    if not of_input:
        return module.register_forward_hook(lambda _, args, output: keep(output))
    return module.register_forward_pre_hook(lambda _, args, kwargs: keep((*args, *kwargs.values())), with_kwargs=True)


def _kept(model: nn.Module, path: str, features: dict) -> Tensor:
    if path not in features:
        raise ValueError(
            f"{path!r} did not run in this forward of {type(model).__name__}: it belongs to a part that the "
            "objective's needs leave out, was compiled before it was tapped, or is not part of the forward"
        )
    if features[path] is _TWICE:
        raise ValueError(
            f"{path!r} runs more than once in a forward of {type(model).__name__}: tap a module that calls it, or "
            f'"{HIDDEN}<i>"'
        )
    return first_tensor(features[path], path)


def first_tensor(value, path: str) -> Tensor:
    """A module's output as one tensor: of a tuple or a model output the first."""
    while not torch.is_tensor(value):
        try:
            value = value[0]
        except (TypeError, KeyError, IndexError):
            raise ValueError(f"{path!r} gives {type(value).__name__}, not a tensor or a tuple of tensors") from None
    return value
