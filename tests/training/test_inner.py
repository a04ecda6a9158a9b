"""Inner steps: what learns beside the student by an optimizer of its own, and leaves no trace on anything else."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import nn

from hf_distill import DistillTrainer, FrozenTeacher, LogitKD
from hf_distill.training.inner import HeldOut, InnerObjective, OwnAdam, Run, split_off
from tests.baselines.models import dataset, resnet, vit
from tests.helpers import SGD, plain_arguments

torch.set_num_threads(1)


def run_of(student, step: int = 3, seed: int = 0) -> Run:
    return Run(student, None, step, 0.0, 0.1, seed, Accelerator(cpu=True))


# ---- the optimizer ---------------------------------------------------------------------------------------------------
def test_it_is_not_adam():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    state: dict = {}
    own = OwnAdam(state, "part", dict(model.named_parameters()), lr=0.1, weight_decay=0.05)
    adam = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.05)
    for _ in range(5):
        gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        adam.step()
        own.step(gradients)
        for name, p in model.named_parameters():
            torch.testing.assert_close(state[f"part.{name}"], p.detach())
    assert int(state["part.steps"]) == 5 and not any(value.requires_grad for value in state.values())


def test_long_gradients_are_not_shortened():
    moments = []
    for size in (3.0, 300.0, 0.5):
        state: dict = {}
        OwnAdam(state, "a", {"x": torch.zeros(2)}, lr=0.1, max_norm=1.0).step({"x": size * torch.tensor([0.6, 0.8])})
        moments.append(state["a.x.mean"].norm().item())
    assert moments == pytest.approx([0.1, 0.1, 0.05], rel=1e-4)


# ---- a quiet student -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("training", [True, False])
def test_an_inner_step_leaves_traces_on_the_student(training):
    student = resnet()
    for p in student.classifier.parameters():
        p.requires_grad_(False)
    student.train()
    student.resnet.embedder.eval()
    modes, thawed = [m.training for m in student.modules()], [p.requires_grad for p in student.parameters()]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with run_of(student).quiet(training=training, frozen=True):
        assert student.training == training and not any(p.requires_grad for p in student.parameters())
        torch.autograd.grad(student(pixels).logits.sum(), pixels)
        torch.rand(1), np.random.rand(1), random.random()
    assert [m.training for m in student.modules()] == modes and [
        p.requires_grad for p in student.parameters()
    ] == thawed
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()


def test_random_numbers_of_an_inner_step_are_not_its_own():
    def drawn(**which) -> tuple:
        with run_of(nn.Linear(1, 1), **which).quiet():
            return torch.rand(1).item(), random.random(), float(np.random.rand())

    first = drawn()
    torch.rand(7)
    assert drawn() == first
    assert not set(drawn(step=4)) & set(first) and not set(drawn(seed=1)) & set(first)


# ---- held-out examples -----------------------------------------------------------------------------------------------
def test_held_out_rows_are_trained_on_or_lost():
    data = Dataset.from_dict({"x": list(range(20))})
    rest, part = split_off(data, 0.1, seed=0)
    assert len(part) == 2 and sorted([*rest["x"], *part["x"]]) == list(range(20))
    assert split_off(data, 0.1, seed=0)[1]["x"][:] == part["x"][:]
    assert len({tuple(split_off(data, 0.1, seed=s)[1]["x"][:]) for s in range(5)}) > 1
    lists = split_off(list(range(20)), 0.1, seed=0)
    assert [list(x) for x in lists] == [rest["x"][:], part["x"][:]]
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        split_off(data.select([0]), 0.5, seed=0)
    with pytest.raises(ValueError, match="without streaming"):
        split_off(IterableDataset.from_generator(lambda: iter([{"x": 1}])), 0.5, seed=0)


class Shared(Accelerator):
    """Rank and ranks as told."""

    def __init__(self, rank: int, ranks: int):
        super().__init__(cpu=True)
        self.told = rank, ranks

    process_index = property(lambda self: self.told[0])
    num_processes = property(lambda self: self.told[1])


def test_the_held_out_stream_repeats_or_depends_on_ranks(tmp_path):
    trainer = DistillTrainer(
        vit(), teacher=FrozenTeacher(vit(12, seed=1)), args=plain_arguments(tmp_path), train_dataset=dataset("vit")
    )
    stream = HeldOut(trainer, dataset("vit", 5))
    indices = stream.indices(0, 15)
    assert all(sorted(indices[i : i + 5]) == list(range(5)) for i in (0, 5, 10))
    assert indices[:5] != indices[5:10] or indices[5:10] != indices[10:]
    assert [i for start in (0, 4, 8) for i in stream.indices(start, 4)] == indices[:12]
    run = [Run(None, None, 0, 0.0, 0.1, 0, Shared(rank, 2)) for rank in (0, 1)]
    shares = [stream.batches(4, 7, 2, own) for own in run]
    assert [[len(b["labels"]) for b in share] for share in shares] == [[2, 2], [2, 1]]
    pixels = torch.cat([batch["pixel_values"] for share in shares for batch in share])
    expected = stream.dataset[sorted(range(5))]["pixel_values"][[*indices[4:11:2], *indices[5:11:2]]]
    torch.testing.assert_close(pixels, expected)
    assert "index" not in shares[0][0]  # a column that the model does not read


# ---- in a trainer ----------------------------------------------------------------------------------------------------
class Follower(InnerObjective):
    """Learns the mean pixel of what the student is about to see, by gradients."""

    needs = frozenset({"logits"})
    per = "sample"

    def __init__(self):
        super().__init__()
        self.adam = OwnAdam(self.state, "follower", {"mean": torch.zeros(3)}, lr=0.1)
        self.seen, self.rates = [], []

    def before_step(self, batches, run):
        self.seen.append([len(batch["labels"]) for batch in batches])
        self.rates.append((run.step, run.progress, run.learning_rate))
        (mean,) = self.adam.leaves().values()
        loss = sum(((mean - b["pixel_values"].mean((2, 3))) ** 2).sum() for b in batches)
        gradient, count = run.sum(torch.autograd.grad(loss, mean)[0], torch.tensor(float(sum(self.seen[-1]))))
        self.adam.step({"mean": gradient / count})

    def other_terms(self, student, teacher, progress):
        return {"label": nn.functional.cross_entropy(student.logits, student.labels)}


def trained(folder: Path, rows: int = 10, objective=None, resume=None, **settings) -> DistillTrainer:
    given = SGD | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2) | settings
    trainer = DistillTrainer(
        vit(), teacher=FrozenTeacher(vit(12, seed=1)), objective=objective or Follower(),
        args=plain_arguments(folder, **given), train_dataset=dataset("vit", rows),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_own_part_steps_at_other_times_than_the_student(tmp_path):
    trainer = trained(tmp_path, lr_scheduler_type="linear")
    objective = trainer.objective
    assert objective.seen == [[2, 2], [2, 2], [2]] * 2
    assert objective.rates == [(i, i / 6, pytest.approx(0.1 * (1 - i / 6))) for i in range(6)]
    before = {name: value.clone() for name, value in objective.state_tensors().items()}
    trainer.evaluate(trainer.train_dataset)
    assert len(objective.seen) == 6 and all(before[k].equal(v) for k, v in objective.state_tensors().items())


def test_a_sum_loses_the_inner_step(tmp_path):
    alone = trained(tmp_path / "a").objective.state_tensors()
    together = trained(tmp_path / "b", objective=LogitKD(per="sample") + 0.5 * Follower()).objective.state_tensors()
    assert {name.split("/")[-1] for name in together} == alone.keys()
    assert all(together[name].equal(alone[name.split("/")[-1]]) for name in together)


def test_the_own_part_does_not_resume(tmp_path):
    whole = trained(tmp_path / "a", save_strategy="steps", save_steps=2)
    again = trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert again.objective.seen == whole.objective.seen[2:]
    ours, expected = again.objective.state_tensors(), whole.objective.state_tensors()
    assert all(value.equal(expected[name]) for name, value in ours.items())
    saved = json.loads((tmp_path / "a" / "checkpoint-6" / "config.json").read_text())
    assert "follower" not in str(saved)


def test_the_split_of_a_window_moves_the_own_part_elsewhere(tmp_path):
    settings = dict(num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    one, two = trained(tmp_path / "a", **settings), trained(tmp_path / "b", num_train_epochs=1)
    for name, value in one.objective.state_tensors().items():
        torch.testing.assert_close(two.objective.state[name], value)


def test_a_sharded_student_is_stepped_through(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.training.compat.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="Follower runs the whole student outside its wrapper"):
        trained(tmp_path)
