"""Which documents a batch holds, and a key for each that only its content decides.

The key does not change with shuffling, padding, packing, ranks or epochs, so a dataset needs no extra column.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_distill.heads import model_inputs

KEY_BYTES = 16
# where a document lies in its batch, not what it says
LAYOUT = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
MASK = "attention_mask"
IMAGES = ("image", "images")
PICTURES = ("pixel", "image")  # never one entry per token, even where the sizes happen to agree


@dataclass(frozen=True)
class Document:
    """One document of a batch: a row of a padded batch, a part of a packed one, or a whole sample.

    Attributes:
        key: 16 bytes, of its token ids and all else that a model reads of it.
        positions: (n,) int64, ascending: where its loss rows lie, counted from its own start; (0,) for a whole sample.
        example: the dataset example inside the batch.
        length: its tokens; 0 without token ids.
    """

    key: bytes
    positions: Tensor
    example: int
    length: int


def documents_of(batch: dict, features: list[dict], labels_of: str = "positions") -> list[Document]:
    """The documents with loss rows, in the order of `row_document`; all samples where labels belong to samples.

    Args:
        batch: as the teacher sees it, on the host, with the collator's row keys where there are any.
        features: the examples it was collated from; their `image` or `images` stand for pixel tensors.
        labels_of: "positions", "decoder" (labels of an encoder-decoder) or "samples".

    Raises:
        ValueError: an input that cannot be told apart by example.
    """
    inputs = {k: v for k, v in model_inputs(batch).items() if torch.is_tensor(v)}
    inputs = {k: v for k, v in inputs.items() if k not in LAYOUT and not k.endswith(MASK)}
    if "loss_rows" not in batch:
        size = (batch["input_ids"] if "input_ids" in batch else next(iter(inputs.values()))).shape[0]
        sample = torch.zeros(1, dtype=torch.int64)
        places = [(b, *_row_span(batch, b), b % len(features), sample) for b in range(size)]
    elif is_flattened(batch):
        places = _packed_places(batch)
    else:
        places = _padded_places(batch, labels_of)
    hasher = _Hasher(batch, inputs, features, labels_of)
    return [
        Document(hasher.key(row, begin, end, example), positions, example, end - begin)
        for row, begin, end, example, positions in places
    ]


def token_documents(batch: dict) -> list[tuple[Tensor, Tensor]]:
    """(token ids (T,), positions of the loss rows (n,)) of a causal language model's documents with loss rows.

    Args:
        batch: see `documents_of`.
    """
    places = _packed_places(batch) if is_flattened(batch) else _padded_places(batch, "positions")
    ids = batch["input_ids"].flatten()
    return [(ids[begin:end], positions) for _, begin, end, _, positions in places]


def is_flattened(batch: dict) -> bool:
    """Whether documents follow each other without padding, in one row."""
    return "position_ids" in batch and MASK not in batch and "input_ids" in batch


def _rows_by_document(batch: dict) -> list[tuple[int, Tensor]]:
    """(example, flat positions of its rows) per document."""
    examples = batch["document_example"].tolist()
    counts = torch.bincount(batch["row_document"], minlength=len(examples)).tolist()
    return list(zip(examples, batch["loss_rows"].split(counts), strict=True))


def _packed_places(batch: dict) -> list[tuple]:
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    ends = torch.cat([starts[1:], torch.tensor([batch["input_ids"].numel()])])
    places = []
    for example, index in _rows_by_document(batch):
        document = int(torch.searchsorted(starts, index[0], right=True)) - 1
        begin, end = int(starts[document]), int(ends[document])
        places.append((0, begin, end, example, index - begin))
    return places


def _padded_places(batch: dict, labels_of: str) -> list[tuple]:
    width = batch["labels"].shape[1]
    places = []
    for example, index in _rows_by_document(batch):
        row = int(index[0]) // width
        begin, end = _row_span(batch, row)
        first = row * width if labels_of == "decoder" else begin
        places.append((row, begin, end, example, index - first))
    return places


def _row_span(batch: dict, row: int) -> tuple[int, int]:
    """First and last + 1 of a row's real tokens, in flat positions."""
    mask = batch.get(MASK)
    if mask is None:
        width = batch["input_ids"].shape[1] if "input_ids" in batch else 0
        return row * width, (row + 1) * width
    first, last = _span(mask[row])
    return row * mask.shape[1] + first, row * mask.shape[1] + last


