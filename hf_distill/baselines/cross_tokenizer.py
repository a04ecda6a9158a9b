"""Universal logit distillation (ULD; as in TRL's GOLD trainer): a teacher with another tokenizer.

    DistillSFTTrainer(student, teacher="Qwen/Qwen2.5-7B-Instruct", objective=ULD(), train_dataset=..., args=...)

The two distributions over the same bytes of the answer are compared without saying which token is which: by the
distance of their sorted probabilities. The hybrid form compares tokens that both vocabularies hold by name, and sorts
the others.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from hf_distill.curricula.alignment import ALIGNMENT
from hf_distill.losses import LabelCrossEntropy
from hf_distill.losses.aligned import aligned_sum
from hf_distill.losses.cross_tokenizer import hybrid_distance, matched_ids, sorted_distance
from hf_distill.losses.tile import Divergence
from hf_distill.objectives import Objective
from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.own_tokens import OWN_LOGITS


class ULD(Objective):
    """loss = label_weight · CE(labels) + weight · mean over answers of the mean over their aligned groups of ULD.

    See `hf_distill.losses.uld_loss` for the distance; strategy "bayesian" with byte alignment. Needs DistillSFTTrainer,
    which tokenises and aligns the answers once.

    Paper: our cross-entropy weighs 1 by default, TRL's 0: sorted probabilities do not say which token they belong to,
    so a student that cannot talk yet learns nothing but the shape of a distribution from them alone.

    Args:
        hybrid: compare tokens with the same string in both vocabularies directly.
        weight: of the distance.
        label_weight: of the cross-entropy with the labels, in the student's own tokens.
        student_temperature, teacher_temperature: divide the logits.
        skip_eos: do not compare what follows the answer.
        matched_weight, unmatched_weight: of the hybrid's two parts; None weighs by the share of the teacher's
            vocabulary that is matched.
        beta: of the hybrid's generalised Jensen-Shannon divergence.
        teacher_max_length: the teacher's sequences are cut there; None does not cut.

    Raises:
        ValueError: a weight or temperature out of range, one of the hybrid's weights without the other.
    """

    needs = frozenset({"student.logits", "teacher." + OWN_LOGITS})
    per = {"label": "token", "uld": "sample"}

    def __init__(
        self,
        *,
        hybrid: bool = False,
        weight: float = 1.0,
        label_weight: float = 1.0,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        skip_eos: bool = True,
        matched_weight: float | None = None,
        unmatched_weight: float | None = None,
        beta: float = 0.5,
        teacher_max_length: int | None = None,
    ):
        super().__init__()
        for name, value in (("weight", weight), ("label_weight", label_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}")
        if weight + label_weight == 0:
            raise ValueError("all weights are zero: give weight or label_weight a positive value")
        for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {beta}")
        if (matched_weight is None) != (unmatched_weight is None):
            raise ValueError("matched_weight and unmatched_weight go together; give both or neither")
        if matched_weight is not None and not (matched_weight >= 0 and unmatched_weight >= 0):
            raise ValueError(f"hybrid weights must not be negative, got {matched_weight} and {unmatched_weight}")
        if matched_weight is not None and not hybrid:
            raise ValueError("matched_weight and unmatched_weight belong to the hybrid form: set hybrid=True")
        self.hybrid, self.weight, self.label_weight, self.skip_eos = hybrid, weight, label_weight, skip_eos
        self.temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
        self.matched_weight, self.unmatched_weight, self.beta = matched_weight, unmatched_weight, beta
        self.teacher_max_length = teacher_max_length
        self.register_buffer("student_ids", None, persistent=False)
        self.register_buffer("teacher_ids", None, persistent=False)

    def match(self, student_vocab: dict[str, int], teacher_vocab: dict[str, int], sizes: tuple[int, int]) -> None:
        """Learn which tokens both sides hold; the trainer calls it.

        Args:
            sizes: rows of the student's and of the teacher's head.

        Raises:
            ValueError: the hybrid form, and no token is the same.
        """
        if not self.hybrid:
            return
        self.student_ids, self.teacher_ids = matched_ids(student_vocab, teacher_vocab, *sizes)
        if not len(self.student_ids):
            raise ValueError(
                "no token has the same string in both vocabularies, so the hybrid form has nothing to compare by name: "
                "use hybrid=False"
            )

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        return {"label": LabelCrossEntropy()}

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        theirs = teacher.features[OWN_LOGITS]
        if not isinstance(theirs, (Tensor, HeadLogits)):
            raise ValueError(
                f"ULD sorts whole distributions and the teacher gives {type(theirs).__name__}: use one live teacher, "
                'or cache it in mode "hidden"'
            )
        documents = len(student.rows.example)
        groups = student.batch[ALIGNMENT]
        groups = groups[groups[:, 0] < documents]  # repeated examples are gone from the end
        counts = torch.bincount(groups[:, 0], minlength=documents)
        total = aligned_sum(
            student.logits,
            theirs,
            student.labels,
            teacher.labels,
            groups[:, 1:],
            1 / counts[groups[:, 0]],
            self.distance,
            **self.temperatures,
            tile_bytes=self.engine.get("tile_bytes"),
        )
        return {"uld": total / max(documents, 1)}

    @property
    def distance(self):
        """(q, p) -> per row."""
        if not self.hybrid:
            return sorted_distance
        settings = {name: getattr(self, name) for name in ("matched_weight", "unmatched_weight", "beta")}
        return partial(hybrid_distance, student_ids=self.student_ids, teacher_ids=self.teacher_ids, **settings)

    def weights(self, progress: float) -> dict[str, float]:
        return {"label": self.label_weight, "uld": self.weight}
