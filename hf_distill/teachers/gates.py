"""An ensemble whose weights are learned: a gate reads the student and weighs the teachers for each sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.heads import has_row_labels
from hf_distill.losses import DIVERGENCES, LabelCrossEntropy, observe, run_terms
from hf_distill.losses.tile import Divergence
from hf_distill.objectives import Objective, hidden_size
from hf_distill.signals import HeadLogits, MixtureLogits, Signals, upcast
from hf_distill.teachers.ensemble import EnsembleTeacher


def gate_loss(log_gates: Tensor, label_log_probs: Tensor) -> Tensor:
    """-log Σ_m g_m p_m(label) per row: the likelihood that trains a mixture of experts (Jacobs et al. 1991).

    Its gradient by the gate's logits is g_m - g_m p_m(label) / Σ_n g_n p_n(label): weight moves to the teachers that
    are right about this label, and stays where all are equally right.

    Args:
        log_gates: (..., M), normalised over M.
        label_log_probs: (..., M), each teacher's log-probability of the row's label.

    Example:
        >>> sure, unsure = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> round(gate_loss(sure, torch.tensor([0.8, 0.2]).log()).exp().pow(-1).item(), 4)
        0.74
        >>> round(gate_loss(unsure, torch.tensor([0.8, 0.2]).log()).exp().pow(-1).item(), 4)
        0.5
    """
    return -(log_gates + label_log_probs).logsumexp(-1)


class GatedKD(Objective):
    """Knowledge distillation from an EnsembleTeacher whose weights a gate learns for each sample.

    loss = label_weight · CE(labels) + kd_weight · [T²] · D(Σ_m g_m p_m, q; T) + gate_weight · gate_loss(g, p(label))

    g is the softmax of a linear map of the student's logits (classification), or of the mean of a document's hidden
    rows as the head reads them, standardised (language models). No gradient of it reaches the student, and it starts
    uniform. In D it is a constant: were it trained by D, it would choose the teacher that the student agrees with
    already. Only the last term trains it, on labelled rows. With forward KL the student's gradient is that of
    Σ_m g_m KL(p_m ‖ q). The ensemble's own weights are not used. The teachers' heads are projected once more than
    without a gate; the label term shares the student's projection here, so add no NextToken.

    Args:
        divergence: a name of DIVERGENCES or a Divergence.
        kd_weight, label_weight, gate_weight: of the three terms; the gate's steers only the gate.
        temperature: of D.
        t_squared: multiply D by T².

    Raises:
        ValueError: an unknown divergence, a negative weight; at setup, a teacher that is no EnsembleTeacher.
    """

    needs = frozenset({"logits"})

    def __init__(
        self,
        divergence: str | Divergence = "forward_kl",
        *,
        kd_weight: float = 1.0,
        label_weight: float = 0.0,
        gate_weight: float = 1.0,
        temperature: float = 1.0,
        t_squared: bool = False,
    ):
        super().__init__()
        if isinstance(divergence, str):
            if divergence not in DIVERGENCES:
                raise ValueError(f"unknown divergence {divergence!r}; choose one of {', '.join(DIVERGENCES)}")
            divergence = DIVERGENCES[divergence](temperature=temperature)
        self.divergence = divergence
        kd = kd_weight * temperature**2 if t_squared else kd_weight
        self._weights = {"label": label_weight, "kd": kd, "gate": gate_weight}
        if any(weight < 0 for weight in self._weights.values()):
            raise ValueError(f"weights must not be negative, got {self._weights}")
        self.gate: nn.Linear | None = None
        self._shares: dict[str, Tensor] = {}

    def setup(self, student: nn.Module, teacher) -> None:
        if not isinstance(teacher, EnsembleTeacher):
            raise ValueError(f"GatedKD weighs the members of an EnsembleTeacher, got {type(teacher).__name__}")
        if self.gate is None:
            width = hidden_size(student) if has_row_labels(student) else student.config.num_labels
            self.gate = nn.Linear(width, len(teacher.teachers))
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.names = list(teacher.teachers)

    def weights(self, progress: float) -> dict[str, float]:
        return self._weights

    def log_gates(self, student: Signals) -> Tensor:
        """(rows, M) log weights of the teachers; rows of one sample have the same."""
        log_gates = upcast(self.gate(sample_features(student).to(self.gate.weight.dtype))).log_softmax(-1)
        self._shares = dict(zip(self.names, log_gates.detach().exp().mean(0), strict=True))
        return log_gates if student.rows is None else log_gates[student.rows.document]

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        mixture, labels = teacher.logits, student.labels
        if not isinstance(mixture, MixtureLogits) or len(mixture.parts) != len(self.names):
            raise ValueError(
                f"a gate over {', '.join(self.names)} needs the logits of each: no ensembles or top-k caches among them"
            )
        if labels is None:
            raise ValueError("the gate is trained by labels, and the batch has none")
        log_gates = self.log_gates(student)
        label = {"label": LabelCrossEntropy()}
        terms = label | {"kd": self.divergence}
        out = run_terms(
            student.logits,
            replace(mixture, weights=log_gates.detach().exp()),
            {name: (term, self._weights[name]) for name, term in terms.items()},
            labels=labels,
            mask=student.mask,
            **self.engine,
        )
        said = [-observe(part, None, label, labels=labels, **self.engine)["label"] for part in mixture.parts]
        loss = gate_loss(log_gates, torch.stack(said, -1).to(log_gates))
        counted = torch.ones_like(loss) if student.mask is None else student.mask.to(loss)
        return out | {"gate": (loss * counted).sum() / counted.sum().clamp(min=1)}

    def logs(self) -> dict[str, Tensor]:
        """The gate's mean weight of each teacher in this rank's last batch: one that is 1 for all has collapsed."""
        return {f"gate/{name}": share for name, share in self._shares.items()}


def sample_features(student: Signals) -> Tensor:
    """(samples, H) standardised mean of the hidden rows that the head reads, or (B, C) logits of a classifier.

    Raises:
        ValueError: dense logits of a language model.
    """
    if student.rows is None:
        return student.logits.detach()
    if not isinstance(student.logits, HeadLogits):
        raise ValueError("the gate of a language model reads its hidden rows: set dense_logits=False")
    hidden, document = upcast(student.logits.hidden.detach()), student.rows.document
    samples = student.rows.example.shape[0]
    sums = hidden.new_zeros(samples, hidden.shape[1]).index_add_(0, document, hidden)
    return F.layer_norm(sums, sums.shape[-1:])  # of the sum as of the mean


__all__ = ["GatedKD", "gate_loss", "sample_features"]
