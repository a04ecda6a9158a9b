"""Objectives: they declare terms and weights as data; they never project logits and never scale a gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_distill.losses import DIVERGENCES, LabelCrossEntropy, run_terms
from hf_distill.losses.tile import Divergence
from hf_distill.signals import Signals


class Term(NamedTuple):
    """One term of a loss: its unweighted mean, the weight, and what it is a mean over."""

    value: Tensor
    weight: float | Tensor
    per: str


class Objective(nn.Module):
    """What a student is trained for. Subclasses give `logit_terms`, `other_terms`, or both.

    Attributes:
        needs: what it reads of the signals: "logits", "hidden_states", "attentions", "features:<path>" (see `taps`);
            "teacher.x" / "student.x" for one side.
        per: what its terms are means over: "token" (rows that carry loss), "sample" (documents) or "batch"; a dict
            {term: unit} where terms differ; a name of its own, counted by `count`.
        couples_batch: why a term depends on which examples meet in a batch (contrastive, transport), or None.
        uses_teacher: False for objectives of the student alone.
        paper: the MethodCard it comes from, for model cards.
        engine: the run's options of `run_terms` (tile_bytes), for a term of `other_terms` that projects.
        state: what must last between steps and is not trained: plain tensors, moved with the model, never cast, never
            broadcast by DDP, the same on every rank, saved with each checkpoint. Changed in `after_step` only.
    """

    needs: frozenset[str] = frozenset({"logits"})
    per: str | dict[str, str] = "token"
    couples_batch: str | None = None
    uses_teacher: bool = True
    paper = None
    engine: dict = {}

    def __init__(self):
        super().__init__()
        self.state: dict[str, Tensor] = {}

    # ---- what a subclass gives ----
    def setup(self, student: nn.Module, teacher) -> None:
        """Build trained parts here: it runs before wrapping and before the optimizer is made."""

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        """Divergences on the logits, as data; those of all added objectives share one projection."""
        return {}

    def other_terms(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, Tensor]:
        """Any other term: unweighted means over `per`."""
        return {}

    def weights(self, progress: float) -> dict[str, float | Tensor]:
        """Weights of terms; 1.0 where none is named. A term in warm-up weighs 0, it does not vanish."""
        return {}

    def row_weights(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, Tensor]:
        """Per logit term (rows,) weights without gradient, to select or re-weight rows; the mean still counts all."""
        return {}

    def row_fields(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, dict[str, Tensor]]:
        """Per logit term, (rows, ...) values for the `row_fields` of its divergence, which `logit_terms` left None."""
        return {}

    def count(self, batch: dict) -> dict[str, int]:
        """How many items of its own units (names used in `per`) a micro-batch holds; known before its forward."""
        return {}

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        """Once per optimizer step: its own terms as unweighted means over the accumulation window and all ranks."""

    def logs(self) -> dict[str, Tensor | float]:
        """Extra values to log, read at logging steps only."""
        return {}

    # ---- what the frame uses ----
    def per_of(self, term: str) -> str:
        return self.per if isinstance(self.per, str) else self.per.get(term, "token")

    def leaves(self) -> list[tuple[str, float, Objective]]:
        return [("", 1.0, self)]

    def needs_of(self, side: str) -> frozenset[str]:
        """What is read of "student" or "teacher"."""
        other = {"student": "teacher.", "teacher": "student."}[side]
        return frozenset(n.removeprefix(side + ".") for n in self.needs if not n.startswith(other))

    def forward(
        self,
        student: Signals,
        teacher: Signals | None,
        progress: float,
        observed: dict[str, Divergence] | None = None,
        **engine,
    ) -> dict[str, Term]:
        """All terms. Final: subclasses give the methods above.

        Args:
            observed: values to measure beside the terms, in the same projection, with weight 0 (evaluation).
            engine: goes to `run_terms` (tile_bytes, tile_rows).
        """
        out: dict[str, Term] = {}
        groups, row_weights = {}, {}
        for prefix, factor, leaf in self.leaves():
            leaf.engine = engine
            weights = leaf.weights(progress)
            own_rows, fields = (f(student, teacher, progress) for f in (leaf.row_weights, leaf.row_fields))
            for name, divergence in leaf.logit_terms(progress).items():
                divergence = dataclasses.replace(divergence, **fields[name]) if name in fields else divergence
                groups.setdefault(leaf.per_of(name), {})[prefix + name] = (divergence, factor * weights.get(name, 1.0))
                if name in own_rows:
                    row_weights[prefix + name] = own_rows[name]
            for name, value in leaf.other_terms(student, teacher, progress).items():
                out[prefix + name] = Term(value, factor * weights.get(name, 1.0), leaf.per_of(name))
        home = "token" if "token" in groups or not groups else next(iter(groups))  # weight 0: any projection will do
        if observed:
            groups.setdefault(home, {}).update((name, (divergence, 0.0)) for name, divergence in observed.items())
        for per, terms in groups.items():
            values = run_terms(
                student.logits,
                None if teacher is None else teacher.logits,
                terms,
                labels=student.labels,
                mask=student.mask,
                row_weights=self._row_weights_of_group(student, per, terms.keys() - (observed or {}), row_weights),
                **engine,
            )
            units = {name: "token" if observed and name in observed else per for name in terms}
            out |= {name: Term(values[name], terms[name][1], units[name]) for name in terms}
        return out

    @staticmethod
    def _row_weights_of_group(student: Signals, per: str, terms: set[str], own: dict[str, Tensor]) -> dict | None:
        shared = sample_row_weights(student) if per == "sample" and student.rows is not None else None
        mine = {name: own[name] if shared is None else own[name] * shared for name in terms if name in own}
        if shared is not None:
            mine |= {name: shared for name in terms if name not in mine}
        return mine or None

    def state_tensors(self) -> dict[str, Tensor]:
        """All state of this objective and of the parts of a sum, by unique name."""
        return {f"{prefix}{key}": value for prefix, _, leaf in self.leaves() for key, value in leaf.state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put saved state back in place of the present. Raises ValueError when the names are another objective's."""
        mine = self.state_tensors()
        if mine.keys() != tensors.keys():
            raise ValueError(
                f"the checkpoint holds objective state {sorted(tensors)}, this objective has {sorted(mine)}: "
                "resume with the objective the run was started with"
            )
        for prefix, _, leaf in self.leaves():
            for key, old in leaf.state.items():
                leaf.state[key] = tensors[prefix + key].to(device=old.device, dtype=old.dtype)

    def _apply(self, fn: Callable, recurse: bool = True):
        super()._apply(fn, recurse)
        for key, value in self.state.items():
            # moved, never cast: .bfloat16() would freeze a slow schedule
            self.state[key] = value.to(fn(torch.empty(0, device=value.device)).device)
        return self

    def __add__(self, other: Objective) -> Objective:
        return Sum((1.0, self), (1.0, other))

    def __rmul__(self, factor: float) -> Objective:
        return Sum((float(factor), self))

    __mul__ = __rmul__


