"""Baselines on intermediate features: FitNet's hint and attention transfer, and what all tapping baselines share."""

from __future__ import annotations

from torch import Tensor, nn

from hf_distill.baselines.base import Baseline
from hf_distill.baselines.probe import model_of, probe
from hf_distill.heads import base_model_of
from hf_distill.losses import at_loss, fitnet_loss
from hf_distill.signals import Signals
from hf_distill.students.projectors import Projector, as_map, layer_pairs, prefix_tokens
from hf_distill.taps import name_of, tap


class TapsFeatures(Baseline):
    """A baseline that reads pairs of taps, one of each model.

    Args:
        layers: (student, teacher) pairs of paths (see `hf_distill.taps`) or indices into `hidden_states`; or a preset
            of `projectors.layer_pairs`: "uniform", "last", "skip".
        shapes: (student, teacher) shapes, batch dimension included, of each pair; None sees them in a dry run on a
            made-up example.

    Attributes:
        pairs: the names in `Signals.features`, known after `setup` where a preset was given.
    """

    def __init__(self, layers, *, shapes: list[tuple] | None = None, **weights):
        super().__init__(**weights)
        self.layers, self.shapes = layers, shapes
        self.pairs: list[tuple[str, str]] = []
        self.prefixes: tuple[int | None, int | None] = (0, 0)
        if not isinstance(layers, str):
            self._name(layer_pairs(layers, 0, 0))
        elif shapes is not None:
            raise ValueError("shapes belong to pairs of layers: name the pairs, not a preset")
        else:
            layer_pairs(layers, 1, 1)  # an unknown preset fails here

    def _name(self, pairs: list[tuple]) -> None:
        self.pairs = [tuple(name_of(path) for path in pair) for pair in pairs]
        if self.shapes is not None and len(self.shapes) != len(self.pairs):
            raise ValueError(f"{len(self.pairs)} pairs of layers need as many pairs of shapes, got {len(self.shapes)}")

    @property
    def needs(self) -> frozenset[str]:
        if not self.pairs:  # a preset, before setup
            return frozenset({"student.logits", "hidden_states"})
        own = (tap(path, side) for pair in self.pairs for path, side in zip(pair, ("student", "teacher"), strict=True))
        return frozenset({"student.logits", *own})

    def setup(self, student: nn.Module, teacher) -> None:
        model = model_of(teacher)
        self.prefixes = tuple(prefix_tokens(base_model_of(m)) for m in (student, student if model is None else model))
        if not self.pairs:
            both = probe(student, teacher, *[frozenset({"hidden_states"})] * 2)
            self._name(layer_pairs(self.layers, *(len(s.hidden_states) - 1 for s in both)))
            hidden = [[s.hidden_states[i] for i in self._indices(side)] for side, s in enumerate(both)]
            self.shapes = [tuple(tuple(x.shape) for x in pair) for pair in zip(*hidden, strict=True)]
        elif self.shapes is None:
            needs = (self.needs_of(side) - {"logits"} for side in ("student", "teacher"))
            ours, theirs = probe(student, teacher, *needs)
            self.shapes = [(tuple(ours.features[s].shape), tuple(theirs.features[t].shape)) for s, t in self.pairs]
        if next(self.children(), None) is None:
            self.build(self.shapes)

    def _indices(self, side: int) -> list[int]:
        return [int(pair[side].rsplit(".", 1)[1]) for pair in self.pairs]

    def build(self, shapes: list[tuple]) -> None:
        """Make trained parts for pairs of these shapes; called once."""

    def tapped(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        """The pairs of features; the teacher's without gradient."""
        return [(student.features[s], teacher.features[t].detach()) for s, t in self.pairs]

    def text_mask(self, student: Signals) -> Tensor | None:
        """(B, S), 1 where a position of a text is no padding; None for images."""
        return student.batch.get("attention_mask") if self.prefixes[0] is None else None


class FitNet(TapsFeatures):
    """FitNet's hint (1412.6550): CE + 100 · mean (r(f_s) - f_t)², r a trained regressor; see `losses.fitnet_loss`.

    Args:
        layers: one hint, the second stage, by default.
        projector: "regressor" (maps: convolution, BatchNorm, ReLU; tokens and pooled features: linear), "linear"
            (1x1 convolution for maps) or "none", for features of one shape.
        weight, label_weight, warmup, shapes: see `Baseline` and `TapsFeatures`.

    Raises:
        ValueError: features of two shapes without a projector.
    """

    def __init__(self, layers=((2, 2),), *, projector="regressor", weight=100.0, label_weight=1.0, **options):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)
        if projector not in ("regressor", "linear", "none"):
            raise ValueError(f'projector must be "regressor", "linear" or "none", got {projector!r}')
        self.projector = projector

    def build(self, shapes: list[tuple]) -> None:
        if self.projector == "none":
            for pair, (ours, theirs) in zip(self.pairs, shapes, strict=True):
                if ours[1:] != theirs[1:]:
                    raise ValueError(
                        f"{pair[0]} of the student gives {ours}, {pair[1]} of the teacher {theirs}: they differ in "
                        'shape, so they need projector="linear" or "regressor"'
                    )
            return
        regressor = self.projector == "regressor"
        self.projectors = nn.ModuleList(Projector(*pair, *self.prefixes, regressor=regressor) for pair in shapes)
        if any(isinstance(m, nn.BatchNorm2d) for m in self.modules()):
            self.couples_batch = "its regressor normalises over the batch (BatchNorm)"

    def names(self) -> tuple[str, ...]:
        return ("hint",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        total, mask = 0.0, self.text_mask(student)
        for i, pair in enumerate(self.tapped(student, teacher)):
            ours, theirs = self.projectors[i](*pair, mask) if self.projector != "none" else pair
            total = total + fitnet_loss(ours, theirs, mask if ours.dim() == 3 else None)
        return {"hint": total}


class AttentionTransfer(TapsFeatures):
    """Attention transfer (1612.03928): CE + 1000 · Σ over stages of mean (a_s - a_t)²; see `losses.at_loss`.

    Nothing is trained. Tokens of an image are taken as their grid, those of a text as a line without its padding. The
    hidden states of post-norm models (BERT) have one energy at every position after LayerNorm, so that their attention
    is flat and the term about 0: tap a place before the norm, as "bert.encoder.layer.1.output.dense".

    Args:
        layers: every stage or layer of the student, spread over the teacher's, by default.
        p: power of the features.
    """

    def __init__(self, layers="uniform", *, p: int = 2, weight=1000.0, label_weight=1.0, **options):
        super().__init__(layers, weight=weight, label_weight=label_weight, **options)
        self.p = p

    def names(self) -> tuple[str, ...]:
        return ("attention",)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        mask = self.text_mask(student)
        mask = None if mask is None else mask[..., None]
        total = 0.0
        for pair in self.tapped(student, teacher):
            maps = (as_map(x, prefix) for x, prefix in zip(pair, self.prefixes, strict=True))
            total = total + at_loss(*maps, self.p, mask)
        return {"attention": total}
