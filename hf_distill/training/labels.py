"""What classes mean: the names of a dataset's labels and of two models' outputs, and how they meet."""

from __future__ import annotations

import re

import torch
from torch import Tensor


def names_of(config) -> list[str] | None:
    """A model's class names in the order of its logits; None where they are the generic LABEL_0, LABEL_1, ..."""
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels.get(i, labels.get(str(i)))) for i in range(len(labels))]
    return None if all(re.fullmatch(r"LABEL_\d+|\d+", name) for name in names) else names


def class_order(names: list[str], config, *, what: str, same_order: bool = False) -> list[int] | None:
    """Where a model's logits have the dataset's classes: `order[i]` is the model's index of class i.

    Names are compared without regard to case, "_" and "-". A model that knows more classes than the dataset is taken at
    those of the dataset.

    Args:
        names: of the dataset's classes.
        config: the model's.
        what: it is called in messages.
        same_order: class i is the model's class i, whatever the names say.

    Returns:
        None where the order is the same already (or the model's names are generic).

    Raises:
        ValueError: another number of classes without names, or names that differ; shows both.
    """
    theirs = names_of(config)
    if theirs is None or same_order:
        if config.num_labels != len(names):
            raise ValueError(
                f"the {what} has {config.num_labels} classes and the dataset {len(names)} ({_shown(names)}): give a "
                f"{what} trained on these classes"
            )
        return None
    places = {_plain(name): i for i, name in enumerate(theirs)}
    if len(places) < len(theirs) or any(_plain(name) not in places for name in names):
        raise ValueError(
            f"the dataset's classes and the {what}'s have different names, so they cannot be matched. Dataset: "
            f"{_shown(names)}. {what.capitalize()}: {_shown(theirs)}. Give the dataset's classes the {what}'s names "
            "with --class_names, or, where class i means the same in both, set --same_label_order"
        )
    order = [places[_plain(name)] for name in names]
    return None if order == list(range(len(theirs))) else order


def class_counts(labels, classes: int) -> Tensor:
    """(C,) int64, examples per class.

    Raises:
        ValueError: a label outside 0 to C - 1.
    """
    labels = torch.as_tensor(labels)
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"labels must lie between 0 and {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    return torch.bincount(labels.long(), minlength=classes)


def check_every_class(labels, names: list[str], what: str) -> None:
    """Every class has an example. Raises ValueError that says what needs them (`what`) and which classes have none."""
    empty = [name for name, n in zip(names, class_counts(labels, len(names)).tolist(), strict=True) if not n]
    if empty:
        raise ValueError(f"{what} needs examples of every class, and there are none of {_shown(empty)}")


def balanced_weights(labels, names: list[str]) -> Tensor:
    """(C,) weights N / (C · n_c), whose mean over the examples is 1.

    Raises:
        ValueError: a class without examples.
    """
    check_every_class(labels, names, "balancing classes by weights")
    counts = class_counts(labels, len(names)).double()
    return (counts.sum() / (len(names) * counts)).float()


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _shown(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")
