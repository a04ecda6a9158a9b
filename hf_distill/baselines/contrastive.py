"""Contrastive representation distillation: two memory banks with one row per training example."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_distill.baselines.features import TapsFeatures
from hf_distill.baselines.relations import LAST
from hf_distill.curricula.draws import GOLDEN, mix
from hf_distill.losses import crd_loss, crd_update
from hf_distill.losses.precision import unit
from hf_distill.signals import Signals, upcast
from hf_distill.students.projectors import as_pooled, width_of


class CRD(TapsFeatures):
    """Contrastive representation distillation (1910.10699): CE + 0.8 · contrast; see `losses.crd_loss`.

    The train set needs a column with each example's row number, which the collator hands through:

        train = train.add_column("index", range(len(train)))
        collator = DataCollatorForDistillation(default_data_collator, labels_of="samples", example_columns=("index",))

    Each network's features are embedded by a learned linear map. After an optimizer step the banks take in the
    embeddings of all its micro-batches and ranks, so every rank holds the same banks. In evaluation, whose examples
    have no row, the term is 0.

    Args:
        classes: the class of every row of the train set, `train["label"]`; negatives are drawn from other classes.
        layers: one pair, the embeddings before the classifiers by default; maps and tokens are averaged over places.
        negatives: K, drawn with replacement by (seed, step, row): the same however a batch is split.
        width: of the embeddings and the banks.
        temperature, momentum: of the scores, of the banks' rows.
        index_column: the column's name.
        seed: of the banks' first values and of the draws.

    Raises:
        ValueError: fewer than two classes; batches without the column, or whose rows are not those of `classes`.
    """

    couples_batch = "scores against memory banks that earlier batches filled; its constants come from the first step"

    def __init__(
        self,
        classes,
        layers=LAST,
        *,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        index_column: str = "index",
        seed: int = 0,
        weight: float = 0.8,
        label_weight: float = 1.0,
        **options,
    ):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)
        if len(self.pairs) != 1:
            raise ValueError(f"CRD compares one pair of layers, got {layers!r}")
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        classes = torch.as_tensor(classes)
        sizes = classes.bincount() if classes.dim() == 1 and not classes.is_floating_point() else ()
        if len(sizes) < 2 or sizes.max() == len(classes):
            raise ValueError(
                f"CRD draws negatives from other classes: give `classes` the label of every train row, got "
                f"{classes.dtype} {tuple(classes.shape)}"
            )
        self.negatives, self.width, self.temperature, self.momentum = negatives, width, temperature, momentum
        self.index_column, self.seed = index_column, seed
        draw, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width / 3)
        banks = (torch.rand(2, len(classes), width, generator=draw) * 2 - 1) * bound
        self.state = {
            "student_bank": banks[0].clone(),
            "teacher_bank": banks[1].clone(),
            "z": torch.zeros(2),  # of the student's and of the teacher's scores; 0 before the first step
            "step": torch.zeros((), dtype=torch.int64),
            "by_class": classes.argsort(stable=True),  # rows, class after class
            "sizes": sizes,
            "classes": classes,
        }
        self._seen: list[tuple[Tensor, ...]] = []  # since the last optimizer step
        self._z_known = self._rows_checked = False

    def build(self, shapes: list[tuple]) -> None:
        self.embed = nn.ModuleList(nn.Linear(width_of(shape), self.width) for shape in shapes[0])

    def names(self) -> tuple[str, ...]:
        return ("contrast",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        pair, mask = self.tapped(student, teacher)[0], self.text_mask(student)
        pooled = (as_pooled(x, prefix, mask) for x, prefix in zip(pair, self.prefixes, strict=True))
        ours, theirs = (
            unit(upcast(embed(x.to(embed.weight.dtype)))) for embed, x in zip(self.embed, pooled, strict=True)
        )
        if not self.training:
            return {"contrast": 0.0 * (ours.sum() + theirs.sum())}
        index = self._rows(student)
        self._z_known = self._z_known or bool(self.state["z"][0] > 0)
        constants = self.state["z"].unbind() if self._z_known else (None, None)
        banks = self.state["student_bank"], self.state["teacher_bank"]
        contrast = torch.cat([index[:, None], self.draw(index)], 1)
        loss, *z = crd_loss(ours, theirs, *banks, contrast, self.temperature, *constants)
        self._seen.append((index, ours.detach(), theirs.detach(), torch.stack(z)[None]))
        return {"contrast": loss}

    def draw(self, index: Tensor) -> Tensor:
        """(B, K) rows of other classes than those of rows `index`, drawn by (seed, step, row)."""
        sizes = self.state["sizes"]
        own = self.state["classes"][index]
        size, first = sizes[own, None], (sizes.cumsum(0) - sizes)[own, None]
        key = mix(mix(self.state["step"] + self.seed * GOLDEN) + index)
        numbers = mix(key[:, None] + GOLDEN * torch.arange(self.negatives, device=index.device))
        place = (numbers & (2**63 - 1)) % (len(self.state["classes"]) - size)
        return self.state["by_class"][place + size * (place >= first)]

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        if not self._seen:
            return
        index, ours, theirs, z = (gather_rows(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        self._seen = []
        for name, embeddings in (("student_bank", ours), ("teacher_bank", theirs)):
            crd_update(self.state[name], embeddings, index, self.momentum, inplace=True)
        if not self._z_known:
            self.state["z"] = z.mean(0)
        self.state["step"] = self.state["step"] + 1

    def _rows(self, student: Signals) -> Tensor:
        index = student.batch.get("cached_" + self.index_column)
        if index is None:
            raise ValueError(
                f"CRD needs each example's row of the train set, but batches have no {self.index_column!r}: "
                f'train.add_column("{self.index_column}", range(len(train))), and data_collator='
                "DataCollatorForDistillation(default_data_collator, labels_of='samples', "
                f"example_columns=({self.index_column!r},))"
            )
        if not self._rows_checked:
            known, labels = self.state["classes"], student.labels
            inside = bool((index < len(known)).all() & (index >= 0).all())
            hard = labels is not None and labels.dim() == 1
            if not inside or (hard and not torch.equal(known[index].to(labels), labels)):
                raise ValueError(
                    f"column {self.index_column!r} does not fit `classes`: rows {index.tolist()[:8]} of {len(known)} "
                    "are outside, or have other labels; number the rows after shuffling and filtering"
                )
            self._rows_checked = True
        return index


def gather_rows(x: Tensor) -> Tensor:
    """The rows (n, …) of all ranks, in their order, whatever n each of them has."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    sizes = x.new_zeros(distributed.get_world_size(), dtype=torch.int64)
    distributed.all_gather_into_tensor(sizes, torch.tensor([len(x)], device=x.device))
    counts = sizes.tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
