"""Passes over the training set: what is added up, what is kept, and what is left alone."""

import random

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file

from hf_distill import FrozenTeacher, LogitKD, PeerTeacher
from hf_distill.curricula.passes import run_pass
from hf_distill.teachers import EnsembleTeacher, RelabelledTeacher
from tests.baselines.models import bert, dataset, trainer, vit
from tests.curricula.pass_worker import CLASSES, NEEDS, Counting, class_sums
from tests.launching import run_worker


def made(folder, family="vit", n=11, **settings):
    return trainer(folder, family, LogitKD(), n=n, **settings)


def by_loop(run) -> dict:
    """The same sums, one example at a time."""
    sums = {"sum": 0.0, "count": 0.0}
    with torch.no_grad():
        for example in run.train_dataset:
            batch = run.data_collator([example])
            more = class_sums(run.teacher(batch, NEEDS))
            sums = {key: sums[key] + more[key].double() for key in sums}
    return sums


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_sums_differ_from_those_of_a_loop(tmp_path, family):
    run = made(tmp_path, family)
    sums = run_pass(run, "means", class_sums, needs=NEEDS, block_examples=5)
    reference = by_loop(run)
    assert sums["count"].tolist() == [4.0, 4.0, 3.0]  # a ragged end of batches and blocks, nothing twice
    torch.testing.assert_close(sums["sum"], reference["sum"], rtol=1e-6, atol=1e-6)
    assert sums["sum"].dtype == torch.float64 and sums["sum"].shape == (CLASSES, 12)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_the_sums_depend_on_the_blocks(tmp_path, block):
    run = made(tmp_path, per_device_eval_batch_size=3)
    sums = run_pass(run, "means", class_sums, needs=NEEDS, block_examples=block)
    torch.testing.assert_close(sums, by_loop(run), rtol=1e-6, atol=1e-6)


def test_a_second_run_asks_the_teacher_again(tmp_path):
    first = run_pass(made(tmp_path), "means", class_sums, needs=NEEDS)
    again = Counting()
    second = run_pass(made(tmp_path), "means", again, needs=NEEDS)
    assert again.calls == 0
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / "_passes").iterdir()] == ["means"]


def test_a_killed_pass_repeats_finished_blocks(tmp_path):
    run = made(tmp_path)
    dying = Counting(dies_at=4)
    with pytest.raises(KeyboardInterrupt):
        run_pass(run, "means", dying, needs=NEEDS, block_examples=3)
    assert [p.name[-7:] for p in (tmp_path / "_passes").iterdir()] == [".part-0"]
    rest = Counting()
    sums = run_pass(made(tmp_path), "means", rest, needs=NEEDS, block_examples=3)
    assert dying.seen == 9 and rest.seen == 2
    torch.testing.assert_close(sums, by_loop(run), rtol=1e-6, atol=1e-6)
    assert [p.suffix for p in (tmp_path / "_passes").iterdir()] == [".safetensors"]


def test_a_damaged_file_is_believed(tmp_path):
    run = made(tmp_path)
    sums = run_pass(run, "means", class_sums, needs=NEEDS)
    (path,) = (tmp_path / "_passes").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    again = Counting()
    torch.testing.assert_close(run_pass(run, "means", again, needs=NEEDS), sums, rtol=0, atol=0)
    assert again.seen == 11


def other_label(data):
    column = [(i + (i == 7)) % CLASSES for i in range(len(data))]
    return data.remove_columns("labels").add_column("labels", column)


