"""A teacher behind a URL that tells of given text how likely each token is: its top-k, as a top-k cache holds it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_distill.heads import labels_are_shifted, model_inputs, rows_of
from hf_distill.signals import Signals, SparseLogits
from hf_distill.teachers.answers import AnswerStore
from hf_distill.teachers.base import Teacher, teacher_batch
from hf_distill.teachers.cache.codecs import TopK, decode, encode
from hf_distill.teachers.cache.fingerprint import tokenizer_digest
from hf_distill.teachers.cache.keys import KEY_BYTES, LAYOUT, Document, token_documents
from hf_distill.teachers.endpoint import Call, Endpoint, TeacherProtocolError
from hf_distill.teachers.generations import write_whole
from hf_distill.teachers.prompt_log_probs import check_names, entries_of, top_k
from hf_distill.training.checks import PROBES

PROBE = "\n".join(PROBES)
PROBE_FILE = "probe.json"
MOVED = 0.1  # total variation on the probe from which a model is another one; bfloat16 alone moves about 0.01
READ = frozenset({"input_ids", "attention_mask", *LAYOUT})
# the softmax of the model itself, whatever the server's sampling defaults are; one token is thrown away
PLAIN = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}


class RemoteTeacher(Teacher):
    """A causal language model behind an endpoint with vLLM's `prompt_logprobs`, on /v1/completions.

    Every document of a batch is a request, several at once, sent as token ids. What came is kept in `store` and not
    asked for again: not in a later epoch, not after a kill, and not by another rank. It gives `SparseLogits`, the k
    likeliest ids and their log-probabilities at temperature 1, so it serves what a `topk` cache serves; the precision
    is what the server sends (vLLM: float32 of its own computation, bfloat16 weights as a rule).

    Args:
        url, model: of the server, and the name it serves the model under.
        k: ids per token. vLLM gives at most 20, or its --max-logprobs.
        tokenizer: what made the ids; None takes the student's.
        store: folder for the answers. None keeps them only while the teacher lives.
        connection: to `Endpoint`: timeout, max_retries, concurrency, max_cost…

    Raises:
        ValueError: settings out of range; when it is first asked, a store of another teacher.

    Example:
        >>> teacher = RemoteTeacher("http://localhost:8000", "Qwen/Qwen2.5-7B-Instruct", k=20)  # doctest: +SKIP
    """

    gives = frozenset({"logits"})

    def __init__(
        self,
        url: str,
        model: str,
        *,
        k: int = 20,
        tokenizer=None,
        store: str | os.PathLike | None = None,
        **connection,
    ):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.endpoint = Endpoint(url, model, **connection)
        self.name, self.k = model, k
        self._tokenizer = None
        self._folder = None if store is None else Path(store)
        self._store: AnswerStore | None = None
        self._known: dict[bytes, Tensor] = {}  # without a store
        self._codec: TopK | None = None
        if tokenizer is not None:
            self.read_as(tokenizer)

    @property
    def usage(self):
        """What it was asked for; see `Usage`."""
        return self.endpoint.usage

    @property
    def tokenizer(self):
        return self._tokenizer

    @property
    def served(self) -> dict:
        """What makes two of them the same teacher."""
        return {"kind": "endpoint", "model": self.endpoint.model, "extra_body": self.endpoint.extra_body}

    def vocabulary_size(self) -> int | None:
        return None if self._tokenizer is None else max(self._text_tokenizer.get_vocab().values()) + 1

    def read_as(self, processing_class) -> None:
        """Take the student's tokenizer where none was given, else they must agree.

        Raises:
            ValueError: they do not, or it has fewer than k entries.
        """
        if not hasattr(getattr(processing_class, "tokenizer", processing_class), "get_vocab"):
            return
        if self._tokenizer is not None and tokenizer_digest(processing_class) != tokenizer_digest(self._tokenizer):
            raise ValueError(
                f"the tokenizer given for {self.endpoint} is not the student's: give the student's, or none"
            )
        self._tokenizer = self._tokenizer or processing_class
        if self.k > self.vocabulary_size():
            raise ValueError(f"k must be at most the {self.vocabulary_size()} entries of the tokenizer, got {self.k}")

    @property
    def _text_tokenizer(self):
        return getattr(self._tokenizer, "tokenizer", self._tokenizer)

    def attach(self, student: nn.Module) -> None:
        if not labels_are_shifted(student):
            raise ValueError(f"{self.endpoint} tells of the next token: the student must be a causal language model")

    def check(self) -> None:
        """Ask for a short text once: the server must cut it into the same tokens and tell what is asked of it.

        Raises:
            TeacherError: it does not, or it says something else of it than when the store was begun.
            ValueError: no tokenizer.
        """
        if self._codec is not None:
            return
        if self._tokenizer is None:
            raise ValueError(
                f"a remote teacher needs the tokenizer that made the ids: RemoteTeacher({self.name!r}, tokenizer=)"
            )
        ids, vocabulary = self._text_tokenizer(PROBE)["input_ids"], self.vocabulary_size()

        def read(_, reply: dict) -> dict[str, Tensor]:
            entries = entries_of(reply, ids)
            check_names(entries, self._text_tokenizer)
            return top_k(entries, list(range(len(ids) - 1)), self.k, vocabulary)

        said = self.endpoint.answer(self._call(PROBE, len(ids)), read)
        if self._folder is not None:
            facts = self.served | {"k": self.k, "tokenizer": tokenizer_digest(self._tokenizer)}
            self._store = AnswerStore(self._folder, facts)
            self._compare(said)
        self._codec = TopK(vocabulary, self.k, 1.0, "float32")

    def _compare(self, said: dict[str, Tensor]) -> None:
        """A store's answers are those of the model that answers now."""
        path = self._folder / PROBE_FILE
        if not path.exists():
            write_whole(path, {name: tensor.tolist() for name, tensor in said.items()})
            return
        then = {name: torch.tensor(values) for name, values in json.loads(path.read_text()).items()}
        moved = max(map(_distance, then["ids"], then["log_probs"], said["ids"], said["log_probs"]))
        if moved > MOVED:
            raise TeacherProtocolError(
                f"{self.endpoint} says something else than when {self._folder} was begun (total variation "
                f"{moved:.2f}): another model is served under this name. Serve the old one, or choose another folder"
            )

    # ---- answering ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        if needs - self.gives:
            raise ValueError(
                f"{self.endpoint} tells log-probabilities and no {', '.join(sorted(needs - self.gives))}: use a "
                "FrozenTeacher"
            )
        own = teacher_batch(batch)
        rows = rows_of(own)
        if rows is None:
            raise ValueError(f"{self.endpoint} tells of tokens, and the batch has no labels of tokens")
        if unread := sorted(model_inputs(own).keys() - READ):
            raise ValueError(f"{self.endpoint} reads token ids alone, and the batch has {', '.join(unread)} too")
        self.check()
        tensors = self._look_up(token_documents({k: v.cpu() for k, v in own.items() if torch.is_tensor(v)}))
        ids, log_probs = (tensors[name].to(rows.index.device) for name in ("ids", "log_probs"))
        return Signals(SparseLogits(ids, log_probs, temperature=1.0), labels=rows.labels, rows=rows, batch=own)

    def _look_up(self, documents: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Rows of all documents under each other; those that no one asked about yet are asked about now."""
        keyed = [(_key(*document), *document) for document in documents]
        missing = {key: (ids, positions) for key, ids, positions in keyed if not self._has(key)}
        if missing and self._store is not None:
            self._store.refresh()
            missing = {key: document for key, document in missing.items() if not self._has(key)}
        self.endpoint.account.count(cache_hits=len({key for key, _, _ in keyed}) - len(missing))
        self._ask(missing)
        parts = [decode(self._codec, self._get(key))[1] for key, _, _ in keyed]
        empty = {"ids": torch.zeros(0, self.k, dtype=torch.int64), "log_probs": torch.zeros(0, self.k)}
        return {name: torch.cat([empty[name], *(part[name] for part in parts)]) for name in empty}

    def _ask(self, missing: dict[bytes, tuple[Tensor, Tensor]]) -> None:
        keys, documents = list(missing), [(ids.tolist(), positions) for ids, positions in missing.values()]

        def read(i: int, reply: dict) -> bytes:
            ids, positions = documents[i]
            rows = top_k(entries_of(reply, ids), positions.tolist(), self.k, self._codec.vocabulary)
            return encode(self._codec, Document(keys[i], positions, i, len(ids)), rows)

        for i, data in self.endpoint.answers([self._call(ids, len(ids)) for ids, _ in documents], read):
            if self._store is not None:
                self._store.add([(keys[i], data)])
            else:
                self._known[keys[i]] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _call(self, prompt: str | list[int], tokens: int) -> Call:
        return Call("completions", {"prompt": prompt, "prompt_logprobs": self.k, **PLAIN}, (tokens, 1))

    def _has(self, key: bytes) -> bool:
        return key in (self._known if self._store is None else self._store)

    def _get(self, key: bytes) -> Tensor:
        return self._known[key] if self._store is None else self._store.get(key)

    def describe(self) -> dict:
        return super().describe() | {"teacher_top_k": self.k} | self.usage.describe()


def _key(ids: Tensor, positions: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for tensor in (ids, positions):
        digest.update(f"{len(tensor)};".encode() + tensor.to(torch.int64).contiguous().numpy().tobytes())
    return digest.digest()


def _distance(ids: Tensor, log_probs: Tensor, other_ids: Tensor, other_log_probs: Tensor) -> float:
    """Total variation of two top-k distributions; an id that one of them does not name has its least one there."""
    p, q = (
        {i: math.exp(value) for i, value in zip(a.tolist(), b.tolist(), strict=True) if value > -math.inf}
        for a, b in ((ids, log_probs), (other_ids, other_log_probs))
    )
    least_p, least_q = min(p.values()), min(q.values())
    return sum(abs(p.get(i, least_p) - q.get(i, least_q)) for i in p.keys() | q.keys()) / 2


__all__ = ["RemoteTeacher"]
