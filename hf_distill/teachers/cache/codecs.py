"""What a cache stores of a document's rows, one class per mode: from signals to bytes and back.

A document's bytes: row count (negative where positions have gaps: then all of them follow) and first position, int32,
then the mode's arrays, each padded to 8 bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_distill.signals import HeadLogits, Logits, SampledLogits, Signals, SparseLogits, upcast
from hf_distill.teachers.cache.keys import Document
from hf_distill.teachers.cache.sampling import draw, importance_weights
from hf_distill.teachers.cache.store import ALIGNMENT

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
INT8 = "int8"
TILE_BYTES = 2**28


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Hidden:
    """Mode "hidden": the rows that the teacher's head projects; the head itself is stored once for all.

    Attributes:
        width: H.
        dtype: of the rows, "int8" with one scale per row.
        computed: the dtype they were computed in, and are read as.
    """

    width: int
    dtype: str
    computed: str
    mode = "hidden"
    per = "token"

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden", "scale") if self.dtype == INT8 else ("hidden",)

    def rows(self, signals: Signals, documents: list[Document]) -> dict[str, Tensor]:
        hidden = signals.logits.hidden
        if self.dtype != INT8:
            return {"hidden": hidden.to(DTYPES[self.dtype]).cpu()}
        scale = hidden.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return {"hidden": (hidden.float() / scale).round().to(torch.int8).cpu(), "scale": scale.cpu()}

    def read(self, cursor: Cursor, n: int) -> dict[str, Tensor]:
        if self.dtype != INT8:
            return {"hidden": cursor.take(DTYPES[self.dtype], n, self.width)}
        return {
            "hidden": cursor.take(torch.int8, n, self.width),
            "scale": cursor.take(torch.float32, n, 1),
        }

    def logits(self, tensors: dict[str, Tensor], head: HeadLogits) -> Logits:
        hidden = tensors["hidden"]
        if self.dtype == INT8:
            hidden = hidden * tensors["scale"]
        return HeadLogits(hidden.to(DTYPES[self.computed]), head.weight, head.bias, head.scale, head.softcap)


@dataclass(frozen=True)
class FullLogits:
    """Mode "logits": all C logits of each row, for classifiers and other small vocabularies."""

    classes: int
    dtype: str
    mode = "logits"
    per = "token"
    names = ("logits",)

    def rows(self, signals: Signals, documents: list[Document]) -> dict[str, Tensor]:
        logits = signals.logits.dense() if isinstance(signals.logits, HeadLogits) else signals.logits
        return {"logits": logits.to(DTYPES[self.dtype]).cpu()}

    def read(self, cursor: Cursor, n: int) -> dict[str, Tensor]:
        return {"logits": cursor.take(DTYPES[self.dtype], n, self.classes)}

    def logits(self, tensors: dict[str, Tensor], head) -> Logits:
        return tensors["logits"]


@dataclass(frozen=True)
class TopK:
    """Mode "topk": the k most likely ids and their log-probabilities over the full vocabulary.

    The mass of all other ids is exact: float32 log-probabilities give it, and bfloat16 ones are stored beside the log
    of their sum before rounding.
    """

    vocabulary: int
    k: int
    temperature: float
    dtype: str
    mode = "topk"
    per = "token"
    names = ("ids", "log_probs")

    def rows(self, signals: Signals, documents: list[Document]) -> dict[str, Tensor]:
        if isinstance(signals.logits, SparseLogits):  # an endpoint's, likeliest first
            ids, log_probs = (x[:, : self.k].cpu() for x in (signals.logits.ids, signals.logits.log_probs))
        else:
            parts = [x.topk(self.k) for x in log_probs_in_tiles(signals.logits, self.temperature)]
            log_probs, ids = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
        out = {"ids": ids, "log_probs": log_probs.to(DTYPES[self.dtype])}
        return out if self._exact else out | {"log_mass": log_probs.float().logsumexp(-1, keepdim=True)}

    @property
    def _exact(self) -> bool:
        return self.dtype == "float32"

    def pack(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return rows | {"ids": pack_bits(rows["ids"].flatten(), bits_of(self.vocabulary))}

    def read(self, cursor: Cursor, n: int) -> dict[str, Tensor]:
        ids = cursor.take_ids(n * self.k, self.vocabulary).reshape(n, self.k)
        log_probs = cursor.take(DTYPES[self.dtype], n, self.k).float()
        if not self._exact:
            log_probs = log_probs + (cursor.take(torch.float32, n, 1) - log_probs.logsumexp(-1, keepdim=True))
        return {"ids": ids, "log_probs": log_probs}

    def logits(self, tensors: dict[str, Tensor], head) -> Logits:
        return SparseLogits(tensors["ids"], tensors["log_probs"], temperature=self.temperature)


@dataclass(frozen=True)
class Sampled:
    """Mode "sampled": ids drawn from p^alpha / Z, their counts and log-probabilities; the gradient is unbiased.

    Draws of a document are seeded by (seed, its key), so they do not depend on batches or processes.
    """

    vocabulary: int
    draws: int
    alpha: float
    temperature: float
    dtype: str
    seed: int
    mode = "sampled"
    per = "token"

    @property
    def names(self) -> tuple[str, ...]:
        return ("ids", "counts", "log_probs") + (() if self.alpha == 1.0 else ("log_z",))

    @property
    def _counts(self) -> torch.dtype:
        return torch.uint8 if self.draws < 2**8 else torch.int16

    def rows(self, signals: Signals, documents: list[Document]) -> dict[str, Tensor]:
        parts, begin = [], 0
        for document in documents:
            end = begin + len(document.positions)
            for log_probs in log_probs_in_tiles(signals.logits, self.temperature, begin, end):
                generator = torch.Generator(log_probs.device)
                generator.manual_seed(_seed_of(document.key, self.seed))
                parts.append(draw(log_probs, self.draws, self.alpha, generator))
            begin = end
        ids, counts, log_probs, log_z = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
        return {"ids": ids, "counts": counts, "log_probs": log_probs, "log_z": log_z}

    def pack(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = rows["counts"] > 0
        out = {
            "distinct": kept.sum(-1).to(self._counts),
            "ids": pack_bits(rows["ids"][kept], bits_of(self.vocabulary)),
            "counts": rows["counts"][kept].to(self._counts),
            "log_probs": rows["log_probs"][kept].to(DTYPES[self.dtype]),
        }
        return out if self.alpha == 1.0 else out | {"log_z": rows["log_z"].float()}

    def read(self, cursor: Cursor, n: int) -> dict[str, Tensor]:
        distinct = cursor.take(self._counts, n).long()
        total = int(distinct.sum())
        flat = {"ids": cursor.take_ids(total, self.vocabulary), "counts": cursor.take(self._counts, total).long()}
        flat["log_probs"] = cursor.take(DTYPES[self.dtype], total).float()
        kept = torch.arange(int(distinct.max()) if n else 0) < distinct[:, None]
        out = {name: _scattered(values, kept) for name, values in flat.items()}
        return out if self.alpha == 1.0 else out | {"log_z": cursor.take(torch.float32, n, 1)}

    def logits(self, tensors: dict[str, Tensor], head) -> Logits:
        log_probs, counts = tensors["log_probs"], tensors["counts"]
        weights = importance_weights(counts, log_probs, tensors.get("log_z"), self.draws, self.alpha)
        log_probs = log_probs.masked_fill(counts == 0, -torch.inf)
        return SampledLogits(tensors["ids"], weights, log_probs, self.temperature)


def _seed_of(key: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(key + str(seed).encode(), digest_size=7).digest(), "little")


@dataclass(frozen=True)
class Scores:
    """Mode "scores": named values per loss row ("token") or per document ("sample").

    Attributes:
        values: name -> (dtype, shape of one value).
    """

    values: dict[str, tuple[str, tuple[int, ...]]]
    per: str
    function: str
    mode = "scores"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))  # the manifest does not keep an order

    def rows(self, signals: Signals, documents: list[Document]) -> dict[str, Tensor]:
        kinds = {name: getattr(torch, self.values[name][0]) for name in self.names}
        return {name: signals.features[name].to(kind).cpu() for name, kind in kinds.items()}

    def read(self, cursor: Cursor, n: int) -> dict[str, Tensor]:
        n = n if self.per == "token" else min(n, 1)
        kinds = {name: self.values[name] for name in self.names}
        return {name: cursor.take(getattr(torch, kind), n, *shape) for name, (kind, shape) in kinds.items()}

    def logits(self, tensors: dict[str, Tensor], head) -> None:
        return None


Codec = Hidden | FullLogits | TopK | Sampled | Scores
MODES: dict[str, type] = {codec.mode: codec for codec in (Hidden, FullLogits, TopK, Sampled, Scores)}


def codec_to_json(codec: Codec) -> dict:
    return {"mode": codec.mode} | asdict(codec)


def codec_from_json(settings: dict) -> Codec:
    settings = dict(settings)
    return MODES[settings.pop("mode")](**settings)


# ---- a document's bytes ---------------------------------------------------------------------------------------------
def encode(codec: Codec, document: Document, rows: dict[str, Tensor]) -> bytes:
    """Bytes of one document from the rows that `codec.rows` gave for it."""
    positions = document.positions.to(torch.int32)
    n, first = len(positions), int(positions[0])
    gaps = bool((positions.diff() != 1).any())
    arrays = [torch.tensor([-n if gaps else n, first], dtype=torch.int32), *([positions] if gaps else [])]
    arrays += (codec.pack(rows) if hasattr(codec, "pack") else rows).values()
    return b"".join(_padded(array) for array in arrays)


def decode(codec: Codec, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions (n,) and tensors (n, ...) of one document, views of its bytes where nothing is unpacked."""
    cursor = Cursor(data)
    n, first = cursor.take(torch.int32, 2).tolist()
    positions = cursor.take(torch.int32, -n).long() if n < 0 else torch.arange(first, first + n)
    return positions, codec.read(cursor, abs(n))


