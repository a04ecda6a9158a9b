"""How likely a language model finds each piece of a corpus: streamed once, kept in shards, never computed twice.

The corpus is read in its order, shard by shard; every process scores every so-many-th shard and writes it at once, so a
kill costs each process one shard, and memory does not grow with the corpus. A finished score is 16 bytes per unit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from hf_distill.curricula.collators import loss_rows
from hf_distill.curricula.corpus import Corpus, Unit, content_of
from hf_distill.heads import labels_are_shifted
from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache.fingerprint import teacher_fingerprint, tokenizer_digest
from hf_distill.teachers.cache.store import digest, read_json, write_file, write_json

logger = logging.getLogger(__name__)

PER = ("token", "character")
FORMAT = 1
FACTS, COMPLETE = "model.json", "complete.json"


@dataclass(frozen=True)
class Scores:
    """What one model says of a corpus.

    Attributes:
        sums: (n,) float64, -log p of each unit in nats; inf where the model gives it probability 0.
        counts: (n,) int64, how many tokens were predicted, or characters; 0 where there was nothing to predict.
        content: per shard, the digest of its units.
        done: by this process in this call: units, tokens (inputs read), seconds, tokens_per_second; zeros if all stood.
    """

    sums: Tensor
    counts: Tensor
    content: tuple[str, ...]
    done: dict

    def losses(self, reduction: str = "mean") -> Tensor:
        """(n,) float64 means (or sums) per unit; nan where there was nothing to predict."""
        values = self.sums if reduction == "sum" else self.sums / self.counts.clamp(min=1)
        return values.where(self.counts > 0, torch.nan)


def score(
    teacher: Teacher,
    corpus: Corpus,
    folder: str | os.PathLike,
    *,
    per: str = "token",
    batch_size: int = 8,
    shard_units: int = 512,
    tile_megabytes: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Scores | None:
    """-log p of every unit of a corpus under a model; what stands in `folder` already is not computed again.

    Each model and corpus has a folder of its own in there, named by its key: weights, dtype, bits, tokenizer, the
    corpus and its layout. Call it again after a kill, on as many processes as you like.

    Args:
        teacher: any that gives logits of a causal language model; it is copied to each device, not sharded.
        per: "token" counts tokens; chunks and documents begin with an input that nothing predicts. "character" counts
            characters of whole documents, each read after a start token, so that models with different tokenizers
            predict the same text.
        batch_size: windows per forward.
        shard_units: units per shard: what is in memory, and what a kill costs each process.
        tile_megabytes: of logits at once, see `losses.run_terms`; a memory knob only.
        rank, world_size: for processes that are not torch.distributed's.

    Returns:
        All scores, the same on every process; None where other ranks without torch.distributed have not finished.

    Raises:
        ValueError: settings or models that do not fit; ids outside the vocabulary; another process is writing.
        FloatingPointError: the model says NaN of a unit.
    """
    state = PartialState()
    own = state.process_index if rank is None else rank
    world = state.num_processes if world_size is None else world_size
    scorer = _Scorer(teacher, corpus, per, batch_size, tile_megabytes, state)
    if shard_units < 1:
        raise ValueError(f"shard_units must be at least 1, got {shard_units}")
    facts = scorer.facts() | {"shard_units": shard_units}
    key = digest(json.dumps(facts, sort_keys=True, default=str).encode())
    place = Path(folder) / f"{_file_name(teacher.name)}-{key}"
    place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / f".lock-{own}", timeout=0):
            if own == 0:
                write_json(place / FACTS, {"name": teacher.name, "described": teacher.describe()} | facts)
            done = _write(scorer, corpus, place, shard_units, own, world)
    except Timeout as error:
        raise ValueError(f"another process is writing {place}: wait for it, or give another folder") from error
    state.wait_for_everyone()
    found = _read_all(place)
    if found is None and world_size is None:
        raise ValueError(f"not all shards are in {place}: the folder must be on a disk that all processes see")
    return None if found is None else Scores(*found, done)


def _write(scorer: _Scorer, corpus: Corpus, place: Path, size: int, rank: int, world: int) -> dict:
    """Score this rank's share of what is missing, and say how many units there are."""
    begin, units, tokens = time.perf_counter(), 0, 0
    if (place / COMPLETE).is_file() and _read_all(place) is not None:
        return {"units": 0, "tokens": 0, "seconds": 0.0, "tokens_per_second": 0.0}
    numbers = (int(path.stem.removeprefix("shard-")) for path in place.glob("shard-*.safetensors"))
    standing = {number for number in numbers if _read(_shard(place, number)) is not None}
    if standing:
        logger.info("scores by %s go on: %d shards stand", scorer.teacher.name, len(standing))
    count = 0
    with tqdm(total=corpus.count, unit="unit", desc=f"scoring by {scorer.teacher.name}", disable=rank != 0) as bar:
        for number, found, wanted in corpus.shards(size, lambda i: i % world == rank and i not in standing):
            count += found
            if wanted:
                sums, counts, read = scorer(wanted, count - found)
                content = torch.frombuffer(bytearray(content_of(wanted)), dtype=torch.uint8)
                write_file(_shard(place, number), save({"sum": sums, "count": counts, "content": content}))
                units, tokens = units + found, tokens + read
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - begin):,.0f} tokens/s")
            bar.update(found)
    total = {"units": count, "shards": -(-count // size)}
    write_file(place / COMPLETE, json.dumps(total).encode(), f"complete-{rank}")
    seconds = time.perf_counter() - begin
    return {"units": units, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


class _Scorer:
    """(units, number of the first) -> their -log p, how many were predicted, and tokens read."""

    def __init__(
        self, teacher: Teacher, corpus: Corpus, per: str, batch_size: int, tile: int | None, state: PartialState
    ):
        if per not in PER:
            raise ValueError(f"scores are per {' or '.join(PER)}, got {per!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if teacher.learns or "logits" not in teacher.gives:
            raise ValueError(
                f"{teacher.name} cannot score a corpus: it learns, or gives no logits. Use a FrozenTeacher"
            )
        model = getattr(teacher, "model", None)
        if model is not None and not labels_are_shifted(model):
            raise ValueError(f"{teacher.name} is no causal language model, so it gives no probability of a text")
        self.teacher, self.corpus, self.per, self.batch_size = teacher, corpus, per, batch_size
        self.tile_bytes = None if tile is None else tile * 2**20
        self.device, self.tokenizer = state.device, teacher.tokenizer or corpus.tokenizer
        self.start: list[int] = []
        if per == "character":
            self.start = [_start_token(corpus, self.tokenizer, teacher.name)]
        # tokens that were chosen before may hold padding; a text's own tokens do not
        from_texts = corpus.unit == "documents" and not corpus.tokenised
        self.pad = None if from_texts else getattr(self.tokenizer, "pad_token_id", None)
        self.end = getattr(self.tokenizer, "eos_token_id", None)
        teacher.check()
        teacher.prepare(state)

    def facts(self) -> dict:
        return {
            "format": FORMAT,
            "model": teacher_fingerprint(self.teacher),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "per": self.per,
            "corpus": self.corpus.facts(),
        }

    def __call__(self, units: list[Unit], first: int) -> tuple[Tensor, Tensor, int]:
        ids = self._ids(units)
        sums, counts = torch.zeros(len(units), dtype=torch.float64), torch.zeros(len(units), dtype=torch.int64)
        windows = [(i, w) for i, all_ids in enumerate(ids) for w in self._windows(all_ids)]
        windows.sort(key=lambda pair: -len(pair[1]))  # of one length as far as possible: little padding
        for begin in range(0, len(windows), self.batch_size):
            part = windows[begin : begin + self.batch_size]
            values, rows = self._losses([window for _, window in part])
            if values.isnan().any():
                unit = part[int(rows[values.isnan()][0])][0]
                raise FloatingPointError(f"{self.teacher.name} says NaN of unit {first + unit}: look at its weights")
            unit = torch.tensor([i for i, _ in part])[rows]
            sums.index_add_(0, unit, values)
            counts.index_add_(0, unit, torch.ones_like(unit))
        read = sum(len(window) - 1 for _, window in windows)
        if self.per == "character":
            counts = torch.tensor([len(unit.text) for unit in units]) * (counts > 0)
        return sums, counts, read

    def _ids(self, units: list[Unit]) -> list[np.ndarray]:
        texts = [unit.text for unit in units if unit.text is not None]
        made = iter(
            self.tokenizer(texts, add_special_tokens=not self.start, verbose=False)["input_ids"] if texts else ()
        )
        ids = [u.ids if u.text is None else np.asarray(self.start + next(made), dtype=np.int32) for u in units]
        size = self.teacher.vocabulary_size()
        highest = max((int(x.max()) for x in ids if len(x)), default=0)
        if size is not None and highest >= size:
            raise ValueError(
                f"the corpus holds token id {highest}, but {self.teacher.name} has only {size}: it was tokenised for "
                "another model. Give texts, or ids of this model's tokenizer"
            )
        return ids

    def _windows(self, ids: np.ndarray) -> list[np.ndarray]:
        """Each begins with the last token of the one before, so every token but the first is predicted once."""
        return [ids[a : a + self.corpus.length + 1] for a in range(0, len(ids) - 1, self.corpus.length)]

    def _losses(self, windows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """-log p (N,) float64 of what is predicted, and (N,) the window of each."""
        width = max(map(len, windows)) - 1
        inputs, labels = torch.zeros(len(windows), width, dtype=torch.int64), torch.full((len(windows), width), -100)
        mask = torch.zeros_like(inputs)
        for row, window in enumerate(windows):
            tokens, length = torch.from_numpy(window.astype(np.int64)), len(window) - 1
            inputs[row, :length], labels[row, :length], mask[row, :length] = tokens[:-1], tokens[1:], 1
        if self.pad is not None:  # Paper: by the input alone, so that the padding after a text's last token counts once
            labels[inputs == self.pad] = -100
            if self.pad != self.end:
                labels[labels == self.pad], mask[inputs == self.pad] = -100, 0
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels} | loss_rows(labels, shift=False)
        if not len(batch["loss_rows"]):
            return torch.empty(0, dtype=torch.float64), batch["loss_rows"]
        signals = self.teacher({name: value.to(self.device) for name, value in batch.items()}, frozenset({"logits"}))
        terms, options = {"nll": LabelCrossEntropy()}, {"labels": signals.labels, "tile_bytes": self.tile_bytes}
        values = observe(signals.logits, None, terms, **options)["nll"]
        return values.cpu().double(), batch["document_example"][batch["row_document"]]


def _start_token(corpus: Corpus, tokenizer, name: str) -> int:
    if corpus.unit != "documents" or corpus.tokenised:
        raise ValueError('scores per character need documents that are texts: unit="documents", without input_ids')
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which scores per character need")
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise ValueError(f"the tokenizer of {name} has neither a first nor an end token for a document to begin with")
    return found


def _shard(place: Path, number: int) -> Path:
    return place / f"shard-{number:06d}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """None where there is no such shard, or it is damaged: it is then computed anew."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and will be computed anew", path, error)
        return None


def _read_all(place: Path) -> tuple[Tensor, Tensor, tuple[str, ...]] | None:
    if not (place / COMPLETE).is_file():
        return None
    parts = [_read(_shard(place, i)) for i in range(read_json(place / COMPLETE)["shards"])]
    if not parts or None in parts:
        return None
    content = tuple(bytes(part["content"].tolist()).hex() for part in parts)
    return torch.cat([p["sum"] for p in parts]), torch.cat([p["count"] for p in parts]), content


def _file_name(name: str) -> str:
    last = os.path.basename(os.path.normpath(name)) or "model"
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last)[:60]


# ---- what is kept ----------------------------------------------------------------------------------------------------
def write_units(
    corpus: Corpus,
    kept: Tensor,
    path: str | os.PathLike,
    *,
    content: Sequence[str],
    shard_units: int,
    shown: Collection[int] = (),
    card: str = "",
) -> dict[int, str]:
    """Read the corpus once more and save what is kept, as `datasets.load_from_disk` reads it: all of it or nothing.

    Args:
        kept: (k,) int64, ascending.
        path: a folder; what it held is replaced.
        content: of the scores, and their `shard_units`: what is written is what was scored.
        shown: units whose text to give back, kept or not.
        card: README.md of the data set.

    Raises:
        ValueError: the corpus has changed since it was scored.
    """
    path, shown, texts = Path(path), set(shown), {}
    keep = torch.zeros(shard_units * len(content), dtype=torch.bool)
    keep[kept] = True
    needed = {i // shard_units for i in shown} | set((kept // shard_units).unique().tolist())

    def rows() -> Iterator[dict]:
        for number, _, units in corpus.shards(shard_units, needed.__contains__):
            first = number * shard_units
            if units and content_of(units).hex() != content[number]:
                raise ValueError(
                    f"units {first} to {first + len(units) - 1} of the corpus are not those that were scored: give the "
                    "same data in the same order, or score it anew in another folder"
                )
            for i, unit in enumerate(units, first):
                if i in shown:
                    texts[i] = corpus.text(unit)
                if keep[i]:
                    yield {"input_ids": unit.ids} if corpus.packs else unit.row

    features = Features({"input_ids": List(Value("int32"))}) if corpus.packs else corpus.data.features
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        # the name stands for a hash of what cannot be hashed, in a cache of its own
        made = Dataset.from_generator(rows, features=features, cache_dir=str(unfinished), fingerprint="kept")
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    made.save_to_disk(str(unfinished / path.name))
    if card:
        (unfinished / path.name / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished / path.name, path)
    shutil.rmtree(unfinished, ignore_errors=True)
    return texts
