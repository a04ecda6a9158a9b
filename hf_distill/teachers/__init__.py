"""Teachers: whatever says something about a batch, behind one call."""

from hf_distill.teachers.base import Teacher
from hf_distill.teachers.frozen import AdapterOffTeacher, FrozenTeacher, load_teacher

__all__ = ["AdapterOffTeacher", "FrozenTeacher", "Teacher", "load_teacher"]
