"""Rows of mimic distillation: those that the KD term counts, beside those of the label loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.curricula.collators import DataCollatorForDistillation, loss_rows
from hf_distill.losses.mimic import check_labels, kd_positions, marks_rows


class MimicRows(DataCollatorForDistillation):
    """A trainer's collator, with the rows that KD counts: see `losses.mimic.kd_positions`.

    Where they are not the label loss's, a batch's rows are both together, and `cached_kd` and `cached_lm` mark each
    term's own. What evaluation measures by itself (teacher_kl, agreement, cross_entropy) is then over all of them; a
    row without a label has label 0.

    Args:
        collator: the collator to go on from.
        common: entries that both models are compared on.
    """

    def __init__(self, collator: DataCollatorForDistillation, common: int, distill_tokens: str, mask_alignment: str):
        vars(self).update(vars(collator))
        self.common, self.distill_tokens, self.mask_alignment = common, distill_tokens, mask_alignment
        self.marked = marks_rows(distill_tokens, mask_alignment)

    @property
    def row_keys(self) -> list[str]:
        return super().row_keys + (["cached_kd", "cached_lm"] if self.marked else [])

    def rows(self, batch: dict, example_lengths: list[int] | None) -> dict[str, Tensor]:
        check_labels(batch["labels"], self.common)
        if not self.marked:
            return super().rows(batch, example_lengths)
        ids, labels, positions = batch["input_ids"], batch["labels"], batch.get("position_ids")
        kd = kd_positions(labels, self.mask_alignment, self.distill_tokens, batch.get("attention_mask"))
        if example_lengths is not None and self.mask_alignment == "next_token":
            kd = kd & F.pad(positions[:, 1:] != 0, (0, 1), value=False)  # the next document is no prediction of this
        following = F.pad(labels[:, 1:], (0, 1), value=-100)
        lm = following != -100
        targets = torch.where(lm, following, F.pad(ids[:, 1:], (0, 1), value=0))
        targets = targets.masked_fill(~(kd | lm), -100)
        rows = loss_rows(targets, positions, shift=False, example_lengths=example_lengths)
        return rows | {f"cached_{term}": mark.flatten()[rows["loss_rows"]] for term, mark in (("kd", kd), ("lm", lm))}