CHANGES = {
    "teacher": lambda run: run.teacher.model.classifier.weight.data.add_(1e-3),
    "teachers": lambda run: setattr(run, "teacher", EnsembleTeacher([run.teacher, FrozenTeacher(vit(12, 3, seed=9))])),
    "order": lambda run: setattr(run, "teacher", RelabelledTeacher(run.teacher, [2, 0, 1], ["a", "b", "c"])),
    "examples": lambda run: setattr(run, "train_dataset", dataset("vit", 10)),
    "labels": lambda run: setattr(run, "train_dataset", other_label(run.train_dataset)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_or_other_data_find_the_same_file(tmp_path, change):
    logits = frozenset({"logits"})

    def logit_sum(signals):
        return {"sum": _mixed(signals.logits).sum(0)}

    run = made(tmp_path)
    run_pass(run, "logits", logit_sum, needs=logits)
    CHANGES[change](run)
    run_pass(run, "logits", logit_sum, needs=logits)
    assert len(list((tmp_path / "_passes").iterdir())) == 2


def _mixed(logits):
    return logits if torch.is_tensor(logits) else sum(logits.parts)


def test_two_orders_of_classes_find_the_same_file(tmp_path):
    run = made(tmp_path)
    inner = run.teacher
    for order in ([2, 0, 1], [1, 2, 0]):
        run.teacher = RelabelledTeacher(inner, order, ["a", "b", "c"])
        run_pass(run, "logits", lambda signals: {"sum": signals.logits.sum(0)}, needs=frozenset({"logits"}))
    assert len(list((tmp_path / "_passes").iterdir())) == 2


def test_one_teacher_inside_an_ensemble_can_change_unseen(tmp_path):
    def logit_sum(signals):
        return {"sum": _mixed(signals.logits).sum(0)}

    run = made(tmp_path)
    for seed in (8, 9):
        run.teacher = EnsembleTeacher(
            {"a": FrozenTeacher(vit(12, 3, seed=7)), "b": FrozenTeacher(vit(12, 3, seed=seed))}
        )
        run_pass(run, "logits", logit_sum, needs=frozenset({"logits"}))
    assert len(list((tmp_path / "_passes").iterdir())) == 2


def test_a_pass_moves_random_states_modes_or_weights(tmp_path):
    run = made(tmp_path)
    run.model.train()
    before = {n: p.clone() for n, p in run.model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run_pass(run, "means", class_sums, needs=NEEDS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert run.model.training and not any(m.training for m in run.teacher.model.modules())
    assert all(torch.equal(value, before[n]) for n, value in run.model.state_dict().items())
    assert all(p.grad is None for p in run.teacher.model.parameters())


def test_two_ranks_add_up_otherwise_than_one(tmp_path):
    run_worker("tests/curricula/pass_worker.py", tmp_path, ranks=2)
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1)]
    reference = run_pass(made(tmp_path / "one", n=14), "means", class_sums, needs=NEEDS, block_examples=3)
    for rank in ranks:
        for key, value in reference.items():
            torch.testing.assert_close(rank[f"whole.{key}"], value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(rank[f"small.{key}"], value, rtol=1e-12, atol=1e-12)
    # killed on two ranks, finished on one, which keeps the blocks of both
    assert [rank["seen"].item() for rank in ranks] == [3, 3]
    rest = Counting()
    resumed = run_pass(made(tmp_path / "killed", n=14), "means", rest, needs=NEEDS, block_examples=3)
    assert rest.seen == 8
    torch.testing.assert_close(resumed, reference, rtol=1e-12, atol=1e-12)
    assert len(list((tmp_path / "killed" / "_passes").iterdir())) == 1


class TestRefusals:
    def test_settings_that_cannot_work(self, tmp_path):
        run = made(tmp_path)
        with pytest.raises(ValueError, match="block_examples must be at least 1, got 0"):
            run_pass(run, "means", class_sums, needs=NEEDS, block_examples=0)
        run.train_dataset = IterableDataset.from_generator(lambda: iter(()))
        with pytest.raises(ValueError, match="training set with a length"):
            run_pass(run, "means", class_sums, needs=NEEDS)
        run.train_dataset = []
        with pytest.raises(ValueError, match="empty"):
            run_pass(run, "means", class_sums, needs=NEEDS)

    def test_teachers_that_cannot_tell(self, tmp_path):
        run = made(tmp_path)
        run.teacher = PeerTeacher(vit(seed=4))
        with pytest.raises(ValueError, match="changes while the student trains"):
            run_pass(run, "means", class_sums, needs=NEEDS)
        run.teacher = EnsembleTeacher([FrozenTeacher(vit(seed=4)), FrozenTeacher(vit(seed=5))])
        with pytest.raises(ValueError, match="EnsembleTeacher gives only logits"):
            run_pass(run, "means", class_sums, needs=NEEDS)
        run.teacher = None
        with pytest.raises(ValueError, match="the trainer has none"):
            run_pass(run, "means", class_sums, needs=NEEDS)

    def test_sums_that_change_or_are_not_finite(self, tmp_path):
        run = made(tmp_path)
        with pytest.raises(ValueError, match="same names and shapes"):
            run_pass(run, "rows", lambda signals: {"all": signals.logits}, needs=frozenset({"logits"}))
        with pytest.raises(FloatingPointError, match="'all' of the pass 'bad'"):
            run_pass(run, "bad", lambda signals: {"all": signals.logits.sum() / 0}, needs=frozenset({"logits"}))


def test_the_collator_sees_unused_columns(tmp_path):
    data = dataset("bert", 4).add_column("text", ["words"] * 4)
    run = trainer(tmp_path, "bert", LogitKD(), student=bert(), n=4)
    run.train_dataset = data
    assert run_pass(run, "means", class_sums, needs=NEEDS)["count"].sum() == 4
