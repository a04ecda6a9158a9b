"""The teacher out of the training step: its answers are read from a folder, its weights are never loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hf_distill.heads import rows_of
from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache.codecs import Hidden, Scores, codec_from_json
from hf_distill.teachers.cache.fingerprint import differences, teacher_fingerprint, tokenizer_fingerprint
from hf_distill.teachers.cache.reader import CacheReader
from hf_distill.teachers.cache.store import CorruptCacheError, Store, read_json, stands

MANIFEST = "cache.json"
FORMAT = 1
HUB = "hf://datasets/"
TEACHER = "teacher"


def is_cache(path: str | os.PathLike) -> bool:
    """Whether a folder, or `hf://datasets/<id>` on the Hub, is a teacher's cache."""
    return str(path).startswith(HUB) or os.path.isfile(os.path.join(path, MANIFEST))


class CachedTeacher(Teacher):
    """What `cache_teacher` or `hf-distill cache` wrote, given back batch by batch.

    The collator looks up every document by its content, so shuffling, padding, packing, ranks and epochs make no
    difference; a document that was not cached is an error. Modes "hidden" and "logits" serve every divergence and
    temperature exactly; int8 rows cost the embedded teacher a KL of 2e-4 from itself and 1 % of its top-1 agreement.
    "topk" and "sampled" hold one temperature; "scores" arrive as `Signals.features`. No mode has the hidden states of
    all layers, attentions, or gradients.

    Args:
        path: the folder.
        teacher: a live teacher that must be the cached one, to be sure.
        processing_class: a tokenizer or processor that must be the one the data were cached with.

    Raises:
        ValueError: no cache, an unfinished or damaged one, or one of another teacher, tokenizer or format; says what
            differs.
    """

    def __init__(self, path: str | os.PathLike, *, teacher: Teacher | None = None, processing_class=None):
        self.path = Path(path)
        if not (self.path / MANIFEST).is_file():
            raise ValueError(f"{path} is no teacher's cache (it has no {MANIFEST}): make one with hf-distill cache")
        self.manifest = read_json(self.path / MANIFEST)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path} has cache format {self.manifest.get('format')}, this library reads {FORMAT}: make it again"
            )
        if self.manifest["shards"] is None:
            raise ValueError(
                f"{path} is not finished: run the command that makes it again, finished shards are not computed anew"
            )
        self._compare(teacher, processing_class)
        self.codec = codec_from_json(self.manifest["codec"])
        self.store = Store(self.path, self.manifest["shards"])
        self.reader = CacheReader(self.store, self.codec, self.manifest, str(path))
        self.readers = (self.reader,)
        self.gives = frozenset() if isinstance(self.codec, Scores) else frozenset({"logits"})
        self.name, self.revision = self.manifest["name"], self.manifest["teacher"]["revision"]
        self._head: HeadLogits | None = None
        self._config = self._tokenizer = None

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token=None, **checks) -> CachedTeacher:
        """Download a cache that `push_to_hub` uploaded; `checks` as in the constructor."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo_id.removeprefix(HUB), repo_type="dataset", revision=revision, token=token)
        return cls(folder, **checks)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token=None) -> str:
        """Upload the folder as a dataset with its card; returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        message = f"Cache of {self.name}"
        return api.upload_folder(
            repo_id=repo_id, folder_path=self.path, repo_type="dataset", ignore_patterns=".*", commit_message=message
        ).commit_url

    def _compare(self, teacher: Teacher | None, processing_class) -> None:
        changed = []
        if teacher is not None:
            changed += differences(self.manifest["teacher"], teacher_fingerprint(teacher))
        if processing_class is not None:
            changed += differences(self.manifest["tokenizer"], tokenizer_fingerprint(processing_class))
        if changed:
            cached = f"{self.path} is the cache of {self.manifest['name']}"
            raise ValueError(f"{cached} and does not fit: {'; '.join(changed)}")

    @property
    def config(self):
        if self._config is None and (self.path / TEACHER / "config.json").is_file():
            from transformers import AutoConfig

            self._config = AutoConfig.from_pretrained(self.path / TEACHER)
        return self._config

    @property
    def tokenizer(self):
        if self._tokenizer is None and (self.path / TEACHER).is_dir():
            from hf_distill.training import compat

            self._tokenizer = compat.load_processing_class(self.path / TEACHER)
        return self._tokenizer

    def vocabulary_size(self) -> int | None:
        return self.manifest["vocabulary"]

    def prepare(self, accelerator) -> None:
        self._head = self._load_head(accelerator.device)

    def _load_head(self, device: torch.device) -> HeadLogits | None:
        if not isinstance(self.codec, Hidden):
            return None
        head = self.manifest["head"]
        path = self.path / head["file"]
        if not stands(path):
            raise CorruptCacheError(f"{path}, the teacher's head, is missing or damaged: make the cache again")
        with safe_open(path, "pt") as tensors:  # mapped into memory; safetensors itself knows no device "cpu:0"
            own = {name: tensors.get_tensor(name).to(device) for name in tensors.keys()}
        return HeadLogits(own["weight"][:0], own["weight"], own.get("bias"), head["scale"], head["softcap"])

    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        if needs - self.gives:
            raise ValueError(
                f"a cached teacher ({self.codec.mode}) has no {', '.join(sorted(needs - self.gives))}: use a "
                "FrozenTeacher, or cache in another mode"
            )
        missing = [key for key in self.reader.keys.values() if key not in batch]
        if missing:
            raise ValueError(
                f"the batch has no {', '.join(missing)}: the collator must look them up, "
                "DataCollatorForDistillation(base, readers=teacher.readers)"
            )
        rows = rows_of(batch)
        own: dict[str, Tensor] = {name: batch[key] for name, key in self.reader.keys.items()}
        if isinstance(self.codec, Hidden) and self._head is None:
            self._head = self._load_head(own["hidden"].device)
        return Signals(
            logits=self.codec.logits(own, self._head),
            labels=batch.get("labels") if rows is None else rows.labels,
            features=own if isinstance(self.codec, Scores) else {},
            rows=rows,
            batch=batch,
        )

    def describe(self) -> dict:
        return self.manifest["described"] | {"teacher_cache": self.codec.mode}


def load_cached(path: str | os.PathLike, *, revision: str | None = None, **options) -> CachedTeacher:
    """A cached teacher from a folder or `hf://datasets/<id>`.

    Raises:
        ValueError: options of a model's weights, which a cache does not have.
    """
    asked = sorted(name for name, value in options.items() if value)
    if asked:
        raise ValueError(
            f"{path} is a teacher's cache and has no weights to load with {', '.join(asked)}: leave them out"
        )
    if str(path).startswith(HUB):
        return CachedTeacher.from_hub(str(path), revision=revision)
    return CachedTeacher(path)
