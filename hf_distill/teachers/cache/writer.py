"""Runs a teacher once over a dataset and keeps what it says.

Shard i holds the examples [i · shard_examples, (i + 1) · shard_examples) and is computed by rank i mod ranks, in
batches of its own: a cache does not depend on how many processes wrote it, or how often they were killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache import store
from hf_distill.teachers.cache.card import write_card
from hf_distill.teachers.cache.codecs import MODES, Codec, Hidden, codec_to_json, encode
from hf_distill.teachers.cache.fingerprint import differences, teacher_fingerprint, tokenizer_fingerprint
from hf_distill.teachers.cache.settings import ScoreFunction, codec_for, label_log_probs
from hf_distill.teachers.cache.source import Source, source_of
from hf_distill.teachers.cached import FORMAT, MANIFEST, TEACHER, CachedTeacher
from hf_distill.teachers.remote import RemoteTeacher

logger = logging.getLogger(__name__)

PROBES = 32
SHARED_LOCK = ".lock"
COMPARED = ("format", "codec", "labels_of", "positions", "teacher", "tokenizer", "data", "head")


def cache_teacher(
    teacher: Teacher,
    data,
    path: str | Path,
    *,
    mode: str = "hidden",
    collator=None,
    processing_class=None,
    k: int = 64,
    draws: int = 50,
    alpha: float = 1.0,
    temperature: float = 1.0,
    dtype: str = "auto",
    seed: int = 0,
    scores: ScoreFunction | None = None,
    needs: frozenset[str] = frozenset({"logits"}),
    per: str = "token",
    positions: str = "loss",
    batch_size: int = 8,
    shard_examples: int = 128,
    num_workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
) -> CachedTeacher | None:
    """Run `teacher` once over `data` and keep what it says in the folder `path`.

    Call it again after a kill: finished shards stay, damaged ones are computed anew. Under `accelerate launch` each
    rank writes its own shards; the teacher is copied to each device, not sharded.

    Args:
        data: a trainer (its training and evaluation data and its collator are taken), a dataset with a length, or a
            list of datasets.
        mode: "hidden" (rows before the head; exact for every divergence and temperature), "topk", "sampled" (unbiased
            gradient, smallest), "logits" (all of them: classifiers), "scores" (named values of `scores`).
        collator: DataCollatorForDistillation as in training, or one to wrap; not with a trainer.
        processing_class: what tokenised the data, to tell changes; None takes the trainer's or the teacher's.
        k: ids of "topk".
        draws, alpha, seed: of "sampled", see `sample_logits`.
        temperature: of the softmax of "topk" and "sampled"; the divergence must use the same.
        dtype: of stored floats. "auto": as computed, float32 for log-probabilities; bfloat16, float32, float16; "int8"
            for "hidden", with a scale per row.
        scores: signals -> {name: values}; `label_log_probs` where None.
        needs: what the score function reads of the teacher.
        per: scores are given per "token" (N, ...) or per "sample" (D, ...).
        positions: "loss" stores rows that carry loss now; "all" those of every token (causal language models).
        shard_examples: examples per shard: what a kill can cost at most, per process.
        rank, world_size: for processes that are not torch.distributed's.

    Returns:
        The finished cache; None where ranks without torch.distributed have not all finished.

    Raises:
        ValueError: settings that do not fit; a folder that holds something else or another cache, saying what differs;
            another process is writing.
        DiskFullError: nothing that was finished is lost.
    """
    state = PartialState()
    rank = state.process_index if rank is None else rank
    world_size = state.num_processes if world_size is None else world_size
    if isinstance(teacher, CachedTeacher):
        raise ValueError(f"{teacher.path} is a cache already: name the teacher it was made from")
    if teacher.learns:
        raise ValueError(f"{teacher.name} changes while the student trains: what it says cannot be cached")
    source = source_of(teacher, data, collator, positions, processing_class)
    if not source.placed:
        teacher.prepare(state)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if shard_examples < 1 or batch_size < 1:
        raise ValueError(f"shard_examples and batch_size must be at least 1, got {shard_examples} and {batch_size}")
    scores = (scores or label_log_probs) if mode == "scores" else None
    if scores and isinstance(teacher, RemoteTeacher):
        raise ValueError(f"{teacher.name} tells its top-k alone: mode must be topk, got {mode!r}")
    run = _Run(teacher, source, Path(path), needs if scores else frozenset({"logits"}), scores, state.device)
    probe = run.probe()
    options = dict(k=k, draws=draws, alpha=alpha, temperature=temperature, dtype=dtype, seed=seed, per=per)
    run.codec = codec_for(mode, probe, scores, teacher.vocabulary_size(), **options)
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.folder / f".lock-{rank}", timeout=0):
            with FileLock(run.folder / SHARED_LOCK):
                run.begin(probe, shard_examples)
            run.write(rank, world_size, batch_size, num_workers)
            complete = run.finish()
    except Timeout as error:
        message = f"another process is writing the cache {path}: wait for it, or choose another folder"
        raise ValueError(message) from error
    state.wait_for_everyone()
    return CachedTeacher(path) if complete or state.num_processes > 1 else None


def _head_content(logits: HeadLogits) -> bytes:
    tensors = {"weight": logits.weight, "bias": logits.bias}
    return save({name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None})


def _stands(shard: Path | None) -> bool:
    """Whether a shard need not be computed; a damaged one is removed."""
    if shard is None or store.stands(shard):
        return shard is not None
    logger.warning("%s is damaged and will be computed anew", shard)
    shard.unlink()
    return False


# ---- writing ---------------------------------------------------------------------------------------------------------
class _Run:
    """One process's part of writing a cache."""

    def __init__(self, teacher: Teacher, source: Source, folder: Path, needs: frozenset[str], scores, device):
        self.teacher, self.source, self.folder = teacher, source, folder
        self.needs, self.scores, self.device = needs, scores, device
        self.codec: Codec | None = None
        self.manifest: dict = {}

    def says(self, batch: dict) -> Signals:
        moved = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        signals = self.teacher(moved, self.needs)
        return signals if self.scores is None else replace(signals, features=self.scores(signals))

    def probe(self) -> Signals:
        """What the teacher says of the first example with a document: sizes, dtypes, and the head."""
        self.teacher.check()
        for i in range(len(self.source.dataset)):
            batch, documents = self.source.collate([self.source.dataset[i]])
            if documents:
                return self.says(batch)
        raise ValueError("no example has a label that is not masked: there is nothing to cache")

    def _data(self, shard_examples: int) -> dict:
        """How many examples, and the keys of some: data that changed between two calls are found out."""
        count = len(self.source.dataset)
        places = sorted({i * (count - 1) // max(PROBES - 1, 1) for i in range(PROBES)})
        keys = [d.key.hex() for i in places for d in self.source.collate([self.source.dataset[i]])[1]]
        return {"examples": count, "shard_examples": shard_examples, "sample": store.digest("".join(keys).encode())}

    def begin(self, probe: Signals, shard_examples: int) -> None:
        """The manifest without shards, or the comparison with the one that is there; head, config and tokenizer."""
        logits = probe.logits
        head = content = None
        if isinstance(self.codec, Hidden):
            content = _head_content(logits)
            head = {"file": store.checksummed_name("head", content), "scale": logits.scale, "softcap": logits.softcap}
        manifest = {
            "format": FORMAT,
            "codec": codec_to_json(self.codec),
            "labels_of": self.source.collate.collator.labels_of,
            "positions": "all" if self.source.collate.every_position else "loss",
            "name": self.teacher.name,
            "teacher": teacher_fingerprint(self.teacher),
            "described": self.teacher.describe(),
            "tokenizer": tokenizer_fingerprint(self.source.processing_class),
            "vocabulary": self.teacher.vocabulary_size(),
            "data": self._data(shard_examples),
            "head": head,
            "prepared": self.source.prepared,
            "shards": None,
        }
        manifest["mark"] = store.digest(json.dumps([manifest["teacher"], manifest["codec"]]).encode())[:8]
        self.manifest = json.loads(json.dumps(manifest))
        path = self.folder / MANIFEST
        if path.is_file():
            old = store.read_json(path)
            changed = differences(*({name: m.get(name) for name in COMPARED} for m in (old, self.manifest)))
            if changed:
                raise ValueError(f"{self.folder} holds another cache: {'; '.join(changed)}. Choose another folder")
        else:
            others = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
            if others:
                shown = ", ".join(sorted(others)[:3])
                raise ValueError(f"{self.folder} holds other files ({shown}): choose an empty one")
            store.write_json(path, self.manifest)
        if head is not None and not store.stands(self.folder / head["file"]):
            store.write_file(self.folder / head["file"], content, "head")
        for part in (self.teacher.config, self.teacher.tokenizer):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(self.folder / TEACHER)

    @property
    def shards(self) -> list[range]:
        size, count = self.manifest["data"]["shard_examples"], len(self.source.dataset)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def write(self, rank: int, world_size: int, batch_size: int, num_workers: int) -> None:
        there = store.shards_in(self.folder)
        todo = [i for i in range(rank, len(self.shards), world_size) if not _stands(there.get(i))]
        batches = [
            (shard, list(examples[first : first + batch_size]))
            for shard, examples in ((i, self.shards[i]) for i in todo)
            for first in range(0, len(examples), batch_size)
        ]
        loader = DataLoader(
            self.source.dataset,
            batch_sampler=[indices for _, indices in batches],
            collate_fn=self.source.collate,
            num_workers=num_workers,
        )
        progress = tqdm(total=len(batches), desc=f"caching {self.teacher.name}", disable=rank != 0 or not batches)
        documents: list[tuple[bytes, bytes]] = []
        with progress:
            for i, ((shard, _), (batch, found)) in enumerate(zip(batches, loader, strict=True)):
                documents += self._encoded(batch, found)
                if i + 1 == len(batches) or batches[i + 1][0] != shard:
                    store.write_shard(self.folder, shard, documents)
                    documents = []
                progress.update()

    def _encoded(self, batch: dict, documents: list) -> Iterator[tuple[bytes, bytes]]:
        if not documents:
            return
        rows = self.codec.rows(self.says(batch), documents)
        begin = 0
        for i, document in enumerate(documents):
            end = begin + len(document.positions)
            own = slice(begin, end) if self.codec.per == "token" else slice(i, i + 1)
            yield document.key, encode(self.codec, document, {name: values[own] for name, values in rows.items()})
            begin = end

    def finish(self) -> bool:
        """The last process to finish completes the manifest."""
        with FileLock(self.folder / SHARED_LOCK):
            shards, head = store.shards_in(self.folder), self.manifest["head"]
            if len(shards) < len(self.shards) or (head and not (self.folder / head["file"]).is_file()):
                return False
            self.manifest["shards"] = [store.shard_facts(shards[i]) for i in range(len(self.shards))]
            write_card(self.folder, self.manifest)
            store.write_json(self.folder / MANIFEST, self.manifest)
        return True