def _padded(array: Tensor) -> bytes:
    content = array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content + bytes(-len(content) % ALIGNMENT)


class Cursor:
    """Takes arrays off a document's bytes one after another."""

    def __init__(self, data: Tensor):
        self.data, self.offset = data, 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        taken = self.data[self.offset : self.offset + size].view(dtype).reshape(shape)
        self.offset += size + -size % ALIGNMENT
        return taken

    def take_ids(self, count: int, vocabulary: int) -> Tensor:
        bits = bits_of(vocabulary)
        return unpack_bits(self.take(torch.uint8, math.ceil(count * bits / 8)), count, bits)


def bits_of(vocabulary: int) -> int:
    """Bits that hold every id."""
    return max(1, (vocabulary - 1).bit_length())


def pack_bits(ids: Tensor, bits: int) -> Tensor:
    """(n,) ids as (ceil(n · bits / 8),) bytes, least significant bit first."""
    content = torch.zeros(math.ceil(len(ids) * bits / 8) * 8, dtype=torch.uint8)
    content[: len(ids) * bits] = (ids[:, None] >> torch.arange(bits) & 1).flatten().to(torch.uint8)
    places = 1 << torch.arange(8, dtype=torch.uint8)
    return (content.reshape(-1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(content: Tensor, count: int, bits: int) -> Tensor:
    """The reverse of `pack_bits`: (count,) int64."""
    offset = torch.arange(count) * bits
    reach = (bits + 7 + 7) // 8  # bytes that an id can touch
    wide = torch.cat([content, content.new_zeros(reach)]).long()
    word = sum(wide[(offset >> 3) + i] << (8 * i) for i in range(reach))
    return word >> (offset & 7) & ((1 << bits) - 1)


def _scattered(values: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros(kept.shape, dtype=values.dtype).masked_scatter_(kept, values)


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several documents under each other; rows of draws are padded with zeros to one width."""
    out = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if len({column.shape[1:] for column in columns}) > 1:
            width = max(column.shape[1] for column in columns)
            columns = [torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in columns]
        out[name] = torch.cat(columns)
    return out


# ---- from signals ---------------------------------------------------------------------------------------------------
def log_probs_in_tiles(logits: Logits, temperature: float, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
    """Full log-probabilities (rows, V), a bounded number of rows at a time."""
    count, width = logits.shape
    end = count if end is None else end
    step = max(1, TILE_BYTES // (4 * width))
    for first in range(begin, end, step):
        rows = slice(first, min(first + step, end))
        tile = logits.tile(rows) if isinstance(logits, HeadLogits) else upcast(logits[rows])
        yield (tile / temperature).log_softmax(-1)
