"""ULD over rows of two heads, tile by tile."""

from functools import partial

import pytest
import torch

from hf_distill.losses import uld_loss
from hf_distill.losses.aligned import aligned_sum
from hf_distill.losses.cross_tokenizer import hybrid_distance, matched_ids, sorted_distance
from hf_distill.signals import HeadLogits

VS, VT, WIDTH = 7, 9, 5
# of two answers "abcdef" that both sides cut differently, without end tokens: rows of one batch, one after the other
GROUPS = torch.tensor([[0, 1, 0, 2], [1, 3, 2, 3], [3, 4, 3, 6], [5, 7, 7, 8], [7, 8, 8, 10]])
OWNER = torch.tensor([0, 0, 0, 1, 1])
STUDENT = {f"s{i}": i for i in range(4)} | {"x": 4, "y": 5, "z": 6}
TEACHER = {f"t{i}": i for i in range(6)} | {"y": 6, "x": 7, "t8": 8}
HYBRID = dict(matched_weight=None, unmatched_weight=None, beta=0.3)


def heads(dtype=torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    student = HeadLogits(
        torch.randn(8, WIDTH, dtype=dtype).requires_grad_(),
        torch.randn(VS, WIDTH, dtype=dtype).requires_grad_(),
        torch.randn(VS, dtype=dtype).requires_grad_(),
        scale=0.7,
        softcap=4.0,
    )
    teacher = HeadLogits(torch.randn(10, 6, dtype=dtype), torch.randn(VT, 6, dtype=dtype))
    return student, teacher, torch.randint(0, VS, (8,)), torch.randint(0, VT, (10,))


def dense_loss(student, teacher, s_labels, t_labels, hybrid: bool):
    """uld_loss of the same rows, laid out as sequences whose bytes give the same groups."""
    values, names = [], dict(student_vocab=STUDENT, teacher_vocab=TEACHER) if hybrid else {}
    for document in (0, 1):
        own = GROUPS[OWNER == document]
        sides = []
        for rows, labels, (first, last) in (
            (student.dense(), s_labels, own[:, :2].T),
            (teacher.dense(), t_labels, own[:, 2:].T),
        ):
            begin, end = int(first[0]), int(last[-1])
            ends = torch.zeros(end - begin, dtype=torch.int64)
            for k, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                inner = torch.arange(b - a - 1)  # no two sides end inside a group at the same byte
                ends[a - begin : b - 1 - begin] = 100 * k + 10 + inner * 3 + (0 if rows.shape[1] == VS else 1)
                ends[b - 1 - begin] = 100 * (k + 1)
            ids = torch.cat([torch.tensor([0]), labels[begin:end]])
            sequence = torch.cat([rows[begin:end], rows[:1].detach()])  # the last position predicts nothing
            offsets = [[[0, 0], *[[0, e] for e in ends.tolist()]]]
            sides.append((sequence[None], torch.cat([torch.tensor([-100]), ids[1:]])[None], ids[None], offsets))
        (s, s_lab, s_ids, s_off), (t, t_lab, t_ids, t_off) = sides
        values.append(
            uld_loss(
                s, t, s_lab, t_lab, s_ids, t_ids, 1.5, 0.8, skip_eos=False, student_offsets=s_off,
                teacher_offsets=t_off, beta=0.3, **names,
            )
        )  # fmt: skip
    return torch.stack(values).mean()


@pytest.mark.parametrize("tile_bytes", [None, 1, 2500])
@pytest.mark.parametrize("hybrid", [False, True])
def test_value_and_gradient_are_those_of_the_dense_loss_whatever_the_tiles(hybrid, tile_bytes):
    student, teacher, s_labels, t_labels = heads()
    distance = sorted_distance
    if hybrid:
        ids = matched_ids(STUDENT, TEACHER, VS, VT)
        distance = partial(hybrid_distance, student_ids=ids[0], teacher_ids=ids[1], **HYBRID)
    weights = 1 / OWNER.bincount()[OWNER].double() / 2
    settings = dict(student_temperature=1.5, teacher_temperature=0.8, tile_bytes=tile_bytes)
    ours = aligned_sum(student, teacher, s_labels, t_labels, GROUPS, weights, distance, **settings)
    dense = dense_loss(student, teacher, s_labels, t_labels, hybrid)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-12)
    leaves = [student.hidden, student.weight, student.bias]
    expected = torch.autograd.grad(3 * dense, leaves)
    for mine, theirs in zip(torch.autograd.grad(3 * ours, leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    logits = student.dense().detach().requires_grad_()  # a model whose head cannot be taken apart
    whole = aligned_sum(logits, teacher.dense(), s_labels, t_labels, GROUPS, weights, distance, **settings)
    torch.testing.assert_close(whole, ours)
    student.dense().backward(torch.autograd.grad(3 * whole, logits)[0])
    torch.testing.assert_close(student.hidden.grad, expected[0], rtol=1e-10, atol=1e-12)


def test_the_same_head_is_zero_and_the_order_of_the_teachers_tokens_does_not_matter():
    student, teacher, s_labels, t_labels = heads()
    same = GROUPS[:, [0, 1, 0, 1]]
    ones = torch.ones(len(GROUPS))
    value = aligned_sum(student, student, s_labels, s_labels, same, ones, sorted_distance)
    assert value == 0
    order = torch.randperm(VT)
    moved = HeadLogits(teacher.hidden, teacher.weight[order])
    values = [
        aligned_sum(student, head, s_labels, labels, GROUPS, ones, sorted_distance)
        for head, labels in ((teacher, t_labels), (moved, order.argsort()[t_labels]))
    ]
    torch.testing.assert_close(*values)


def test_no_tile_is_as_large_as_all_rows(monkeypatch):
    student, teacher, s_labels, t_labels = heads(torch.float32)
    seen = []
    dense = HeadLogits.dense
    monkeypatch.setattr(HeadLogits, "dense", lambda self: seen.append(self.shape[0]) or dense(self))
    aligned_sum(student, teacher, s_labels, t_labels, GROUPS, torch.ones(5), sorted_distance, tile_bytes=1)
    assert len(seen) == 2 * len(GROUPS) and max(seen) == 3


def test_without_groups_or_gradients():
    student, teacher, s_labels, t_labels = heads()
    none = aligned_sum(student, teacher, s_labels, t_labels, GROUPS[:0], torch.ones(0), sorted_distance)
    none.backward()
    assert none == 0 and (student.weight.grad == 0).all()
    with torch.no_grad():
        value = aligned_sum(student, teacher, s_labels, t_labels, GROUPS, torch.ones(5), sorted_distance)
    assert not value.requires_grad and value > 0
