"""The answer in a generated text, so that two texts can be compared by what they answer."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from hf_distill.evaluation.answers import normalised

Extractor = Callable[[str], object]


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separators removed.

    Example:
        >>> last_number("3 boxes of 1,200, so #### 3,600.")
        3600.0
    """
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def first_letter(text: str) -> str | None:
    """The first capital A to E that stands alone.

    Example:
        >>> first_letter("The answer is (C), not D.")
        'C'
    """
    found = re.search(r"\b[A-E]\b", text)
    return found.group() if found else None


def whole_text(text: str) -> str | None:
    """All of it, without regard to case, punctuation and articles."""
    return normalised(text) or None


EXTRACTORS: dict[str, Extractor] = {"number": last_number, "letter": first_letter, "exact": whole_text}


def extractor_of(name: str | Extractor) -> Extractor:
    """A function text -> answer, None where there is none; two answers are the same if they are equal.

    Args:
        name: a name of EXTRACTORS, `package.module:function`, or the function itself.

    Raises:
        ValueError: nothing of that name.
    """
    if callable(name):
        return name
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load the answer extractor {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"answer_extractor must be {', '.join(EXTRACTORS)} or package.module:function, got {name!r}")
    return found