class Sum(Objective):
    """Weighted sum of objectives; flat, so that all logit terms still meet in one projection."""

    def __init__(self, *parts: tuple[float, Objective]):
        super().__init__()
        flat = [(factor * inner, leaf) for factor, part in parts for _, inner, leaf in part.leaves()]
        if any(factor < 0 for factor, _ in flat):
            raise ValueError(f"factors of added objectives must not be negative, got {[f for f, _ in flat]}")
        self.factors = [factor for factor, _ in flat]
        self.parts = nn.ModuleList(leaf for _, leaf in flat)
        self.uses_teacher = any(leaf.uses_teacher for leaf in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(leaf.needs for leaf in self.parts))

    @property
    def couples_batch(self) -> str | None:
        return "; ".join(leaf.couples_batch for leaf in self.parts if leaf.couples_batch) or None

    def leaves(self) -> list[tuple[str, float, Objective]]:
        names = [type(leaf).__name__.lower() for leaf in self.parts]
        unique = [name if names.count(name) == 1 else f"{name}{i}" for i, name in enumerate(names)]
        return [(f"{u}/", f, leaf) for u, f, leaf in zip(unique, self.factors, self.parts, strict=True)]

    def setup(self, student: nn.Module, teacher) -> None:
        for leaf in self.parts:
            leaf.setup(student, teacher)

    def count(self, batch: dict) -> dict[str, int]:
        return {unit: n for leaf in self.parts for unit, n in leaf.count(batch).items()}

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        for prefix, _, leaf in self.leaves():
            leaf.after_step({k.removeprefix(prefix): v for k, v in terms.items() if k.startswith(prefix)}, progress)

    def logs(self) -> dict[str, Tensor | float]:
        return {prefix + key: value for prefix, _, leaf in self.leaves() for key, value in leaf.logs().items()}