def _span(mask: Tensor) -> tuple[int, int]:
    """First and last + 1 of what a row's mask lets through."""
    real = mask.nonzero().flatten()
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)


class _Hasher:
    """Sorts the batch's inputs once: with one entry per token, in blocks with a mask of their own, one per example."""

    def __init__(self, batch: dict, inputs: dict[str, Tensor], features: list[dict], labels_of: str):
        grid = batch.get(MASK, batch.get("input_ids"))
        grid = None if grid is None else grid.shape[:2]
        self.labels = batch.get("labels") if labels_of == "decoder" else None
        if self.labels is not None:
            self.decoder_ids = inputs.pop("decoder_input_ids", None)
        aligned = {k: v for k, v in inputs.items() if grid is not None and v.shape[:2] == grid}
        self.tokens = {k: v.flatten(0, 1) for k, v in aligned.items() if not k.startswith(PICTURES)}
        self.images = [[f[name] for name in IMAGES if name in f] for f in features]
        # query_input_ids and query_attention_mask, and the like
        masks = {k.removesuffix(MASK): v for k, v in batch.items() if k.endswith(MASK) and k != MASK}
        self.blocks = {
            k: (v, mask)
            for k, v in inputs.items()
            for prefix, mask in masks.items()
            if k.startswith(prefix) and v.shape[:2] == mask.shape
        }
        rest = {k: v for k, v in inputs.items() if k not in self.tokens and k not in self.blocks}
        size = 1 if grid is None else grid[0]
        if any(self.images):  # pixels of several images are one tensor: the images themselves stand for them
            rest = {}
        elif grid is None:
            size = next(iter(inputs.values())).shape[0]
        for name, value in rest.items():
            if value.shape[:1] != (size,) or is_flattened(batch):
                raise ValueError(
                    f"cannot tell which example of the batch each part of {name} {tuple(value.shape)} belongs to: give "
                    "it one entry per example, or keep the images in the dataset's image or images column"
                )
        self.examples = rest

    def key(self, row: int, begin: int, end: int, example: int) -> bytes:
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for name in sorted(self.tokens):
            _update(digest, name, self.tokens[name][begin:end])
        for name in sorted(self.blocks):
            value, mask = self.blocks[name]
            first, last = _span(mask[row])
            _update(digest, name, value[row, first:last])
        for name in sorted(self.examples):
            _update(digest, name, self.examples[name][row])
        if self.labels is not None:
            answer = self.labels[row]
            length = _span(answer != -100)[1]
            _update(digest, "labels", answer[:length])
            if self.decoder_ids is not None:
                _update(digest, "decoder_input_ids", self.decoder_ids[row, :length])
        for image in self.images[example % len(self.images)]:  # a preference batch holds each example twice
            _update_image(digest, image)
        return digest.digest()


def _update(digest, name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        value = value.to(torch.int64)
    digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def image_digest(image) -> str:
    """Names a picture by its pixels."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    _update_image(digest, image)
    return digest.hexdigest()


def _update_image(digest, image) -> None:
    if isinstance(image, (list, tuple)):
        digest.update(f"[{len(image)}]".encode())
        for one in image:
            _update_image(digest, one)
    elif isinstance(image, dict):  # undecoded: {"bytes", "path"}
        digest.update(image["bytes"] if image.get("bytes") is not None else str(image.get("path")).encode())
    elif image is not None:
        pixels = np.ascontiguousarray(image)
        digest.update(f"{getattr(image, 'mode', '')} {pixels.dtype} {pixels.shape};".encode())
        digest.update(pixels)
