"""Students as functions, model -> model."""

from hf_distill.students.from_teacher import from_teacher

__all__ = ["from_teacher"]
