"""HARD: an augmenter learns pictures on which the student disagrees with its teacher, while the teacher stays itself.

The student follows the teacher on them, and so learns equivariances that plain data does not show. The augmenter learns
the widths of a distribution of transforms by gradients through student and teacher.

    accelerate launch recipes/hard_augment.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name …

Reconstruction: only the paper's abstract was at hand. The two losses are from memory of the paper, and the limit on
disagreement is a remembered rule; every constant, the warm-up and the families of transforms are ours.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from hf_distill.curricula.augment import FAMILIES, WIDTH_LIMIT, picture_keys, save_grid, within_range
from hf_distill.heads import collect
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.signals import Signals, upcast
from hf_distill.teachers import FrozenTeacher, PrivilegedTeacher
from hf_distill.training.callbacks import DistillCallback
from hf_distill.training.inner import InnerObjective, OwnAdam, Run

CARD = MethodCard(
    slug="hard_augment",
    title="HARD: Hard Augmentations for Robust Distillation",
    arxiv="2305.14890",
    year=2023,
    kind="data",
    modality="image",
    citation="""@misc{nix2023hard,
  title = {{HARD}: Hard Augmentations for Robust Distillation},
  author = {Arne F. Nix and Max F. Burg and Fabian H. Sinz},
  year = {2023}, eprint = {2305.14890}, archivePrefix = {arXiv}
}""",
)

LOGITS = frozenset({"logits"})
PIXELS, OWN_PIXELS = "pixel_values", "teacher_pixel_values"


@dataclass
class HardAugmentConfig:
    """All numbers are ours: the paper's were not at hand."""

    hard_family: str = field(default="affine", metadata={"help": f"One of {', '.join(FAMILIES)}."})
    temperature: float = field(default=4.0, metadata={"help": "Softmax temperature of both models."})
    hard_lambda_s: float = field(default=1.0, metadata={"help": "Weight of the student's disagreement (augmenter)."})
    hard_lambda_t: float = field(default=1.0, metadata={"help": "Weight of the teacher's shift (augmenter)."})
    hard_max_teacher_shift: float = field(
        default=2.0, metadata={"help": "T² · KL by which the teacher's answer may move on an augmented picture."}
    )
    hard_max_disagreement: float | None = field(
        default=None, metadata={"help": "The augmenter rests while the mean disagreement is larger. Default: never."}
    )
    hard_augmentor_lr: float = field(default=0.1, metadata={"help": "Learning rate of the augmenter's Adam."})
    hard_start_step: int = field(
        default=100,
        metadata={"help": "Steps before the augmenter learns: 10 to 25%% of training, until plain KD is small."},
    )
    hard_every: int = field(default=1, metadata={"help": "Optimizer steps per step of the augmenter."})
    hard_clean_weight: float = field(default=1.0, metadata={"help": "Weight of KD on the pictures as they are."})
    hard_label_weight: float = field(default=0.0, metadata={"help": "Weight of cross-entropy on these."})
    hard_grid_steps: int = field(
        default=500, metadata={"help": "Steps between pictures of the augmenter's work (output_dir/samples); 0: none."}
    )

    def __post_init__(self):
        if self.hard_family not in FAMILIES:
            raise ValueError(f"hard_family must be one of {', '.join(FAMILIES)}, got {self.hard_family!r}")
        for name in ("temperature", "hard_augmentor_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        weights = ("hard_lambda_s", "hard_lambda_t", "hard_max_teacher_shift", "hard_clean_weight", "hard_label_weight")
        for name in (*weights, "hard_max_disagreement", "hard_start_step", "hard_grid_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, and finite, got {value}")
        if self.hard_every < 1:
            raise ValueError(f"hard_every must be at least 1, got {self.hard_every}")


# ---- pure functions --------------------------------------------------------------------------------------------------
@exactly
def disagreement(first: Tensor, second: Tensor, temperature: float = 4.0) -> Tensor:
    """(B,) T² · KL(softmax(first / T) ‖ softmax(second / T)); gradient through both."""
    p, q = (z.div(temperature).log_softmax(-1) for z in (first, second))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def hard_student_loss(teacher_aug: Tensor, student_aug: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean disagreement on augmented pictures; the teacher is a constant."""
    return disagreement(teacher_aug.detach(), student_aug, temperature).mean()


def hard_augmentor_loss(
    teacher_clean: Tensor,
    teacher_aug: Tensor,
    student_aug: Tensor,
    temperature: float = 4.0,
    lambda_s: float = 1.0,
    lambda_t: float = 1.0,
    max_teacher_shift: float = 2.0,
) -> Tensor:
    """mean_i [-lambda_s · D(t(x~), s(x~)) + lambda_t · relu(D(t(x), t(x~)) - max_teacher_shift)].

    D is `disagreement`. The teacher on clean pictures is a constant; gradient flows through both others.
    """
    student = disagreement(teacher_aug, student_aug, temperature)
    shift = disagreement(teacher_clean.detach(), teacher_aug, temperature)
    return (lambda_t * (shift - max_teacher_shift).relu() - lambda_s * student).mean()


# ---- the objective ---------------------------------------------------------------------------------------------------
class HardAugment(InnerObjective):
    """KD on augmented and on clean pictures, and the augmenter's step.

    What is drawn for a picture is decided by (seed, step, its pixels), so nothing depends on batches and ranks.
    Pictures are augmented with black at 0 and white at 1, whatever the two models' normalisations.

    Args:
        student_range, teacher_range: (mean, std) per channel that pixels were normalised with; None: they were not. The
            teacher's counts where batches hold `teacher_pixel_values`; else it reads the student's pixels.
        seed: of the draws.
    """

    needs = LOGITS
    per = "sample"
    paper = CARD

    def __init__(self, config: HardAugmentConfig | None = None, *, student_range=None, teacher_range=None, seed=0):
        super().__init__()
        c = self.config = config or HardAugmentConfig()
        self.family, self.seed = FAMILIES[c.hard_family](), seed
        self.student_range, self.teacher_range = student_range, teacher_range
        self.adam = OwnAdam(self.state, "augmenter", self.family.start(), lr=c.hard_augmentor_lr)
        self.state["step"] = torch.zeros((), dtype=torch.int64)
        self.state["measured"] = torch.full((3,), torch.nan)  # disagreement, teacher's shift, contrast kept

    def setup(self, student: nn.Module, teacher) -> None:
        frozen = teacher.teacher if isinstance(teacher, PrivilegedTeacher) else teacher  # reads pixels of its own
        if not isinstance(frozen, FrozenTeacher):
            raise ValueError(
                f"HARD needs the gradient of its teacher's answer by the picture, which {type(frozen).__name__} does "
                "not give: use a FrozenTeacher (a model, Hub id or folder), not a cache, an ensemble or text"
            )
        frozen.check_input_gradient()
        self._models = (student, teacher)  # in a tuple: no parts of this module

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        batch = student.batch
        with torch.no_grad():
            seen = self.augmented(batch, 2 * self.state["step"])[0]
            theirs = self._models[1](seen, LOGITS).logits
        ours = collect(self._models[0], seen, LOGITS, None, dense=True).logits
        terms = {
            "augmented": hard_student_loss(theirs, ours, self.config.temperature),
            "clean": hard_student_loss(teacher.logits, student.logits, self.config.temperature),
        }
        if student.labels is not None:
            terms["label"] = cross_entropy(upcast(student.logits), student.labels)
        return terms

    def weights(self, progress: float) -> dict[str, float]:
        return {"clean": self.config.hard_clean_weight, "label": self.config.hard_label_weight}

    def augmented(
        self, batch: dict, draw: int | Tensor, learned: dict[str, Tensor] | None = None
    ) -> tuple[dict, Tensor, Tensor]:
        """A batch with augmented pixels, and its pictures (0 to 1) before and after.

        Args:
            draw: which of a picture's draws.
            learned: of the family; None takes the present ones.
        """
        if PIXELS not in batch or batch[PIXELS].dim() != 4:
            raise ValueError(f"HARD augments {PIXELS} (B, channels, H, W), the batch has {', '.join(sorted(batch))}")
        pixels = batch[PIXELS]
        mean, std = _per_channel(self.student_range, pixels)
        pictures = upcast(pixels) * std + mean
        learned = self.adam.tensors() if learned is None else learned
        after = self.family(pictures, learned, picture_keys(pixels, self.seed, draw))
        after = within_range(after, pictures)
        seen = batch | {PIXELS: ((after - mean) / std).to(pixels.dtype)}
        if OWN_PIXELS in batch:
            size = batch[OWN_PIXELS].shape[-2:]
            own = after if size == after.shape[-2:] else interpolate(after, size=size, mode="bilinear", antialias=True)
            mean, std = _per_channel(self.teacher_range, own)
            seen[OWN_PIXELS] = ((own - mean) / std).to(batch[OWN_PIXELS].dtype)
        return seen, pictures, after

    def before_step(self, batches: list[dict], run: Run) -> None:
        """One step of the augmenter, on draws of its own, after the warm-up.

        Paper: the remembered rule stops the ascent of samples that are too hard; here the whole step is left out.
        """
        self.state["step"] = torch.full_like(self.state["step"], run.step)
        c = self.config
        if run.step < c.hard_start_step or run.step % c.hard_every:
            return
        leaves = self.adam.leaves()
        sums = [torch.zeros_like(leaf) for leaf in leaves.values()] + [self.state["measured"].new_zeros(4)]
        with run.quiet(training=True, frozen=True):
            for batch in batches:
                sums = [a + b for a, b in zip(sums, self._sums(batch, leaves, run), strict=True)]
        *gradients, measured = run.sum(*sums)
        count = measured[3].clamp(min=1)
        self.state["measured"] = measured[:3] / count
        if c.hard_max_disagreement is None or self.state["measured"][0] <= c.hard_max_disagreement:
            self.adam.step({key: gradient / count for key, gradient in zip(leaves, gradients, strict=True)})
            widths = self.state["augmenter.widths"]
            self.state["augmenter.widths"] = widths.clamp(-WIDTH_LIMIT, WIDTH_LIMIT)

    def _sums(self, batch: dict, leaves: dict[str, Tensor], run: Run) -> list[Tensor]:
        """Of a micro-batch: the gradients, and [disagreement, teacher's shift, contrast kept, examples], added up."""
        c = self.config
        seen, before, after = self.augmented(batch, 2 * self.state["step"] + 1, leaves)
        clean = run.teacher(batch, LOGITS).logits
        teacher, own = run.teacher, seen
        if isinstance(teacher, PrivilegedTeacher):
            teacher, own = teacher.teacher, teacher.own_batch(seen)
        theirs, ours = teacher.with_input_gradient(own, LOGITS).logits, run.signals(seen).logits
        weights = (c.temperature, c.hard_lambda_s, c.hard_lambda_t, c.hard_max_teacher_shift)
        loss = hard_augmentor_loss(clean, theirs, ours, *weights) * len(clean)
        with torch.no_grad():
            apart, shift = (disagreement(a, b, c.temperature).sum() for a, b in ((theirs, ours), (clean, theirs)))
            contrast = (after.std((1, 2, 3)) / before.std((1, 2, 3)).clamp(min=1e-6)).sum()
            measured = torch.stack([apart, shift, contrast, apart.new_tensor(len(clean))]).float()
        return [*torch.autograd.grad(loss, list(leaves.values())), measured]

    def logs(self) -> dict[str, float]:
        measured = zip(("disagreement", "teacher_shift", "contrast_kept"), self.state["measured"].tolist(), strict=True)
        return {name: value for name, value in measured if value == value} | self.family.describe(self.adam.tensors())


def _per_channel(given, pixels: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
    if given is None:
        return 0.0, 1.0
    mean, std = (torch.tensor(x, device=pixels.device, dtype=upcast(pixels).dtype).reshape(-1, 1, 1) for x in given)
    return mean, std


def pixel_range(processor) -> tuple[list[float], list[float]] | None:
    """(mean, std) per channel that an image processor normalises with; None where it does not, or is not known."""
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return None if mean is None or std is None or not getattr(processor, "do_normalize", False) else (mean, std)


class PictureGrid(DistillCallback):
    """Writes eight pictures of a batch, before and after augmentation, to output_dir/samples/augmented-<step>.png."""

    def __init__(self, objective: HardAugment, every: int):
        self.objective, self.every, self._last = objective, every, None

    def on_distill_loss(self, args, state, control, *, student: Signals, **kwargs) -> None:
        if not state.is_world_process_zero or state.global_step % self.every or state.global_step == self._last:
            return
        self._last = state.global_step
        few = {key: student.batch[key][:8] for key in (PIXELS, OWN_PIXELS) if key in student.batch}
        with torch.no_grad():
            _, before, after = self.objective.augmented(few, 2 * self.objective.state["step"])
        folder = os.path.join(args.output_dir, "samples")
        os.makedirs(folder, exist_ok=True)
        save_grid([before, after], os.path.join(folder, f"augmented-{state.global_step}.png"))


def build_trainer(student, teacher, train_dataset, config: HardAugmentConfig, args, *, callbacks=None, **given):
    """A trainer for this method. The normalisations of both models are those of their image processors.

    Raises:
        ValueError: a teacher through which no gradient flows (cached, text, 4-bit, an ensemble).
    """
    from hf_distill.training.trainers import trainer_for

    objective = HardAugment(config)
    callbacks = [
        *(callbacks or ()),
        *([PictureGrid(objective, config.hard_grid_steps)] if config.hard_grid_steps else ()),
    ]
    trainer = trainer_for(args)(
        student,
        teacher=teacher,
        objective=objective,
        args=args,
        train_dataset=train_dataset,
        callbacks=callbacks,
        **given,
    )
    objective.seed, objective.student_range = trainer.args.seed, pixel_range(trainer.processing_class)
    objective.teacher_range = pixel_range(trainer.teacher.tokenizer) or objective.student_range
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
