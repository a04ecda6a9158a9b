"""Swing distillation: every target token has its own temperature, higher the more private it is, and noise on the
teacher's distribution there, so that secrets of the teacher's training data are not handed to the student.

    s_t = how private the target is, in [0, 1]        T_t = t_min + (t_max - t_min) · s_t
    p̃_t = normalise(max(softmax(teacher / T_t) + s_t · noise, 0))
    L = (1 - w) · mean (1 - s_t) · CE_t + w · mean KL(p̃_t ‖ softmax(student / T_t))

    accelerate launch recipes/swing.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

Only the paper's abstract was at hand [reconstruction]: the scorers, the linear temperature, the form and size of the
noise, the missing T² (it would undo the protection), w and the (1 - s_t) on the labels are ours. Canary exposure is
Carlini et al.'s (2019). The noise is a heuristic and NOT a guarantee of differential privacy: scores and clamping
depend on the data. Its mass grows with the vocabulary: sigma 0.05 over thousands of entries leaves a private target
hardly anything of the teacher.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_distill.curricula import privacy
from hf_distill.curricula.draws import GOLDEN, gaussian, laplace, mix
from hf_distill.evaluation.exposure import CanaryExposureCallback, read_canaries
from hf_distill.evaluation.exposure import exposure as exposure
from hf_distill.losses import Divergence, LabelCrossEntropy
from hf_distill.losses.fused import one_term
from hf_distill.losses.noisy import NoisyKL, RowNumber
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import Objective
from hf_distill.signals import Signals
from hf_distill.teachers.referenced import REFERENCE, TEACHER, ReferencedTeacher

CARD = MethodCard(
    slug="swing",
    title="Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework",
    arxiv="2212.08349",
    year=2022,
    kind="logits",
    modality="text",
    citation="""@misc{li2022swing,
  title = {Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework},
  author = {Junzhuo Li and Xinwei Wu and Weilong Dong and Shuangzhi Wu and Chao Bian and Deyi Xiong},
  year = {2022}, eprint = {2212.08349}, archivePrefix = {arXiv}
}""",
)

SCORERS = ("pattern", "likelihood_ratio", "rarity", "given")
NOISES = {"gaussian": gaussian, "laplace": laplace}


@dataclass
class SwingConfig:
    """All numbers are ours [reconstruction]; the paper's were not at hand."""

    swing_t_min: float = field(default=1.0, metadata={"help": "Temperature of a token that is not private at all."})
    swing_t_max: float = field(default=10.0, metadata={"help": "Temperature of a token that is private for sure."})
    swing_noise: str = field(default="gaussian", metadata={"help": "Noise on soft targets: gaussian, laplace or none."})
    swing_sigma: float = field(default=0.05, metadata={"help": "Standard deviation of gaussian noise, per entry."})
    swing_epsilon: float | None = field(
        default=None, metadata={"help": "Budget of laplace noise, scale = sensitivity / epsilon; larger is less noise."}
    )
    swing_sensitivity: float = field(default=1.0, metadata={"help": "How far one probability can move; for laplace."})
    swing_noise_everywhere: bool = field(
        default=False, metadata={"help": "The same noise on every token, instead of in proportion to its score."}
    )
    swing_scorer: str = field(
        default="pattern",
        metadata={"help": f"{', '.join(SCORERS)}, or several joined by +: the largest score counts."},
    )
    swing_patterns: list[str] | None = field(
        default=None, metadata={"help": "pattern: regular expressions; default digit runs, IDs, e-mail, phone, cards."}
    )
    swing_reference_model: str | None = field(
        default=None, metadata={"help": "likelihood_ratio: a public model with the teacher's tokenizer."}
    )
    swing_m: float = field(default=2.0, metadata={"help": "likelihood_ratio: log ratio of score 0.5."})
    swing_k: float = field(default=1.0, metadata={"help": "likelihood_ratio: how slowly the score rises around it."})
    swing_public_counts: str | None = field(
        default=None, metadata={"help": "rarity: safetensors file with counts (V,) of tokens in public text."}
    )
    swing_common: float = field(default=1000.0, metadata={"help": "rarity: the count from which a token scores 0."})
    swing_weight: float = field(default=0.5, metadata={"help": "w, of the soft targets; the labels get 1 - w."})
    swing_mask_hard: bool = field(default=True, metadata={"help": "Weigh the label loss of a token by 1 - its score."})
    swing_canaries: str | None = field(
        default=None, metadata={"help": "JSON file of planted canaries, whose exposure is logged before and after."}
    )
    swing_canary_every: int = field(default=0, metadata={"help": "Steps between measurements of exposure; 0: none."})

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        _check_temperatures(self.swing_t_min, self.swing_t_max)
        if self.swing_noise not in (*NOISES, "none"):
            raise ValueError(f"swing_noise must be one of {', '.join(NOISES)} or none, got {self.swing_noise!r}")
        if (self.swing_noise == "laplace") != (self.swing_epsilon is not None):
            raise ValueError(
                "swing_epsilon and laplace noise belong together (gaussian noise is set by swing_sigma), got "
                f"swing_noise={self.swing_noise!r} and swing_epsilon={self.swing_epsilon}"
            )
        for name in ("swing_epsilon", "swing_sensitivity", "swing_k"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("swing_sigma", "swing_canary_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.swing_weight <= 1:
            raise ValueError(f"swing_weight must lie between 0 and 1, got {self.swing_weight}")
        self._check_scorers()

    def _check_scorers(self) -> None:
        if unknown := set(self.scorers) - set(SCORERS):
            raise ValueError(
                f"unknown swing_scorer {'+'.join(sorted(unknown))}; join some of {', '.join(SCORERS)} by +"
            )
        files = {"likelihood_ratio": "swing_reference_model", "rarity": "swing_public_counts"}
        for scorer, name in files.items():
            if (scorer in self.scorers) != (getattr(self, name) is not None):
                raise ValueError(f"the scorer {scorer} and {name} belong together: give both or neither")
        if self.swing_common <= 1:
            raise ValueError(f"swing_common must be above 1, got {self.swing_common}")
        for pattern in self.swing_patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"swing_patterns holds {pattern!r}, no regular expression: {error}") from error

    @property
    def scorers(self) -> list[str]:
        return self.swing_scorer.split("+")

    @property
    def scale(self) -> float:
        """Of the noise on a token of score 1: sigma, or sensitivity / epsilon."""
        if self.swing_noise == "laplace":
            return self.swing_sensitivity / self.swing_epsilon
        return self.swing_sigma if self.swing_noise == "gaussian" else 0.0


# ---- pure functions --------------------------------------------------------------------------------------------------
def token_temperature(privacy_score: Tensor, t_min: float = 1.0, t_max: float = 10.0) -> Tensor:
    """t_min + (t_max - t_min) · score, of any shape.

    Raises:
        ValueError: t_min not positive, or t_max below it.

    Example:
        >>> token_temperature(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [1.0, 5.5, 10.0]
    """
    _check_temperatures(t_min, t_max)
    return t_min + (t_max - t_min) * privacy_score


def _check_temperatures(t_min: float, t_max: float) -> None:
    if not 0 < t_min <= t_max:
        raise ValueError(f"temperatures must hold 0 < t_min <= t_max, got {t_min} and {t_max}")


def swing_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None,
    privacy_score: Tensor,
    t_min: float = 1.0,
    t_max: float = 10.0,
    noise: Tensor | None = None,
) -> Tensor:
    """L_KD, without the hard loss: mean over mask of KL(p̃ ‖ softmax(student / T)).

    Args:
        student_logits: (B, S, V) of any float type, aligned with the labels, or HeadLogits of (N, V).
        teacher_logits: (B, S, V), no gradient.
        mask: (B, S) bool; None counts all. All False gives 0.
        privacy_score: (B, S) in [0, 1], of each position's target.
        noise: (B, S, V) the draw, already at its scale and not yet multiplied by the score; None: none.

    Example:
        >>> student, teacher = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> [round(swing_kd_loss(student, teacher, None, torch.tensor([[s]])).item(), 4) for s in (0.0, 1.0)]
        [1.5232, 0.0199]
    """
    temperatures = token_temperature(privacy_score, t_min, t_max)
    given = None if noise is None else noise.detach().reshape(-1, noise.shape[-1])
    term = NoisyKL(temperatures.flatten(), privacy_score.flatten(), given, _as_given)
    return one_term(student_logits, teacher_logits, term, mask=mask)


