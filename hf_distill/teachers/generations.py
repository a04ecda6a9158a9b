"""What a text teacher wrote, and the folder that keeps it: append-only, resumed, never paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hf_distill.teachers.cache.fingerprint import differences

FORMAT = 1


@dataclass(frozen=True)
class Generation:
    """One text by a teacher.

    Attributes:
        text: without special tokens, cut before the stop string.
        finish_reason: "stop" (end of sequence or a stop string) or "length" (cut at max_new_tokens: incomplete); an
            endpoint may have others ("content_filter").
        prompt_tokens, completion_tokens: how many; the end of sequence counts.
        token_ids: of the completion, the end of sequence included; empty where a teacher does not tell.
        log_probs: of the token_ids under the teacher's own distribution (temperature 1, no top-p), if asked for.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None


@dataclass(frozen=True)
class Request:
    """One text to write: `index` tells apart several of one prompt. The same request is the same text."""

    prompt: str | list[dict]
    index: int
    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop_strings: tuple[str, ...]
    log_probs: bool
    response_schema: dict | None = None

    def facts(self) -> dict:
        """Its entries; no schema is no entry."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("response_schema", None)}

    def key(self, fingerprint: dict | None) -> str:
        return hashlib.sha256(_canonical([FORMAT, fingerprint, self.facts()]).encode()).hexdigest()


class GenerationStore:
    """A folder with one teacher's generations: `teacher.json` says whose, `generations-<rank>.jsonl` hold a line each.

    Every process appends to the file of its own rank and reads all of them when it opens the folder. A line that a kill
    left unfinished is dropped.

    Args:
        folder: made if it does not exist. `datasets.load_dataset("json", data_files=folder + "/*.jsonl")` reads it.
        teacher: the teacher's fingerprint, plain JSON values.

    Raises:
        ValueError: the folder is another teacher's, or a line in it is broken.
    """

    def __init__(self, folder: str | os.PathLike, teacher: dict):
        self.folder, self.teacher = Path(folder), json.loads(json.dumps(teacher))
        self.folder.mkdir(parents=True, exist_ok=True)
        check_owner(self.folder, "generations-*.jsonl", {"format": FORMAT, **self.teacher})
        self._own = self.folder / f"generations-{int(os.environ.get('RANK', 0)):05d}.jsonl"
        self._known: dict[str, Generation] = {}
        for path in sorted(self.folder.glob("generations-*.jsonl")):
            for line in lines_of(path):
                self._known.setdefault(line["key"], _generation(line))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Generation | None:
        return self._known.get(key)

    def add(self, answers: Iterable[tuple[str, Request, Generation]]) -> None:
        """Written to the disk before it returns."""
        with open(self._own, "a+b") as file:
            drop_unfinished_line(file)
            for key, request, generation in answers:
                self._known[key] = generation
                line = {"key": key} | request.facts() | asdict(generation) | {"log_probs": generation.log_probs}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def check_owner(folder: Path, pattern: str, facts: dict) -> None:
    """What lies in the folder is this teacher's; `teacher.json` says so from now on.

    Raises:
        ValueError: it is another teacher's, or no one's.
    """
    path = folder / "teacher.json"
    if not path.exists():
        if any(folder.glob(pattern)):
            raise ValueError(f"{folder} holds answers but no teacher.json that says whose; give a new folder")
        write_whole(path, facts)
        return
    changed = differences(json.loads(path.read_text()), json.loads(json.dumps(facts)))
    if changed:
        raise ValueError(
            f"the answers in {folder} are another teacher's, give another folder or that teacher:\n  "
            + "\n  ".join(changed)
        )


def write_whole(path: Path, facts: dict) -> None:
    """All of a JSON file or nothing; several processes may write the same."""
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(facts, indent=1))
    os.replace(scratch, path)


def lines_of(path: Path) -> Iterator[dict]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # a kill cut it off
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is broken ({error}): delete that line") from error


def drop_unfinished_line(file) -> None:
    """Cut the file after its last line end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        end = start + found + 1 if found >= 0 else start
        if found >= 0:
            break
    file.truncate(end)


def _generation(line: dict) -> Generation:
    return Generation(**{f.name: line[f.name] for f in fields(Generation)})


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


__all__ = ["Generation", "GenerationStore", "Request"]
