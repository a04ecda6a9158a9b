"""A corpus as units that are kept or dropped as one, chunks of tokens or documents, read in order and never held."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset, load_dataset

from hf_distill.teachers.cache.fingerprint import tokenizer_digest

UNITS = ("chunks", "documents")
PROBES = 64
AT_ONCE = 64  # documents given to the tokenizer together


@dataclass
class Unit:
    """One chunk or document.

    Attributes:
        ids: (n,) int32 tokens of the corpus's tokenizer; None for a document that is text.
        row: the data set's row of a document or of a chunk that was tokenised before.
    """

    ids: np.ndarray | None
    row: dict = field(default_factory=dict)
    text: str | None = None

    def content(self) -> bytes:
        """What it is told apart by."""
        return self.ids.tobytes() if self.text is None else self.text.encode("utf-8", "surrogatepass")


class Corpus:
    """A corpus as units in a fixed order.

    Args:
        data: a Dataset or IterableDataset with a column of texts or `input_ids`, or paths of text files, where a blank
            line ends a document.
        tokenizer: of the models that score it. Tokenised chunks do without.
        unit: "chunks" packs documents, each ended by the end token, into chunks of `length` + 1 tokens (the official
            layout: `length` inputs and as many labels; what is left over at the end is dropped), or takes `input_ids`
            as they are. "documents" takes each document by itself.
        length: inputs that a model reads at once. Longer documents are read in windows.

    Raises:
        ValueError: no such column, no tokenizer where one is needed, one without an end token, numbers below 1.
    """

    def __init__(self, data, tokenizer=None, *, unit: str = "chunks", length: int = 1024, text_column: str = "text"):
        if unit not in UNITS:
            raise ValueError(f"a unit must be one of {', '.join(UNITS)}, got {unit!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length}")
        self.data, self.tokenizer, self.unit, self.length = _opened(data), tokenizer, unit, length
        self.text_column = text_column
        first = next(iter(self.data), None)
        if first is None:
            raise ValueError("the corpus is empty")
        self.tokenised = "input_ids" in first
        if not self.tokenised and text_column not in first:
            raise ValueError(f"no column {text_column!r} or 'input_ids' in the corpus, only {', '.join(first)}")
        if not self.tokenised and tokenizer is None:
            raise ValueError("a corpus of texts needs a tokenizer: give models that have one, or `processing_class`")
        if not self.tokenised and unit == "chunks" and tokenizer.eos_token_id is None:
            raise ValueError("documents are packed with the end token between them, and the tokenizer has none")

    @property
    def packs(self) -> bool:
        """Whether its units are made here, of several rows."""
        return self.unit == "chunks" and not self.tokenised

    @property
    def count(self) -> int | None:
        """How many units there are; None where that is known only after reading them."""
        return None if self.packs or not isinstance(self.data, Dataset) else len(self.data)

    def facts(self) -> dict:
        """What tells it from another corpus: settings, and the content of some rows (of the first ones of a stream)."""
        if isinstance(self.data, Dataset):
            places = sorted({i * (len(self.data) - 1) // (PROBES - 1) for i in range(PROBES)})
            rows = (self.data[i] for i in places)
        else:
            rows = itertools.islice(iter(self.data), PROBES)
        sample = hashlib.sha256()
        for row in rows:
            sample.update(self._unit(row).content() + b"\n")
        return {
            "unit": self.unit,
            "length": self.length,
            "rows": len(self.data) if isinstance(self.data, Dataset) else None,
            "sample": sample.hexdigest()[:16],
            "packed_by": tokenizer_digest(self.tokenizer) if self.packs else None,
        }

    def shards(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, list[Unit]]]:
        """(number, how many units, the units if the number is wanted) of every shard of `size` units, in order."""
        if self.count is not None:
            for number, first in enumerate(range(0, self.count, size)):
                last = min(first + size, self.count)
                units = [self._unit(self.data[i]) for i in range(first, last)] if wanted(number) else []
                yield number, last - first, units
            return
        stream = self._packed() if self.packs else map(self._unit, self.data)
        for number in itertools.count():
            part = itertools.islice(stream, size)
            units = list(part) if wanted(number) else []
            found = len(units) or sum(1 for _ in part)
            if found:
                yield number, found, units
            if found < size:
                return

    def first(self, count: int = PROBES) -> list[Unit]:
        """The first units."""
        return next(self.shards(count, lambda number: number == 0), (0, 0, []))[2]

    def text(self, unit: Unit) -> str:
        """A unit as text; "" without a tokenizer to decode it."""
        if unit.text is not None or self.tokenizer is None:
            return unit.text or ""
        return self.tokenizer.decode(unit.ids)

    def _unit(self, row: dict) -> Unit:
        if self.tokenised:
            return Unit(np.asarray(row["input_ids"], dtype=np.int32), row)
        text = row[self.text_column]
        if not isinstance(text, str):
            raise ValueError(f"column {self.text_column!r} must hold texts, got {type(text).__name__}: {text!r:.80}")
        return Unit(None, row, text)

    def _packed(self) -> Iterator[Unit]:
        width, rest = self.length + 1, np.empty(0, np.int32)
        rows = iter(self.data)
        while texts := [self._unit(row).text for row in itertools.islice(rows, AT_ONCE)]:
            found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            end = [self.tokenizer.eos_token_id]
            rest = np.concatenate([rest, *(np.asarray(ids + end, np.int32) for ids in found if ids)])
            full = len(rest) // width * width
            yield from (Unit(chunk.copy()) for chunk in rest[:full].reshape(-1, width))
            rest = rest[full:]


def _opened(data):
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    if isinstance(data, Sequence) and all(isinstance(path, (str, os.PathLike)) for path in data):
        if missing := [str(path) for path in data if not Path(path).is_file()] or (["no path"] if not data else []):
            raise ValueError(f"no such text file: {', '.join(missing)}")
        files = [str(path) for path in data]
        return load_dataset("text", data_files=files, sample_by="paragraph", streaming=True, split="train")
    if not isinstance(data, (Dataset, IterableDataset)):
        raise ValueError(f"a corpus is a Dataset, an IterableDataset or text files, got {type(data).__name__}")
    return data


def content_of(units: list[Unit]) -> bytes:
    """16 bytes that only the units' content and order decide."""
    total = hashlib.blake2b(digest_size=16)
    for unit in units:
        total.update(hashlib.blake2b(unit.content(), digest_size=16).digest())
    return total.digest()
