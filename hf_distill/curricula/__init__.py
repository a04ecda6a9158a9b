"""What the student meets next."""

from hf_distill.curricula.collators import DataCollatorForDistillation
from hf_distill.curricula.seeded import SeededAugmentation

__all__ = ["DataCollatorForDistillation", "SeededAugmentation"]
