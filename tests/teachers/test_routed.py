"""Routed teachers: each example answered by its own teacher, which runs on nothing else."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_distill import (
    EnsembleTeacher,
    FrozenTeacher,
    RoutedTeacher,
)
from hf_distill.signals import HeadLogits, Signals, SparseLogits
from hf_distill.teachers.mixing import batch_of_examples
from tests.helpers import (
    tiny_llama,
    tiny_tokenizer,
)
from tests.teachers.test_ensemble import (
    TEXTS,
    Stored,
    class_batch,
    classifier,
    dense,
    llamas,
    routed_batch,
)
from tests.teachers.test_frozen import batch_of


def test_a_routed_example_is_answered_by_another_or_moved():
    teachers = {t.name: t for t in llamas(3)}
    router = RoutedTeacher(teachers)
    route = [2, 0, 0, 2, 1]
    batch = routed_batch(route)
    said = router(batch)
    answers = dense(said.logits)
    assert torch.equal(said.labels, batch["row_labels"])
    width, row = batch["input_ids"].shape[1], 0
    for example, text in enumerate(TEXTS):
        alone = list(teachers.values())[route[example]](batch_of([text])).logits.dense().softmax(-1)
        rows = batch["loss_rows"] // width == example
        torch.testing.assert_close(answers[rows], alone, atol=1e-5, rtol=1e-5)
        row += len(alone)
    assert row == len(answers)
    names = list(teachers)
    by_name = router(batch | {"cached_teacher": [names[i] for i in route]})
    assert torch.equal(dense(by_name.logits), answers)


def test_a_batch_of_one_domain_is_a_mixture():
    teachers, batch = llamas(2), routed_batch([1] * 5)
    said = RoutedTeacher(teachers)(batch).logits
    assert isinstance(said, HeadLogits)
    torch.testing.assert_close(said.hidden, teachers[1](batch).logits.hidden)


def test_routed_flops_grow_with_the_number_of_teachers():
    counts = []
    for number in (1, 2, 4):
        teachers = [FrozenTeacher(tiny_llama(seed=m), tiny_tokenizer(), name=f"t{m}") for m in range(number)]
        batch = routed_batch([i % number for i in range(4)], TEXTS[:4])
        with FlopCounterMode(display=False) as counter:
            RoutedTeacher(teachers)(batch)
        with FlopCounterMode(display=False) as mixed:
            EnsembleTeacher(teachers)(batch)
        counts.append((counter.get_total_flops(), mixed.get_total_flops()))
    assert len({routed for routed, _ in counts}) == 1
    assert [mixed / counts[0][0] for _, mixed in counts] == [1, 2, 4]


def test_routed_classifiers_or_caches_become_a_mixture():
    models, batch, route = [classifier(0), classifier(1)], class_batch(), [1, 0, 1, 1, 0]
    said = RoutedTeacher(models)(batch | {"cached_teacher": torch.tensor(route)}).logits
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        both = [model(**inputs).logits for model in models]
    torch.testing.assert_close(said, torch.stack([both[m][i] for i, m in enumerate(route)]))

    a = SparseLogits(torch.tensor([[3, 7]]), torch.tensor([[0.5, 0.2]]).log())
    b = SparseLogits(torch.tensor([[4], [5]]), torch.tensor([[0.3], [0.4]]).log())
    batch = {"labels": torch.tensor([0, 1, 2]), "cached_teacher": torch.tensor([1, 0, 1])}
    merged = RoutedTeacher([Stored("a", a), Stored("b", b)])(batch).logits
    assert merged.ids[:, 0].tolist() == [4, 3, 5]
    torch.testing.assert_close(merged.log_probs.exp(), torch.tensor([[0.3, 0.0], [0.5, 0.2], [0.4, 0.0]]))


def test_an_ensemble_among_routed_teachers_loses_its_weights():
    a, b, c = llamas(3)
    for space in ("probability", "logit"):
        router = RoutedTeacher({"ab": EnsembleTeacher([a, b], [0.3, 0.7], space), "c": c})
        batch = routed_batch([0, 1, 1, 0, 0])
        said = dense(router(batch).logits)
        ensemble = dense(EnsembleTeacher([a, b], [0.3, 0.7], space)(batch).logits)
        alone = c(batch).logits.dense().softmax(-1)
        first = torch.isin(batch["loss_rows"] // batch["input_ids"].shape[1], torch.tensor([0, 3, 4]))
        torch.testing.assert_close(said, torch.where(first[:, None], ensemble, alone))


def test_a_part_of_a_batch_is_not_what_collating_that_part_gives():
    whole = batch_of(TEXTS) | {"cached_k": torch.arange(14) * 10, "cached_domain": torch.arange(5)}
    whole |= {"teacher_" + k: v for k, v in batch_of(TEXTS).items()}
    assert len(whole["loss_rows"]) == 14
    part = batch_of_examples(whole, torch.tensor([1, 2, 4]), {"cached_k"})
    padded = batch_of([TEXTS[1], TEXTS[2], TEXTS[4]])  # the longest text is among them: the same padding
    for prefix in ("", "teacher_"):
        assert all(torch.equal(part[prefix + k], v) for k, v in padded.items())
    assert part["cached_domain"].tolist() == [1, 2, 4]
    assert part["cached_k"].tolist() == [30, 40, 50, 60, 70, 100, 110, 120, 130]
    with pytest.raises(ValueError, match=r"cached_k of shape \(14,\) cannot be divided .* token_columns="):
        batch_of_examples(whole, torch.tensor([0]))


def test_a_route_to_nowhere_is_taken():
    teachers = llamas(2)
    router = RoutedTeacher(teachers, "domain")
    with pytest.raises(ValueError, match=r"no column 'domain': .*example_columns=\('domain',\)"):
        router(batch_of())
    for wrong in (torch.tensor([0, 2]), torch.tensor([0, -1]), ["t0", "chemistry"]):
        with pytest.raises(ValueError, match=r"there is no teacher .*: they are t0, t1 \(0 to 1\)"):
            router(batch_of() | {"cached_domain": wrong})
    packed = {"input_ids": torch.ones(1, 9).long(), "labels": torch.ones(1, 9).long(), "cached_domain": [0, 1]}
    with pytest.raises(ValueError, match="routes 2 examples, the batch has 1 rows: a packed .* padding_free=False"):
        router(packed)
    assert [router.number(n) for n in ("t0", "t1", 1)] == [0, 1, 1]


def test_a_rank_without_examples_leaves_the_others_waiting():
    """Sharded teachers gather their weights in the forward: every rank must run each of them."""
    calls = []

    class Watched(Stored):
        def __call__(self, batch, needs=frozenset({"logits"})):
            calls.append((self.name, len(batch["labels"])))
            return Signals(logits=torch.zeros(len(batch["labels"]), 3))

    router = RoutedTeacher([Watched("a", None), Watched("b", None), Watched("c", None)])
    batch = class_batch() | {"cached_teacher": torch.tensor([2, 0, 0, 2, 2])}
    router(batch)
    assert calls == [("a", 2), ("c", 3)]
    router.together = True
    assert router(batch).logits.shape == (5, 3)
    assert calls[2:] == [("a", 2), ("b", 1), ("c", 3)]
