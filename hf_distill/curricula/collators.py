"""The collator of all distillation trainers: another collator's batch, plus where the loss is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PREFIX, CACHED = "teacher_", "cached_"


class DataCollatorForDistillation:
    """Wraps any collator and adds, once per batch, what every distillation loss needs.

    Added keys: `loss_rows` (N,), `row_labels` (N,), `row_document` (N,), `document_example` (D,): see `signals.Rows`.
    A feature's `teacher_`-prefixed inputs are collated by the same collator into `teacher_` keys, with rows of their
    own where they have labels. Cached columns arrive under `cached_<name>`, those per token cut to the loss rows.

    Args:
        base: the collator that pads, packs or processes images; it must return `labels`.
        shift: position s predicts the label at s + 1 (causal models); encoder-decoders and token tasks do not shift.
        token_columns: columns with one entry per token; entry s describes the prediction made at position s.
        example_columns: columns with one value per example.
        vocabulary: ids from here on are errors (the common vocabulary of student and teacher); None does not check.
        labels_of: what labels belong to, see `heads.labels_of`: "positions", a "decoder" of its own, or "samples",
            whose batches get no rows.
        readers: each adds `cached_` entries, aligned with the loss rows or documents: those of a cached teacher.

    Raises:
        ValueError: an id outside the vocabulary; a teacher's answer of another length than the student's.
    """

    def __init__(
        self,
        base: Callable,
        *,
        shift: bool = True,
        token_columns: tuple[str, ...] = (),
        example_columns: tuple[str, ...] = (),
        vocabulary: int | None = None,
        labels_of: str = "positions",
        readers: tuple = (),
    ):
        self.base, self.shift, self.vocabulary, self.labels_of = base, shift, vocabulary, labels_of
        self.readers = tuple(readers)
        self.token_columns, self.example_columns = tuple(token_columns), tuple(example_columns)

    @property
    def tokenizer(self):
        return getattr(self.base, "tokenizer", None)

    @property
    def row_keys(self) -> list[str]:
        """Batch keys with one entry per loss row, beside the rows themselves."""
        read = [key for reader in self.readers if reader.per == "token" for key in reader.keys.values()]
        return [CACHED + name for name in self.token_columns] + read

    @property
    def document_keys(self) -> list[str]:
        """Batch keys with one entry per document, beside `document_example`."""
        return [key for reader in self.readers if reader.per == "sample" for key in reader.keys.values()]

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        cached = {*self.token_columns, *self.example_columns}
        plain = [{k: v for k, v in f.items() if k not in cached and not k.startswith(PREFIX)} for f in features]
        batch = with_labels(dict(self.base(plain)))
        labels = batch.get("labels")
        if labels is not None and labels.dim() == 2 and self.labels_of != "samples":
            self._check_ids(batch)
            lengths = [len(f["input_ids"]) for f in features] if _is_flattened(batch, features) else None
            rows = self.rows(batch, lengths)
            batch |= rows
            for name in self.token_columns:
                values = _flat_positions([f[name] for f in features], labels.shape, lengths)
                batch[CACHED + name] = values[rows["loss_rows"]]
        for name in self.example_columns:
            batch[CACHED + name] = torch.as_tensor([f[name] for f in features])
        batch |= self._teacher_inputs(features, batch)
        for reader in self.readers:
            batch |= reader(batch, features, self.labels_of)
        return batch

    def rows(self, batch: dict, example_lengths: list[int] | None) -> dict[str, Tensor]:
        """Which positions of a batch with `labels` carry loss; subclasses may choose others and add keys."""
        return loss_rows(batch["labels"], batch.get("position_ids"), shift=self.shift, example_lengths=example_lengths)

    def _teacher_inputs(self, features: list[dict], batch: dict) -> dict:
        own = [{k.removeprefix(PREFIX): v for k, v in f.items() if k.startswith(PREFIX)} for f in features]
        if not own[0]:
            return {}
        collated = dict(self.base(own))
        labels = collated.get("labels")
        if "loss_rows" in batch and labels is not None and labels.dim() == 2 and "labels" in own[0]:
            lengths = [len(f["input_ids"]) for f in own] if _is_flattened(collated, own) else None
            rows = self.rows(collated, lengths)
            check_same_answers(rows, batch)
            collated |= rows
        return {PREFIX + key: value for key, value in collated.items()}

    def _check_ids(self, batch: dict) -> None:
        if self.vocabulary is None:
            return
        for key in ("input_ids", "labels"):
            ids = batch.get(key)
            if ids is not None and ids.numel() and int(ids.max()) >= self.vocabulary:
                where = (ids >= self.vocabulary).nonzero()[0].tolist()
                raise ValueError(
                    f"{key} holds token id {int(ids[tuple(where)])} (row {where[0]}, position {where[1]} of a batch), "
                    f"but student and teacher share only ids 0 to {self.vocabulary - 1}: tokenise with the models' own "
                    "tokenizer"
                )


def loss_rows(
    labels: Tensor, position_ids: Tensor | None = None, *, shift: bool = True, example_lengths: list[int] | None = None
) -> dict[str, Tensor]:
    """Which positions carry loss, their labels, documents and examples (see `signals.Rows`).

    Args:
        labels: (B, S), -100 where no loss is taken.
        position_ids: (1, S) of a flattened (padding-free) batch: a document starts where it is 0.
        example_lengths: tokens of each example of a flattened batch; None when row b of `labels` is example b.
    """
    width = labels.shape[1]
    targets = labels[:, 1:] if shift else labels
    row, position = (targets != -100).nonzero(as_tuple=True)
    index = row * width + position
    if example_lengths is None:
        document = row
        example_of_document = torch.arange(labels.shape[0])
    else:
        starts = position_ids.flatten() == 0
        document = (starts.long().cumsum(0) - 1)[index]
        example = torch.repeat_interleave(torch.arange(len(example_lengths)), torch.tensor(example_lengths))
        example_of_document = example[starts.nonzero().flatten()]
    present, document = torch.unique(document, return_inverse=True)
    return {
        "loss_rows": index,
        "row_labels": targets[row, position],
        "row_document": document,
        "document_example": example_of_document[present],
    }


def with_labels(batch: dict) -> dict:
    """A preference batch as a language model's: its 2 B answers, chosen ones first, are what carries loss."""
    if "completion_mask" not in batch or "labels" in batch:
        return batch
    mask = batch["completion_mask"]
    kept = {k: v for k, v in batch.items() if k not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")}
    return kept | {"labels": batch["input_ids"].masked_fill(mask == 0, -100)}


def _is_flattened(batch: dict, features: list[dict]) -> bool:
    return "position_ids" in batch and "attention_mask" not in batch and "input_ids" in features[0]


def _flat_positions(columns: list, shape: torch.Size, lengths: list[int] | None) -> Tensor:
    """Per-token entries of all examples over the flattened positions; zeros where there is padding."""
    tensors = [torch.as_tensor(column) for column in columns]
    flat = torch.zeros(shape[0] * shape[1], *tensors[0].shape[1:], dtype=tensors[0].dtype)
    offset = 0
    for i, tensor in enumerate(tensors):
        start = offset if lengths is not None else i * shape[1]
        flat[start : start + len(tensor)] = tensor
        offset += len(tensor)
    return flat


def check_same_answers(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    """Two sets of rows are of the same answer tokens. Raises ValueError, naming the document where they are not."""
    count = min(len(student["document_example"]), len(teacher["document_example"]))
    ours = torch.bincount(student["row_document"], minlength=count)
    theirs = torch.bincount(teacher["row_document"], minlength=count)
    if len(ours) != len(theirs) or not torch.equal(ours, theirs):
        raise ValueError(
            f"the teacher's inputs have {theirs.tolist()} loss positions per document, the student's {ours.tolist()}: "
            "both must hold the same answer tokens (see teacher_labels), only what comes before may differ"
        )
    apart = (teacher["row_labels"] != student["row_labels"]).nonzero()
    if len(apart):
        row = int(apart[0])
        document = int(student["row_document"][row])
        raise ValueError(
            f"the teacher's answer differs from the student's in document {document} of the batch (example "
            f"{int(student['document_example'][document])}): token {int(teacher['row_labels'][row])} instead of "
            f"{int(student['row_labels'][row])}. Both must hold the same answer tokens (see teacher_labels)"
        )
