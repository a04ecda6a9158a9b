"""A teacher whose classes stand in another order."""

import copy

import pytest
import torch

from hf_distill import FrozenTeacher
from hf_distill.baselines import HintonKD
from hf_distill.signals import SparseLogits
from hf_distill.teachers import RelabelledTeacher
from hf_distill.teachers.base import Teacher
from tests.baselines.models import dataset, trainer, vit


def batch() -> dict:
    rows = dataset("vit", 4)[:]
    return {"pixel_values": rows["pixel_values"], "labels": rows["labels"]}


def test_logits_stand_in_the_teachers_order():
    model = vit(seed=2)
    order = [2, 0, 1]
    teacher = RelabelledTeacher(FrozenTeacher(model), order, ["a", "b", "c"])
    expected = model(pixel_values=batch()["pixel_values"]).logits[:, order]
    torch.testing.assert_close(teacher(batch()).logits, expected)
    assert teacher.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.id2label[0] == "LABEL_0"


def test_a_student_learns_another_permutation(tmp_path):
    """Permuted heads, put in order again, train the very student that the plain teacher trains."""
    plain, order = vit(12, 3, seed=2), [2, 0, 1]
    permuted = copy.deepcopy(plain)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(permuted.classifier, name)[order] = getattr(plain.classifier, name).clone()
    students = []
    for name, teacher in (("a", plain), ("b", RelabelledTeacher(FrozenTeacher(permuted), order, ["x", "y", "z"]))):
        done = trainer(tmp_path / name, "vit", HintonKD(), student=vit(seed=1), teacher=plain)
        done.teacher = teacher if isinstance(teacher, RelabelledTeacher) else done.teacher
        done.train()
        students.append(done.student())
    for ours, theirs in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_classes_of_a_larger_teacher_are_left_in_its_softmax(tmp_path):
    teacher = RelabelledTeacher(FrozenTeacher(vit(seed=2)), [2, 0], ["x", "y"])
    assert teacher(batch()).logits.shape == (4, 2) and teacher.config.num_labels == 2


def test_an_order_that_is_none_is_taken():
    teacher = FrozenTeacher(vit(seed=2))
    for order, names in (([0, 1], ["a"]), ([0, 0], ["a", "b"])):
        with pytest.raises(ValueError, match="a different class for each"):
            RelabelledTeacher(teacher, order, names)


def test_sparse_logits_are_put_in_a_wrong_order():
    class Sparse(Teacher):
        def __call__(self, batch, needs=frozenset({"logits"})):
            from hf_distill import Signals

            return Signals(logits=SparseLogits(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)))

    with pytest.raises(ValueError, match="mode logits"):
        RelabelledTeacher(Sparse(), [1, 0], ["a", "b"])(batch())
