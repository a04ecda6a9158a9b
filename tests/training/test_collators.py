"""The collator must say exactly which positions carry loss, of which document and example."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import DataCollatorForDistillation
from hf_distill.curricula.collators import loss_rows
from hf_distill.heads import ROW_KEYS
from hf_distill.signals import Rows

PADDED = DataCollatorForLanguageModeling(pad_token_id=0)
FLAT = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def example(length: int, prompt: int = 0, start: int = 5, **more) -> dict:
    ids = list(range(start, start + length))
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], **more}


def by_loop(labels: torch.Tensor, shift: bool) -> list[tuple[int, int, int]]:
    """(flat position, label, row) of each loss position."""
    found = []
    for b, row in enumerate(labels.tolist()):
        for s in range(len(row) - shift):
            if row[s + shift] != -100:
                found.append((b * len(row) + s, row[s + shift], b))
    return found


@pytest.mark.parametrize("shift", [True, False])
def test_rows_of_a_padded_batch_match_a_loop(shift):
    labels = torch.tensor([[-100, 3, 4, -100], [-100, -100, -100, -100], [7, 8, -100, 9]])
    rows = loss_rows(labels, shift=shift)
    expected = by_loop(labels, shift)
    assert rows["loss_rows"].tolist() == [e[0] for e in expected]
    assert rows["row_labels"].tolist() == [e[1] for e in expected]
    assert rows["document_example"][rows["row_document"]].tolist() == [e[2] for e in expected]
    assert rows["document_example"].tolist() == [0, 2], "a row without labels is no sample"


def test_rows_of_packed_documents_belong_to_their_example():
    """Two packed examples: documents of 3 and 2 tokens, then one of 4 whose prompt carries no loss."""
    labels = torch.tensor([[-100, 6, 7, -100, 9, -100, -100, 12, 13]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    rows = loss_rows(labels, positions, example_lengths=[5, 4])
    assert rows["loss_rows"].tolist() == [0, 1, 3, 6, 7]
    assert rows["row_document"].tolist() == [0, 0, 1, 2, 2]
    assert rows["document_example"].tolist() == [0, 0, 1]


def test_the_wrapped_collators_batch_is_kept_and_only_known_keys_are_added():
    features = [example(4, prompt=2), example(6)]
    batch = DataCollatorForDistillation(PADDED)(features)
    plain = PADDED(features)
    assert set(batch) - set(plain) == set(ROW_KEYS)
    for key, value in plain.items():
        assert torch.equal(batch[key], value)
    assert len(batch["loss_rows"]) == 2 + 5
    targets = batch["labels"][:, 1:].flatten()
    assert torch.equal(batch["row_labels"], targets[targets != -100])


def test_padding_free_and_padded_batches_hold_the_same_answers():
    features = [example(4, prompt=1), example(6, prompt=3), example(3)]
    padded, flat = (DataCollatorForDistillation(base)(features) for base in (PADDED, FLAT))
    assert torch.equal(padded["row_labels"], flat["row_labels"])
    assert torch.equal(padded["row_document"], flat["row_document"])
    assert torch.equal(padded["document_example"], flat["document_example"])
    ids = (batch["input_ids"].flatten()[batch["loss_rows"]] for batch in (padded, flat))
    assert torch.equal(*ids)


@pytest.mark.parametrize("base", [PADDED, FLAT])
def test_cached_tokens_arrive_at_the_rows_they_describe(base):
    """Entry s of a column describes the prediction made at position s."""
    features = [example(n, prompt=p, start=10 * i) for i, (n, p) in enumerate([(4, 1), (6, 3), (3, 0)], 1)]
    for feature in features:
        feature["topk"] = [[token, token + 100] for token in feature["input_ids"]]
        feature["domain"] = feature["input_ids"][0]
    collate = DataCollatorForDistillation(base, token_columns=("topk",), example_columns=("domain",))
    batch = collate(features)
    at_rows = batch["input_ids"].flatten()[batch["loss_rows"]]
    assert torch.equal(batch["cached_topk"], torch.stack([at_rows, at_rows + 100], 1))
    assert batch["cached_domain"].tolist() == [10, 20, 30]
    assert "topk" not in batch and "domain" not in batch


def test_a_teacher_with_inputs_of_its_own_gets_rows_of_its_own():
    longer = [example(4, prompt=2), example(5, prompt=3)]
    features = []
    for feature in longer:
        hint = [40, 41, 42]
        own = {"teacher_input_ids": hint + feature["input_ids"], "teacher_labels": [-100] * 3 + feature["labels"]}
        features.append(feature | own)
    batch = DataCollatorForDistillation(PADDED)(features)
    assert torch.equal(batch["row_labels"], batch["teacher_row_labels"])
    assert batch["teacher_input_ids"].shape[1] == batch["input_ids"].shape[1] + 3
    ids = [batch[k + "input_ids"].flatten()[batch[k + "loss_rows"]] for k in ("", "teacher_")]
    assert torch.equal(*ids)


def test_a_teacher_with_another_answer_is_refused():
    features = [example(4, prompt=2) | {"teacher_input_ids": [1, 2, 3], "teacher_labels": [-100, 2, 3]}]
    features[0]["teacher_labels"] = [-100, -100, 3]
    with pytest.raises(ValueError, match=r"\[1\] loss positions per document, the student's \[2\]"):
        DataCollatorForDistillation(PADDED)(features)


def test_ids_outside_the_shared_vocabulary_are_named():
    collate = DataCollatorForDistillation(PADDED, vocabulary=8)
    collate([example(3)])
    with pytest.raises(ValueError, match="input_ids holds token id 8 .*ids 0 to 7"):
        collate([example(3), example(4)])


def test_row_keys_are_those_of_the_signals():
    assert len(ROW_KEYS) == len(Rows.__dataclass_fields__)
