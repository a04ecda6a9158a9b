"""TRG: the student copies how the teacher's tokens lie to each other, over the images of a whole batch.

Feature maps are cut into tokens, some of each image are drawn, the same places for both networks, and three relations
are copied: each token's neighbourhood in a k-nearest-neighbour graph over all drawn tokens (local), which teacher token
is its own among all (global, InfoNCE through a linear map), and how the tokens of one image attend to each other
(inner).

loss = CE + kd · KD(T) + alpha · inner + beta · local + gamma · global

No official code was found, and the formulas are a paper summary's [reconstruction]. Ours are: 16 tokens per image,
k = 20, sigma = 1 on tokens of length 1, the temperatures 0.5 to 0.07, all weights, and that the local term is a mean
over tokens where the authors sum.

    accelerate launch recipes/trg.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_distill.baselines.contrastive import gather_rows
from hf_distill.baselines.features import TapsFeatures
from hf_distill.curricula.draws import GOLDEN, mix
from hf_distill.losses import kd_loss
from hf_distill.losses.precision import exactly, unit
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import scheduled
from hf_distill.signals import Signals
from hf_distill.students.projectors import as_map, form_of, resized, width_of

COUPLES = "a graph over the tokens of all examples of a batch"
CARD = MethodCard(
    slug="trg",
    title="Knowledge Distillation via Token-level Relationship Graph",
    arxiv="2306.12442",
    year=2023,
    kind="relations",
    modality="image",
    couples_batch=COUPLES,
    citation="""@misc{zhang2023trg,
  title = {Knowledge Distillation via Token-level Relationship Graph},
  author = {Shuoxi Zhang and Hanpeng Liu and Kun He},
  year = {2023}, eprint = {2306.12442}, archivePrefix = {arXiv}
}""",
)
DIRECTIONS = ("teacher_student", "student_teacher")


@dataclass
class TRGConfig:
    """All numbers are ours: the paper's were not found."""

    trg_alpha: float = field(default=1.0, metadata={"help": "Weight of the inner term; 0 turns it off."})
    trg_beta: float = field(default=1.0, metadata={"help": "Weight of the local term."})
    trg_gamma: float = field(default=1.0, metadata={"help": "Weight of the global term."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of T² · KL between the logits."})
    label_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    kd_temperature: float = field(default=4.0, metadata={"help": "Softmax temperature T of both models' logits."})
    trg_tokens_per_image: int = field(default=16, metadata={"help": "Tokens drawn per image or text, at most."})
    trg_k: int = field(default=20, metadata={"help": "Neighbours of a token, at most."})
    trg_sigma: float = field(default=1.0, metadata={"help": "Width of exp(-distance² / (2 sigma))."})
    trg_normalize_tokens: bool = field(default=True, metadata={"help": "Bring tokens to length 1 for the graph."})
    trg_local_direction: str = field(
        default="teacher_student", metadata={"help": "teacher_student: KL(teacher || student); or student_teacher."}
    )
    trg_local_sharpness: float = field(
        default=1.0,
        metadata={"help": "Multiplies the graph before its softmax, which is nearly flat over many tokens."},
    )
    trg_tau_max: float = field(default=0.5, metadata={"help": "Temperature of the global term at the start."})
    trg_tau_min: float = field(default=0.07, metadata={"help": "Temperature of the global term at the end (cosine)."})
    trg_patch: int = field(default=1, metadata={"help": "Side of the square of cells that makes one token."})
    trg_student_layer: str = field(
        default="-2", metadata={"help": "Where the student's tokens are read: index of a hidden state, or a path."}
    )
    trg_teacher_layer: str = field(default="-2", metadata={"help": "Where the teacher's tokens are read."})
    trg_gather: bool = field(default=False, metadata={"help": "One graph over the tokens of all processes."})
    trg_seed: int = field(default=0, metadata={"help": "Of the drawn places, with the number of the step."})

    def __post_init__(self):
        weights = ("trg_alpha", "trg_beta", "trg_gamma", "kd_weight", "label_weight")
        given = {name: getattr(self, name) for name in weights}
        if not all(0 <= w < math.inf for w in given.values()) or not any(given.values()):
            raise ValueError(f"weights must not be negative, nor all 0, got {given}")
        for name in ("kd_temperature", "trg_sigma", "trg_local_sharpness", "trg_tau_min", "trg_tau_max"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.trg_tau_min > self.trg_tau_max:
            raise ValueError(f"trg_tau_min {self.trg_tau_min} is above trg_tau_max {self.trg_tau_max}")
        for name in ("trg_tokens_per_image", "trg_k", "trg_patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.trg_local_direction not in DIRECTIONS:
            raise ValueError(f"trg_local_direction must be {' or '.join(DIRECTIONS)}, got {self.trg_local_direction!r}")


# ---- pure functions --------------------------------------------------------------------------------------------------
@exactly
def trg_adjacency(tokens: Tensor, k: int = 20, sigma: float = 1.0, normalize_tokens: bool = True) -> Tensor:
    """A (M, M) of tokens (M, D): exp(-|x_i - x_j|² / (2 sigma)) where i is one of j's k nearest neighbours, else 0.

    Column j has min(k, M - 1) entries; row i may have none. The choice of neighbours has no gradient, the distances do.
    """
    return _edges(tokens, k, sigma, normalize_tokens).dense()


@exactly
def trg_local_loss(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    k: int = 20,
    sigma: float = 1.0,
    direction: str = "teacher_student",
    normalize_tokens: bool = True,
    sharpness: float = 1.0,
) -> Tensor:
    """Mean over tokens of the KL between rows of the two graphs, as distributions softmax_j(sharpness · A_ij).

    Args:
        student_tokens (M, D_s), teacher_tokens (M, D_t): row by row the same place; the teacher's are a constant.
        direction: "teacher_student" is KL(P_teacher ‖ P_student), "student_teacher" the reverse.

    Raises:
        ValueError: other numbers of tokens; an unknown direction.
    """
    _check_pairs(student_tokens, teacher_tokens)
    graphs = (_edges(x, k, sigma, normalize_tokens) for x in (student_tokens, teacher_tokens.detach()))
    return _local(*graphs, direction, sharpness)


@exactly
def trg_global_loss(student_projected: Tensor, teacher_tokens: Tensor, temperature: float) -> Tensor:
    """InfoNCE: -mean_i log softmax_j(cos(student_i, teacher_j) / temperature)_i, over tokens (M, D)."""
    _check_pairs(student_projected, teacher_tokens)
    similarity = unit(student_projected) @ unit(teacher_tokens.detach()).T / temperature
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device))


@exactly
def trg_inner_loss(student_tokens: Tensor, teacher_tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of softmax(F Fᵀ / sqrt(D)), each network with its own D, of tokens (B, N, D).

    Args:
        mask: (B, N), 1 where there is a token; a mean over each example's own pairs of tokens, then over examples.
    """
    _check_pairs(student_tokens, teacher_tokens)
    ours, theirs = (_context(x, mask) for x in (student_tokens, teacher_tokens.detach()))
    error = (theirs - ours).square()
    if mask is None:
        return error.mean()
    mask = mask.to(error)
    pairs = (error * mask[:, :, None] * mask[:, None, :]).sum((1, 2))
    return (pairs / mask.sum(1).square().clamp(min=1)).mean()


def _check_pairs(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"tokens must be of the same places, got {tuple(student.shape)} and {tuple(teacher.shape)}")


def _context(tokens: Tensor, mask: Tensor | None) -> Tensor:
    scores = tokens @ tokens.mT / math.sqrt(tokens.shape[-1])
    if mask is not None:  # a large number, not -inf: an example without tokens would be nan
        scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


class _Edges(NamedTuple):
    """A graph's entries other than 0: token j counts its `nearest[j]` (k,) as neighbours, A[nearest[j], j] = near[j].

    A graph of M tokens has k · M of them: whoever needs all M² entries pays for them, in time and in memory.
    """

    nearest: Tensor
    near: Tensor

    def dense(self) -> Tensor:
        """A (M, M)."""
        return self.near.new_zeros(len(self.near), len(self.near)).scatter(0, self.nearest.T, self.near.T)

    def log_sums(self, sharpness: float) -> Tensor:
        """(M,) log of the mean of exp(sharpness · A_ij) over j; what is no neighbour adds exp(0)."""
        sums = self.near.new_zeros(len(self.near))
        sums = sums.index_add(0, self.nearest.flatten(), (sharpness * self.near).expm1().flatten())
        return (sums / len(self.near)).log1p()

    def of(self, other: _Edges) -> Tensor:
        """(M, k) its entries where the other has neighbours; 0 for those that it has not."""
        return self.dense()[other.nearest, torch.arange(len(self.near), device=self.near.device)[:, None]]


def _edges(tokens: Tensor, k: int, sigma: float, normalize: bool) -> _Edges:
    tokens = unit(tokens) if normalize else tokens - tokens.detach().mean(0)  # a shift, for the digits
    with torch.no_grad():
        square = tokens.square().sum(-1)
        distance = (square[:, None] + square - 2 * tokens @ tokens.T).fill_diagonal_(torch.inf)
        nearest = distance.topk(min(k, len(tokens) - 1), largest=False).indices
    distance = (tokens[:, None] - tokens[nearest]).square().sum(-1)
    return _Edges(nearest, (-distance / (2 * sigma)).exp())


def _local(student: _Edges, teacher: _Edges, direction: str, sharpness: float) -> Tensor:
    """Σ_j p_ij (log p_ij - log q_ij), where the log-ratio is log Z_q - log Z_p + sharpness · (A^p - A^q)_ij."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be {' or '.join(DIRECTIONS)}, got {direction!r}")
    p, q = (teacher, student) if direction == "teacher_student" else (student, teacher)
    log_zp, log_zq, count = p.log_sums(sharpness), q.log_sums(sharpness), len(p.near)
    mass_p = (sharpness * p.near - log_zp[p.nearest]).exp() / count
    mass_q = (sharpness * p.of(q) - log_zp[q.nearest]).exp() / count  # what p gives to q's neighbours
    difference = (mass_p * p.near).sum() - (mass_q * q.near).sum()
    return (log_zq - log_zp).mean() + sharpness * difference / count


def draw_places(valid: Tensor, count: int, step: Tensor, seed: int, first_row: Tensor | int = 0) -> Tensor:
    """(B, min(count, N)) places of valid (B, N), those of valid tokens first, drawn by (seed, step, row, place)."""
    rows = torch.arange(len(valid), device=valid.device) + first_row
    key = mix(mix(step + seed * GOLDEN) + rows)
    numbers = mix(key[:, None] + GOLDEN * torch.arange(valid.shape[1], device=valid.device)) >> 1
    last = torch.iinfo(torch.int64).max
    return numbers.masked_fill(~valid, last).argsort(stable=True, dim=-1)[:, :count]


# ---- the objective ---------------------------------------------------------------------------------------------------
class TRG(TapsFeatures):
    """The three relations beside KD and the labels.

    Images: prefix tokens are left out, and the larger grid is averaged down to the smaller. Texts: padding and the
    `special_ids` are left out. The drawn places depend on (seed, step) and on the row in the batch, in evaluation on
    the row alone.

    With `trg_gather` the graph is over the tokens of all ranks, each rank gives the gradient by its own, and the result
    is that of one process with all of their examples (a repeated example of a ragged end counts as a neighbour).

    Args:
        special_ids: token ids of a text that are no tokens to relate, [CLS] or [SEP].

    Raises:
        ValueError: in `setup`, pooled features, or tokens that are no square grid.
    """

    paper = CARD
    couples_batch = COUPLES

    def __init__(self, config: TRGConfig | None = None, special_ids: tuple[int, ...] = ()):
        c = self.config = config or TRGConfig()
        layers = (int(x) if x.lstrip("-").isdigit() else x for x in (c.trg_student_layer, c.trg_teacher_layer))
        super().__init__([tuple(layers)], weight=1.0, label_weight=c.label_weight)
        self.special_ids = tuple(special_ids)
        self.state = {"step": torch.zeros((), dtype=torch.int64)}
        self._tau = c.trg_tau_max

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"logits"}

    def build(self, shapes: list[tuple]) -> None:
        if any(form_of(shape) == "pooled" for shape in shapes[0]):
            raise ValueError(f"{self.pairs[0]} give pooled features {shapes[0]}: take layers before the pooling")
        ours, theirs = (width_of(shape) * self.config.trg_patch**2 for shape in shapes[0])
        self.project = nn.Linear(ours, theirs)

    def term_weights(self) -> dict[str, float]:
        c = self.config
        relations = {"trg_inner": c.trg_alpha, "trg_local": c.trg_beta, "trg_global": c.trg_gamma}
        return {"kd": c.kd_weight} | relations | {"trg_knn_overlap": 0.0}

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        self._tau = scheduled("cosine", self.config.trg_tau_max, self.config.trg_tau_min, progress)
        return super().other_terms(student, teacher, progress)

    def terms(self, student: Signals, teacher: Signals) -> dict[str, Tensor]:
        logits = self.class_logits(student), self.class_logits(teacher)
        ours, theirs = self.tokens(student, teacher)
        mask = self._text_tokens(student)
        return {
            "kd": kd_loss(*logits, self.config.kd_temperature),
            "trg_inner": trg_inner_loss(ours, theirs, mask),
            **self._graphs(*self._drawn(ours, theirs, mask), len(ours)),
        }

    def tokens(self, student: Signals, teacher: Signals) -> tuple[Tensor, Tensor]:
        """(B, N, D) of each network, the same places."""
        pair = self.tapped(student, teacher)[0]
        if self.prefixes[0] is None:
            return pair
        maps = [as_map(x, prefix) for x, prefix in zip(pair, self.prefixes, strict=True)]
        size = tuple(min(sides) for sides in zip(*(x.shape[2:] for x in maps), strict=True))
        if any(side % self.config.trg_patch for side in size):
            raise ValueError(
                f"a grid of {size} cells does not divide into patches of trg_patch={self.config.trg_patch}"
            )
        maps = (F.pixel_unshuffle(resized(x, size), self.config.trg_patch) for x in maps)
        return tuple(x.flatten(2).mT for x in maps)

    def _text_tokens(self, student: Signals) -> Tensor | None:
        mask = self.text_mask(student)
        if mask is None or not self.special_ids:
            return mask
        special = torch.tensor(self.special_ids, device=mask.device)
        return mask * ~torch.isin(student.batch["input_ids"], special)

    def _drawn(self, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(M, D) of each network, at the drawn places of all examples."""
        valid = torch.ones(ours.shape[:2], dtype=torch.bool, device=ours.device) if mask is None else mask.bool()
        step = self.state["step"] * int(self.training)
        first = ranks_before(len(ours), ours.device)[0] if self.config.trg_gather else 0
        places = draw_places(valid, self.config.trg_tokens_per_image, step, self.config.trg_seed, first)
        ours, theirs = (x.take_along_dim(places[..., None], 1).flatten(0, 1) for x in (ours, theirs))
        kept = valid.take_along_dim(places, 1).flatten()
        return (ours, theirs) if mask is None else (ours[kept], theirs[kept])

    def _graphs(self, ours: Tensor, theirs: Tensor, examples: int) -> dict[str, Tensor]:
        projected = self.project(ours.to(self.project.weight.dtype))
        if not self.config.trg_gather:
            return _relations(ours, theirs, projected, self.config, self._tau)
        everything = with_other_ranks(ours), gather_rows(theirs), with_other_ranks(projected)
        whole = _relations(*everything, self.config, self._tau)
        # each rank's share in the mean over ranks is its share of examples, and its gradient is by its own tokens only
        more = ranks_before(examples, ours.device)[1] / examples - 1
        return {name: value + more * (value - value.detach()) for name, value in whole.items()}

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        self.state["step"] = self.state["step"] + 1

    def logs(self) -> dict[str, float]:
        return {"trg_tau": self._tau}


@exactly
def _relations(ours: Tensor, theirs: Tensor, projected: Tensor, config: TRGConfig, tau: float) -> dict[str, Tensor]:
    """The terms on drawn tokens (M, D), and the mean share of neighbours that both networks' tokens have."""
    settings = config.trg_k, config.trg_sigma, config.trg_normalize_tokens
    student, teacher = (_edges(x, *settings) for x in (ours, theirs.detach()))
    known = torch.zeros(len(ours), len(ours), dtype=torch.bool, device=ours.device).scatter_(0, teacher.nearest.T, True)
    common = known.gather(0, student.nearest.T).sum() / max(student.nearest.numel(), 1)
    local = _local(student, teacher, config.trg_local_direction, config.trg_local_sharpness)
    return {"trg_local": local, "trg_global": trg_global_loss(projected, theirs, tau), "trg_knn_overlap": common}


def ranks_before(count: int, device: torch.device) -> tuple[int, int]:
    """How many items the ranks before this one have, and all of them together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, count
    counts = gather_rows(torch.tensor([count], device=device)).tolist()
    return sum(counts[: torch.distributed.get_rank()]), sum(counts)


def with_other_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks in their order, this one's with their gradient."""
    first, _ = ranks_before(len(rows), rows.device)
    everything = gather_rows(rows.detach())
    return torch.cat([everything[:first], rows, everything[first + len(rows) :]])


def build_trainer(student, teacher, train_dataset, config: TRGConfig, args, *, processing_class=None, **others):
    """DistillTrainer for this method; `args` is a DistillConfig. A tokenizer names the special tokens of texts."""
    from hf_distill.training.trainers import trainer_for

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    special = {*getattr(tokenizer, "all_special_ids", ())} - {getattr(tokenizer, "unk_token_id", None)}
    return trainer_for(args)(
        student,
        teacher=teacher,
        objective=TRG(config, tuple(sorted(special))),
        args=args,
        train_dataset=train_dataset,
        processing_class=processing_class,
        **others,
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
