"""What the student meets next."""

from hf_distill.curricula.collators import DataCollatorForDistillation

__all__ = ["DataCollatorForDistillation"]
