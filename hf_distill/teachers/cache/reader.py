"""Looks up, in the collator, what the cache holds of a batch's documents; runs in the data loader's workers."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_distill.teachers.base import teacher_batch
from hf_distill.teachers.cache.codecs import Codec, Cursor, Scores, decode, join
from hf_distill.teachers.cache.fingerprint import differences, tokenizer_fingerprint
from hf_distill.teachers.cache.keys import Document, documents_of
from hf_distill.teachers.cache.store import Store

CACHED = "cached_"


class MissingFromCacheError(ValueError):
    """A document or position that no one cached."""


class CacheReader:
    """`reader(batch, features, labels_of)` gives the batch's `cached_` entries.

    Attributes:
        keys: those of the batch, by the codec's names: `cached_<name>` for scores, else with the cache's own mark
            between, so that several cached teachers can stand side by side.
        per: "token": an entry per loss row (per sample without rows); "sample": per document with loss rows.
        temperature: the one that the stored log-probabilities have; None where any will do.
    """

    def __init__(self, store: Store, codec: Codec, manifest: dict, path: str):
        self.store, self.codec, self.manifest, self.path = store, codec, manifest, path
        mark = "" if isinstance(codec, Scores) else manifest["mark"] + "_"
        self.keys = {name: f"{CACHED}{mark}{name}" for name in codec.names}
        self.per = codec.per
        self.temperature: float | None = getattr(codec, "temperature", None)
        self.changed: list[str] = []

    def compare(self, prepared: dict, processing_class) -> None:
        """Note what a run has otherwise than when the cache was made, for messages about what is missing.

        Args:
            prepared: the run's `prepared_by`.
        """
        then = self.manifest["prepared"]
        self.changed = differences(then, {name: prepared.get(name) for name in then})
        self.changed += differences(self.manifest["tokenizer"], tokenizer_fingerprint(processing_class))

    def __call__(self, batch: dict, features: list[dict], labels_of: str) -> dict[str, Tensor]:
        own = teacher_batch(batch)
        documents = documents_of(own, features, labels_of)
        parts = [self._rows(document, own) for document in documents]
        if not parts:
            parts = [self.codec.read(Cursor(torch.zeros(0, dtype=torch.uint8)), 0)]
        tensors = join(parts)
        return {key: tensors[name] for name, key in self.keys.items()}

    def _rows(self, document: Document, batch: dict) -> dict[str, Tensor]:
        found = self.store.read(document.key)
        for data in found:
            positions, tensors = decode(self.codec, data)
            if torch.equal(positions, document.positions):
                return tensors
            place = torch.searchsorted(positions, document.positions).clamp(max=len(positions) - 1)
            if self.per == "token" and torch.equal(positions[place], document.positions):
                return {name: tensor[place] for name, tensor in tensors.items()}
        raise MissingFromCacheError(self._message(document, batch, known=bool(found)))

    def _message(self, document: Document, batch: dict, known: bool) -> str:
        which = f"example {document.example} of a batch"
        if document.length:
            which += f" ({document.length} tokens)"
        changed = "; ".join(self.changed)
        if known:
            return (
                f"{which} is in the cache {self.path}, but not all of its loss positions are: labels are masked "
                "otherwise than when it was cached (completion_only_loss, assistant_only_loss, the prompt's end)"
                + (f". Different now: {changed}" if changed else "")
                + ". Make the cache with these settings, or with positions='all'"
            )
        if document.length and not any(name.startswith("pixel") for name in batch):
            reasons = (
                "the data changed, it was tokenised otherwise (tokenizer, chat template), cut at another max_length, "
                "packed by a strategy that cuts documents elsewhere (use bfd, or cache what is packed), or masked at "
                "random"
            )
        else:
            reasons = (
                "the data changed, the processor prepares it otherwise, or an augmentation draws something else: seed "
                "it per example (hf_distill.curricula.SeededAugmentation) and cache with that seed, or leave it off"
            )
        return (
            f"{which} is not in the cache {self.path}: {reasons}."
            + (f" Different now: {changed}." if changed else "")
            + " Make the cache from the data that this run sees"
        )
