"""The rows of a batch that KD and the label loss count, against the positions of the pure functions."""

import pytest
import torch

from hf_distill.curricula.collators import DataCollatorForDistillation
from hf_distill.curricula.mimic import MimicRows
from hf_distill.losses.mimic import kd_positions

LABELS = torch.tensor([[-100, -100, 3, 4, 1, -100], [-100, 7, 8, 2, 5, 1]])
IDS = torch.tensor([[11, 12, 3, 4, 1, 0], [13, 7, 8, 2, 5, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
MODES = [(tokens, alignment) for tokens in ("response", "all") for alignment in ("next_token", "official")]


def rows(batch, tokens, alignment, features=({},) * 2, common=20):
    base = DataCollatorForDistillation(lambda _: batch)
    return MimicRows(base, common, tokens, alignment)(list(features))


@pytest.mark.parametrize(("tokens", "alignment"), MODES)
def test_rows_are_not_those_of_the_pure_functions(tokens, alignment):
    batch = rows({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}, tokens, alignment)
    kd, lm = kd_positions(LABELS, alignment, tokens, MASK).flatten(), kd_positions(LABELS).flatten()
    assert batch["loss_rows"].tolist() == (kd | lm).nonzero().flatten().tolist()
    following = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1).flatten()[batch["loss_rows"]]
    mine = following != -100
    assert torch.equal(batch["row_labels"][mine], following[mine]) and (batch["row_labels"] >= 0).all()
    if (tokens, alignment) == MODES[0]:
        assert "cached_kd" not in batch, "one set of rows needs no marks"
        return
    assert torch.equal(batch["cached_kd"], kd[batch["loss_rows"]])
    assert torch.equal(batch["cached_lm"], lm[batch["loss_rows"]]) and torch.equal(batch["cached_lm"], mine)
    assert batch["row_document"].tolist() == (batch["loss_rows"] // 6).tolist()


@pytest.mark.parametrize(("tokens", "alignment"), MODES)
def test_packed_documents_see_each_other(tokens, alignment):
    """Documents of 3 and 4 tokens in one row; their rows are those they have alone."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    ids = torch.tensor([[11, 3, 1, 12, 13, 4, 1]])
    labels = torch.tensor([[-100, 3, 1, -100, -100, 4, 1]])
    features = [{"input_ids": [0] * 3}, {"input_ids": [0] * 4}]
    packed = rows({"input_ids": ids, "labels": labels, "position_ids": positions}, tokens, alignment, features)
    alone, start = [], 0
    for length in (3, 4):
        own = slice(start, start + length)
        part = {"input_ids": ids[:, own], "labels": labels[:, own], "attention_mask": torch.ones(1, length).long()}
        made = rows(part, tokens, alignment, ({},))
        marks = made.get("cached_kd", torch.ones_like(made["loss_rows"])).bool()
        alone += [(int(row) + start, bool(mark)) for row, mark in zip(made["loss_rows"], marks, strict=True)]
        start += length
    marks = packed.get("cached_kd", torch.ones_like(packed["loss_rows"])).bool()
    assert list(zip(packed["loss_rows"].tolist(), marks.tolist(), strict=True)) == alone
    assert packed["document_example"].tolist() == [0, 1]


def test_labels_beyond_the_common_vocabulary_are_trained_on():
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    assert "loss_rows" in rows(batch, "response", "next_token", common=9)
    with pytest.raises(ValueError, match=r"label 8 at \[1, 2\] of a batch lies beyond the 8 entries"):
        rows(batch, "response", "next_token", common=8)
