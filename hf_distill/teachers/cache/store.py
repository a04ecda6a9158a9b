"""Bytes by key, in checksummed safetensors shards that are mapped into memory. Knows nothing of teachers.

A shard is one file `shard-<number>-<first 16 digits of its sha256>.safetensors`, written under another name, flushed to
disk and renamed: a file of that name is whole. Its tensors, for D documents:

    key (D, 16) uint8 · start (D + 1,) int64, byte offsets · crc (D,) int64, crc32 of each document's bytes · data uint8

Reading a document checks its own crc, opening a shard the crc of all that is not `data`; no shard is read as a whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hf_distill.teachers.cache.keys import KEY_BYTES

ALIGNMENT = 8
SHARD = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorruptCacheError(ValueError):
    """A file of a cache is missing, cut short or changed."""


# ---- writing --------------------------------------------------------------------------------------------------------
def write_file(path: Path, content: bytes, unfinished: str | None = None) -> None:
    """All of a file or nothing, flushed to disk; what a killed writer left is written over by the next.

    Args:
        unfinished: names it until it is whole; one writer per name.

    Raises:
        DiskFullError: it did not fit; nothing of it is left, what was finished before stays.
    """
    temporary = path.with_name(f".{unfinished or path.name}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        from hf_distill.training.saving import DiskFullError

        raise DiskFullError(
            errno.ENOSPC,
            f"{path.name} ({len(content) / 2**20:.0f} MiB) did not fit into {path.parent} ({error.strerror}). All "
            "finished shards are kept: free some space, then run the same command again",
        ) from error


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def checksummed_name(stem: str, content: bytes) -> str:
    return f"{stem}-{digest(content)}.safetensors"


def write_checksummed(folder: Path, stem: str, content: bytes) -> str:
    """Write `<stem>-<checksum>.safetensors`; returns its name."""
    name = checksummed_name(stem, content)
    write_file(folder / name, content, stem)
    return name


def write_shard(folder: Path, number: int, documents: list[tuple[bytes, bytes]]) -> str:
    """One shard of (key, bytes) pairs; returns its file's name. Bytes are padded to multiples of 8."""
    padded = [data + bytes(-len(data) % ALIGNMENT) for _, data in documents]
    tensors = {
        "key": _bytes(b"".join(key for key, _ in documents)).reshape(-1, KEY_BYTES),
        "start": torch.tensor([0, *np.cumsum([len(data) for data in padded]).tolist()], dtype=torch.int64),
        "crc": torch.tensor([zlib.crc32(data) for data in padded], dtype=torch.int64),
        "data": _bytes(b"".join(padded)),
    }
    return write_checksummed(folder, f"shard-{number:05d}", save(tensors))


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def shards_in(folder: Path) -> dict[int, Path]:
    """Shard number -> file."""
    matches = ((SHARD.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {int(match[1]): path for match, path in matches if match}


def stands(path: Path) -> bool:
    """Whether a file is there and its content has the checksum in its name."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16] == path.stem.rsplit("-", 1)[1]


# ---- reading --------------------------------------------------------------------------------------------------------
def _index_of(path: Path) -> tuple[dict, np.ndarray]:
    """Facts of a shard (file, bytes, documents, crc of header and index), and its keys (D,) as 16-byte strings."""
    try:
        with open(path, "rb") as file:
            length = file.read(8)
            crc = zlib.crc32(length + file.read(int.from_bytes(length, "little")))
        with safe_open(path, "pt") as tensors:
            index = {name: tensors.get_tensor(name).numpy() for name in ("key", "start", "crc")}
    except (OSError, OverflowError, MemoryError, SafetensorError) as error:
        raise CorruptCacheError(_damaged(path, str(error))) from error
    for array in index.values():
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    keys = np.frombuffer(index["key"].tobytes(), dtype=f"S{KEY_BYTES}")
    return {"file": path.name, "bytes": path.stat().st_size, "documents": len(keys), "index_crc": crc}, keys


def shard_facts(path: Path) -> dict:
    return _index_of(path)[0]


def _damaged(path: Path, how: str) -> str:
    return (
        f"{path} is damaged ({how}). Run the command or call that made this cache again: only the damaged shard is "
        "computed anew"
    )


class Store:
    """All shards of a folder, mapped into memory when first read.

    Args:
        facts: per shard, as `shard_facts` gave them when the cache was finished.

    Raises:
        CorruptCacheError: a shard is missing or its header or index changed.
    """

    def __init__(self, folder: Path, facts: list[dict]):
        self.paths = [folder / fact["file"] for fact in facts]
        keys = []
        for path, fact in zip(self.paths, facts, strict=True):
            if not path.is_file():
                raise CorruptCacheError(_damaged(path, "it is missing"))
            found, own = _index_of(path)
            if found != fact:
                raise CorruptCacheError(_damaged(path, f"now {found}, when it was finished {fact}"))
            keys.append(own)
        counts = [len(own) for own in keys]
        keys = np.concatenate(keys) if keys else np.zeros(0, f"S{KEY_BYTES}")
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
        self._entry = np.concatenate([np.arange(n, dtype=np.int32) for n in counts] or [np.zeros(0, np.int32)])[order]
        self._open: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a worker maps the files itself

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[bytes]:
        return [bytes(key).ljust(KEY_BYTES, b"\0") for key in self._keys]

    def read(self, key: bytes) -> list[Tensor]:
        """The bytes under a key, (n,) uint8 each; several where documents differ only in their loss rows.

        Raises:
            CorruptCacheError: they do not have the checksum they were written with.
        """
        wanted = np.array(key, dtype=self._keys.dtype)
        first, last = (np.searchsorted(self._keys, wanted, side) for side in ("left", "right"))
        return [self._read(int(self._shard[i]), int(self._entry[i])) for i in range(first, last)]

    def _read(self, shard: int, entry: int) -> Tensor:
        if shard not in self._open:
            with safe_open(self.paths[shard], "pt") as tensors:
                self._open[shard] = {name: tensors.get_tensor(name) for name in ("start", "crc", "data")}
        tensors = self._open[shard]
        begin, end = tensors["start"][entry : entry + 2].tolist()
        data = tensors["data"][begin:end]
        if zlib.crc32(data.numpy()) != tensors["crc"][entry]:
            raise CorruptCacheError(_damaged(self.paths[shard], f"document {entry} does not have its checksum"))
        return data


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptCacheError(f"{path} cannot be read ({error}): delete it and make the cache again") from error


def write_json(path: Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
