"""Domains of text that every machine has: Python's own sources, what is said in them, and the language reference."""

from __future__ import annotations

import importlib.util
import re

from datasets import Dataset

from hf_distill.embedded.corpus import PIECE_CHARACTERS, stdlib_documents

CHARACTERS = 400_000  # of a domain, at most
DOCSTRING = r':\n\s+r?"""(.{100,}?)"""'


def domain_dataset() -> Dataset:
    """Texts of at most 2000 characters with the columns domain and text, one domain after the other.

    "source" is the standard library's code, "docstrings" those of other parts of it,
    "reference" the topics that `help()` knows; a Python that ships without these has two domains.
    """
    documents = [document["text"] for document in stdlib_documents("train")]
    quoted = (text for document in documents[1::2] for text in re.findall(DOCSTRING, document, re.DOTALL))
    texts = {"docstrings": quoted, "reference": _topics(), "source": documents[::2]}
    rows = [{"domain": name, "text": piece} for name, own in texts.items() for piece in _pieces(own)]
    return Dataset.from_list(rows)


def _topics() -> list[str]:
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _pieces(texts) -> list[str]:
    """Up to CHARACTERS of them, cut to size."""
    pieces, left = [], CHARACTERS
    for text in texts:
        for start in range(0, min(len(text), left), PIECE_CHARACTERS):
            pieces.append(text[start : start + PIECE_CHARACTERS])
            left -= len(pieces[-1])
    return pieces
