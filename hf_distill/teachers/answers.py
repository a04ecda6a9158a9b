"""What an endpoint said of texts: a folder that only grows, is read by place, and is shared by all ranks of a run."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from hf_distill.teachers.generations import check_owner, drop_unfinished_line

FORMAT = 1
START = b'{"key": "'
KEY_CHARACTERS = 32


class AnswerStore:
    """Bytes by key: `teacher.json` says whose, `answers-<rank>.jsonl` hold a line each.

    Every process appends to the file of its own rank and finds what the others have written. A line that a kill left
    unfinished is dropped.

    Args:
        folder: made if it does not exist.
        teacher: the teacher's fingerprint, plain JSON values.

    Raises:
        ValueError: the folder is another teacher's.
    """

    def __init__(self, folder: str | os.PathLike, teacher: dict):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_owner(self.folder, "answers-*.jsonl", {"format": FORMAT, **teacher})
        self._own = self.folder / f"answers-{int(os.environ.get('RANK', 0)):05d}.jsonl"
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._read: dict[Path, int] = {}  # bytes of each file that are known
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Find what was written since, by any process."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            begin = self._read.get(path, 0)
            if path.stat().st_size == begin:
                continue
            with open(path, "rb") as file:
                file.seek(begin)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # a kill cut it off, or it is being written
                    if not line.startswith(START):
                        raise ValueError(f"{path} is broken at byte {begin}: delete that line, or the file")
                    key = bytes.fromhex(line[len(START) : len(START) + KEY_CHARACTERS].decode())
                    self._places[key] = (path, begin)
                    begin += len(line)
            self._read[path] = begin

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Tensor:
        """The bytes (n,) uint8 under a key that is there."""
        path, begin = self._places[key]
        with open(path, "rb") as file:
            file.seek(begin)
            line = json.loads(file.readline())
        return torch.frombuffer(bytearray(base64.b64decode(line["data"])), dtype=torch.uint8)

    def add(self, answers: Iterable[tuple[bytes, bytes]]) -> None:
        """Written to the disk before it returns."""
        with open(self._own, "a+b") as file:
            drop_unfinished_line(file)
            for key, data in answers:
                line = {"key": key.hex(), "data": base64.b64encode(data).decode()}
                file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()


__all__ = ["AnswerStore"]