def _as_given(noise: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return noise[:, :width].to(dtype)


def noise_keys(student: Signals, seed: int, step: Tensor) -> Tensor:
    """(N,) int64 that decide each loss row's noise: seed, step, what its document says, and its place therein.

    Paper: (R) seeds a generator by (seed, step, rank). Keys of the text make the noise the same however the examples of
    a step are split into batches and ranks.
    """
    rows, batch = student.rows, student.batch
    ids = batch["input_ids"]
    mask = batch["attention_mask"].long() if "attention_mask" in batch else None
    places = batch.get("position_ids") if mask is None else mask.cumsum(-1) - 1
    if places is None:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    tokens = mix(ids + GOLDEN * places)
    if mask is not None:
        said = (tokens * mask).sum(-1)[rows.index // batch["labels"].shape[1]]
    else:  # documents follow each other
        document = (places.flatten() == 0).cumsum(0) - 1
        said = torch.zeros_like(document).index_add_(0, document, tokens.flatten())[document[rows.index]]
    number = torch.arange(len(rows.index), device=ids.device)
    first = torch.full_like(number, len(number)).scatter_reduce(0, rows.document, number, "amin")
    place = number - first[rows.document]
    return mix(said + GOLDEN * place + mix(GOLDEN * step + seed))


# ---- the objective ---------------------------------------------------------------------------------------------------
class Swing(Objective):
    """Labels and soft targets of the formula above. Evaluation is without noise.

    Args:
        seed: of the noise.

    Attributes:
        carries: the collator must bring scores (see `curricula.privacy.carry_scores`).
    """

    paper = CARD

    def __init__(self, config: SwingConfig | None = None, seed: int = 0):
        super().__init__()
        self.config, self.seed = config or SwingConfig(), seed
        self.carries = not {"pattern", "given"}.isdisjoint(self.config.scorers)
        self.draw = NOISES.get(self.config.swing_noise)
        self.state = {"step": torch.zeros((), dtype=torch.int64)}
        rarity = None
        if "rarity" in self.config.scorers:
            rarity = privacy.rarity_scores(_public_counts(self.config.swing_public_counts), self.config.swing_common)
        self.register_buffer("rarity", rarity, persistent=False)

    def setup(self, student: nn.Module, teacher) -> None:
        if any(reader.temperature is not None for reader in teacher.readers):
            raise ValueError(
                f"{teacher.name} holds its likeliest entries, or draws, at one temperature. A temperature per token "
                'and noise on every entry need all logits: cache it in mode "hidden" or "logits", or give the model'
            )
        if "likelihood_ratio" in self.config.scorers and not isinstance(teacher, ReferencedTeacher):
            raise ValueError(
                "the scorer likelihood_ratio needs what a public model says: wrap the teacher as "
                "ReferencedTeacher(teacher, reference), as build_trainer does"
            )
        if self.rarity is not None and len(self.rarity) < (needed := teacher.vocabulary_size() or 0):
            raise ValueError(f"swing_public_counts holds {len(self.rarity)} counts and the teacher {needed} tokens")

    def scores(self, student: Signals, teacher: Signals) -> Tensor:
        """(rows,) how private each target is: the largest score."""
        parts = []
        if self.carries:
            if (given := privacy.carried(student)) is None:
                raise ValueError(
                    "the batch carries no privacy scores: prepare the data (for evaluation, too) with "
                    "add_privacy_scores and give the trainer to carry_scores, as build_trainer does"
                )
            parts.append(given.float())
        if self.rarity is not None:
            parts.append(self.rarity[student.labels])
        if "likelihood_ratio" in self.config.scorers:
            log_probs = teacher.features[TEACHER].float(), teacher.features[REFERENCE].float()
            parts.append(privacy.likelihood_ratio_scores(*log_probs, self.config.swing_m, self.config.swing_k))
        return torch.stack(parts).amax(0)

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        measured = {name: RowNumber() for name in ("privacy_score", "private_share", "temperature")}
        return {"label": LabelCrossEntropy(), "swing": NoisyKL(draw=self.draw)} | measured

    def weights(self, progress: float) -> dict[str, float]:
        w = self.config.swing_weight
        return {"label": 1 - w, "swing": w, "privacy_score": 0.0, "private_share": 0.0, "temperature": 0.0}

    def row_weights(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        return {"label": 1 - self.scores(student, teacher)} if self.config.swing_mask_hard else {}

    def row_fields(self, student: Signals, teacher: Signals, progress: float) -> dict[str, dict[str, Tensor]]:
        c, scores = self.config, self.scores(student, teacher)
        temperatures = token_temperature(scores, c.swing_t_min, c.swing_t_max)
        fields = {"temperatures": temperatures}
        if self.training and c.scale > 0:
            fields["scale"] = c.scale * (torch.ones_like(scores) if c.swing_noise_everywhere else scores)
            fields["keys"] = noise_keys(student, self.seed, self.state["step"])
        return {
            "swing": fields,
            "privacy_score": {"number": scores},
            "private_share": {"number": (scores > 0.5).float()},
            "temperature": {"number": temperatures},
        }

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        self.state["step"] = self.state["step"] + 1


def _public_counts(path: str) -> Tensor:
    try:
        return load_file(path)["counts"]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"cannot read the tensor counts of {path}: {error}; save_file({{'counts': ...}}) it"
        ) from error


# ---- training --------------------------------------------------------------------------------------------------------
def build_trainer(
    student,
    teacher,
    train_dataset,
    config: SwingConfig,
    args,
    *,
    eval_dataset=None,
    processing_class=None,
    callbacks=None,
    **trainer_arguments,
):
    """A trainer for this method; its data is tokenised here where scores are carried.

    Args:
        train_dataset, eval_dataset: for DistillSFTConfig see `curricula.privacy.add_privacy_scores`. For DistillConfig
            (encoder-decoders), and with `skip_prepare_dataset`, tokenised rows with `privacy_score` beside `labels`.

    Raises:
        ValueError: data that the scorer cannot score, a canary longer than max_length, a teacher without all logits.
    """
    from hf_distill.training.loading import teacher_from
    from hf_distill.training.trainers import trainer_for

    kind, objective = trainer_for(args), Swing(config, args.seed)
    callbacks = list(callbacks or ())
    if config.swing_canaries is not None:
        callbacks.append(CanaryExposureCallback(read_canaries(config.swing_canaries), config.swing_canary_every))
    if "likelihood_ratio" in config.scorers:
        if (teacher := teacher_from(teacher, args)) is None:
            raise ValueError("the scorer likelihood_ratio compares the teacher with a public model: give a teacher")
        teacher = ReferencedTeacher(teacher, config.swing_reference_model)
    if objective.carries:
        patterns = (config.swing_patterns or privacy.PATTERNS) if "pattern" in config.scorers else None
        train_dataset, eval_dataset, args = privacy.score_data(
            train_dataset, eval_dataset, student, processing_class, args, patterns
        )
    trainer = kind(
        student,
        teacher=teacher,
        objective=objective,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=callbacks,
        **trainer_arguments,
    )
    if objective.carries:
        privacy.carry_scores(trainer)
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