def sample_row_weights(student: Signals) -> Tensor:
    """(N,) weights that turn a mean over rows into the mean over documents of each document's mean over its rows."""
    rows = student.rows
    documents = rows.example.shape[0]
    ones = torch.ones_like(rows.document, dtype=torch.float32)
    per_document = torch.zeros(documents, device=ones.device).index_add_(0, rows.document, ones)
    return len(rows.document) / (max(documents, 1) * per_document[rows.document])


# ---- schedules ------------------------------------------------------------------------------------------------------
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
}


def scheduled(schedule: str, start: float, end: float | None, progress: float) -> float:
    """Value between `start` (progress 0) and `end` (progress 1) along a schedule of SCHEDULES; without `end`, start."""
    if end is None:
        return start
    return start + (end - start) * SCHEDULES[schedule](min(max(progress, 0.0), 1.0))


# ---- objectives for every day ---------------------------------------------------------------------------------------
class NextToken(Objective):
    """Cross-entropy with the labels: the student alone (also the label term of classification)."""

    needs = frozenset({"student.logits"})
    uses_teacher = False

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        return {"label": LabelCrossEntropy()}


class LogitKD(Objective):
    """A divergence between the two models' logits, mixed with cross-entropy on the labels.

    loss = label_weight · CE(labels) + kd_weight · [T²] · D(teacher, student; T)

    Args:
        divergence: a name of `DIVERGENCES` or a Divergence; its own arguments in `options`.
        kd_weight, kd_weight_end, weight_schedule: weight of the divergence, moved over training along a schedule.
        label_weight: weight of the cross-entropy; 0 leaves the term in the log.
        temperature, temperature_end, temperature_schedule: of both softmaxes.
        t_squared: multiply the divergence by T² (Hinton et al. 2015, so that its gradient keeps its size as T grows).
        per: "token" or "sample".

    Raises ValueError: unknown divergence or schedule, a negative weight, all weights zero, a temperature not positive.
    """

    def __init__(
        self,
        divergence: str | Divergence = "forward_kl",
        *,
        options: dict | None = None,
        kd_weight: float = 1.0,
        kd_weight_end: float | None = None,
        weight_schedule: str = "linear",
        label_weight: float = 0.0,
        temperature: float = 1.0,
        temperature_end: float | None = None,
        temperature_schedule: str = "linear",
        t_squared: bool = False,
        per: str = "token",
    ):
        super().__init__()
        if isinstance(divergence, str) and divergence not in DIVERGENCES:
            raise ValueError(f"unknown divergence {divergence!r}; choose one of {', '.join(DIVERGENCES)}")
        for name, schedule in (("weight_schedule", weight_schedule), ("temperature_schedule", temperature_schedule)):
            if schedule not in SCHEDULES:
                raise ValueError(f"unknown {name} {schedule!r}; choose one of {', '.join(SCHEDULES)}")
        given = {"kd_weight": kd_weight, "kd_weight_end": kd_weight_end, "label_weight": label_weight}
        for name, weight in given.items():
            if weight is not None and not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if not any(given.values()):
            raise ValueError("all weights are zero: give kd_weight or label_weight a positive value")
        for name, value in (("temperature", temperature), ("temperature_end", temperature_end)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if per not in ("token", "sample"):
            raise ValueError(f'per must be "token" or "sample", got {per!r}')
        self.divergence, self.options = divergence, dict(options or {})
        self.kd_weight, self.kd_weight_end, self.weight_schedule = kd_weight, kd_weight_end, weight_schedule
        self.label_weight, self.t_squared, self.per = label_weight, t_squared, per
        self.temperature, self.temperature_end = temperature, temperature_end
        self.temperature_schedule = temperature_schedule
        self.logit_terms(0.0)  # wrong options fail here, before any long work

    def temperature_at(self, progress: float) -> float:
        return scheduled(self.temperature_schedule, self.temperature, self.temperature_end, progress)

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        kd = self.divergence
        if isinstance(kd, str):
            kd = DIVERGENCES[kd](temperature=self.temperature_at(progress), **self.options)
        return {"label": LabelCrossEntropy(), "kd": kd}

    def weights(self, progress: float) -> dict[str, float]:
        kd = scheduled(self.weight_schedule, self.kd_weight, self.kd_weight_end, progress)
        if self.t_squared:
            kd *= self.temperature_at(progress) ** 2
        return {"label": self.label_weight, "kd": kd}


class FeatureKD(Objective):
    """Mean squared error between chosen hidden states, through a trained linear map where the widths differ.

    A mean over the rows that carry loss (language models) or over attended positions of each sample.

    Args:
        layers: (student, teacher) indices into `hidden_states` (0 is the embeddings, -1 the last layer).
        weight: of the sum over pairs.
    """

    needs = frozenset({"hidden_states"})

    def __init__(self, layers: tuple[tuple[int, int], ...] = ((-1, -1),), weight: float = 1.0, per: str = "token"):
        super().__init__()
        if not weight > 0:
            raise ValueError(f"weight must be positive, got {weight}")
        self.layers, self.weight, self.per = tuple(map(tuple, layers)), weight, per
        self.projectors = nn.ModuleList()

    def setup(self, student: nn.Module, teacher) -> None:
        if len(self.projectors):
            return
        narrow, wide = hidden_size(student), hidden_size(teacher)
        for _ in self.layers:
            self.projectors.append(nn.Identity() if narrow == wide else nn.Linear(narrow, wide, bias=False))

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        total = 0.0
        for (s, t), project in zip(self.layers, self.projectors, strict=True):
            ours, theirs = student.hidden_states[s], teacher.hidden_states[t]
            if student.rows is not None:
                ours = ours.flatten(0, 1)[student.rows.index]
                theirs = theirs.flatten(0, 1)[(teacher.rows or student.rows).index]
            weight = next((p for p in project.parameters()), ours)
            error = (project(ours.to(weight.dtype)) - theirs.to(weight.dtype)).float().pow(2).mean(-1)
            total = total + self._mean(error, student)
        return {"feature": total}

    def _mean(self, error: Tensor, student: Signals) -> Tensor:
        if student.rows is not None:
            rows = error * sample_row_weights(student) if self.per == "sample" else error
            return rows.sum() / max(rows.shape[0], 1)
        mask = student.batch.get("attention_mask")
        mask = torch.ones_like(error) if mask is None else mask.to(error)
        return ((error * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    def weights(self, progress: float) -> dict[str, float]:
        return {"feature": self.weight}


def hidden_size(model) -> int:
    """Width of a model's hidden states; `model` may be a teacher."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config to read its hidden size from")
    config = config.get_text_config()
    return config.hidden_size


__all__ = [
    "SCHEDULES",
    "FeatureKD",
    "LogitKD",
    "NextToken",
    "Objective",
    "Sum",
    "Term",
    "hidden_size",
    "sample_row_weights",
    "scheduled",
]
