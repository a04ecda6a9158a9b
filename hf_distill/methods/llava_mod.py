"""LLaVA-MoD: a small vision-language model becomes sparse and learns from a large dense one, in four stages.

    0 adaptor     next-token loss on captions; only the projector trains
    1 dense       the teacher's answer tokens, dense student (KD alone)
    2 sparse      feed-forward blocks become routed experts; KD + label loss + balance
    3 preference  pairs of answers, the teacher as the reference (kto_pair or DPO) + balance

Each stage is a trainer of its own in `<output_dir>/<number>_<stage>`; a killed run goes on in its stage. Text-only
students go the same way without stage 0. The KD term is logged as KL(teacher ‖ student), whose gradient is that of the
paper's cross-entropy form.

    student, processor = build_vlm("openai/clip-vit-large-patch14-336", "Qwen/Qwen2-0.5B")
    student = distill(student, teacher, chats, LlavaModConfig(), args, preference_dataset=pairs,
                      caption_dataset=captions, processing_class=processor)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from hf_distill.losses import Divergence, ForwardKL, LabelCrossEntropy
from hf_distill.losses.balance import FORMS, balance_loss
from hf_distill.losses.mimic import (
    ALIGNMENTS,
    LOSSES,
    TOKENS,
    FirstEntries,
    marks_rows,
    mimic_kd_loss,
    mimic_objective,
    next_token_ce,
    one_of,
    sequence_logps,
)
from hf_distill.losses.preference import preference_loss
from hf_distill.methods._card import MethodCard
from hf_distill.objectives import NextToken, Objective
from hf_distill.signals import Signals

CARD = MethodCard(
    slug="llava_mod",
    title="LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation",
    arxiv="2408.15881",
    year=2024,
    kind="students",
    modality="vision-language",
    couples_batch="the share of tokens that goes to each expert is taken over one micro-batch",
    citation="""@inproceedings{shu2025llavamod,
  title = {{LLaVA-MoD}: Making {LLaVA} Tiny via {MoE} Knowledge Distillation},
  author = {Fangxun Shu and Yue Liao and Le Zhuo and Chenning Xu and others},
  booktitle = {International Conference on Learning Representations}, year = {2025}
}""",
)

STAGES = ("adaptor", "dense", "sparse", "preference")
PREFERENCE_LOSSES = ("kto_pair", "sigmoid")


@dataclass
class LlavaModConfig:
    """Defaults are those of the official scripts (shells/train/qwen) where not said otherwise.

    Weight decay 0, cosine, a warm-up of 3% and one epoch per stage are the run's own arguments.
    """

    stages: str = field(default=",".join(STAGES), metadata={"help": f"Stages to run, of {', '.join(STAGES)}."})
    distill_tokens: str = field(default="response", metadata={"help": "KD on response tokens, or on all."})
    mask_alignment: str = field(
        default="next_token",
        metadata={"help": "next_token: KD where an answer token is predicted; official: where it stands (parity)."},
    )
    common_vocab: int | None = field(
        default=None, metadata={"help": "KD compares this many first entries. Default: all that both heads have."}
    )
    dense_loss: str = field(default="only_kd", metadata={"help": "Of stage 1: only_kd or kd_lm (adds label loss)."})
    sparse_loss: str = field(default="kd_lm", metadata={"help": "Of stage 2: only_kd or kd_lm (adds label loss)."})
    aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss; 0 leaves it out."})
    aux_loss_form: str = field(
        default="gshard",
        metadata={"help": "gshard (official: 1 per balanced layer) or hf (transformers': top_k in all)."},
    )
    layers: str = field(
        default="alternate",
        metadata={"help": "Sparse layers: alternate, first_half, second_half, all, or numbers such as 0,2,4."},
    )
    num_experts: int = field(default=4, metadata={"help": "Experts per sparse layer."})
    top_k: int = field(default=2, metadata={"help": "Experts that each token goes to."})
    router_std: float = field(default=0.02, metadata={"help": "Standard deviation of the routers' first weights."})
    router_seed: int = field(default=0, metadata={"help": "Of the routers' first weights."})
    native_only: bool = field(default=False, metadata={"help": "Refuse families without a sparse transformers class."})
    capacity_factor: float | None = field(
        default=None, metadata={"help": "In training, drop choices of an expert beyond this times its even share."}
    )
    adaptor_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of stage 0."})
    dense_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of stage 1."})
    sparse_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of stage 2."})
    preference_learning_rate: float = field(default=2e-6, metadata={"help": "Learning rate of stage 3."})
    adaptor_max_steps: int = field(default=-1, metadata={"help": "Steps of stage 0; -1: the run's own."})
    dense_max_steps: int = field(default=-1, metadata={"help": "Steps of stage 1; -1: the run's own."})
    sparse_max_steps: int = field(default=-1, metadata={"help": "Steps of stage 2; -1: the run's own."})
    preference_max_steps: int = field(default=-1, metadata={"help": "Steps of stage 3; -1: the run's own."})
    preference_loss_type: str = field(default="kto_pair", metadata={"help": "kto_pair (scripts) or sigmoid (DPO)."})
    preference_beta: float = field(default=0.1, metadata={"help": "Scale of the rewards."})
    preference_label_smoothing: float = field(default=0.0, metadata={"help": "Of sigmoid: how often pairs are wrong."})

    def __post_init__(self):
        one_of("distill_tokens", self.distill_tokens, TOKENS)
        one_of("mask_alignment", self.mask_alignment, ALIGNMENTS)
        one_of("dense_loss", self.dense_loss, LOSSES)
        one_of("sparse_loss", self.sparse_loss, LOSSES)
        one_of("aux_loss_form", self.aux_loss_form, FORMS)
        one_of("preference_loss_type", self.preference_loss_type, PREFERENCE_LOSSES)
        for name, value in vars(self).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, not negative, got {value}")
        for name in (*(f"{stage}_learning_rate" for stage in STAGES), "preference_beta", "router_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.preference_label_smoothing >= 0.5:
            raise ValueError(f"preference_label_smoothing must be below 0.5, got {self.preference_label_smoothing}")
        if self.preference_label_smoothing and self.preference_loss_type == "kto_pair":
            raise ValueError("preference_label_smoothing belongs to preference_loss_type=sigmoid: kto_pair has none")
        if self.common_vocab is not None and self.common_vocab < 1:
            raise ValueError(f"common_vocab must be at least 1, got {self.common_vocab}")
        for stage in STAGES:
            if (steps := getattr(self, f"{stage}_max_steps")) == 0 or steps < -1:
                raise ValueError(f"{stage}_max_steps must be positive, or -1 for the run's own, got {steps}")
        if not 1 <= self.top_k <= self.num_experts or self.num_experts < 2:
            raise ValueError(
                f"top_k={self.top_k} active experts of num_experts={self.num_experts}: choose at least 2 experts, and "
                "1 to as many active ones"
            )
        self.stage_names()

    def stage_names(self) -> list[str]:
        """The stages to run, in order. Raises ValueError for unknown or unordered ones."""
        names = [name.strip() for name in self.stages.split(",") if name.strip()]
        if not names or names != [stage for stage in STAGES if stage in names]:
            raise ValueError(f"stages={self.stages!r}: choose some of {','.join(STAGES)}, in this order")
        return names

    def upcycle_settings(self):
        """The UpcycleConfig of stage 2."""
        from hf_distill.students import UpcycleConfig

        names = ("layers", "num_experts", "top_k", "router_std", "native_only", "capacity_factor")
        return UpcycleConfig(**{name: getattr(self, name) for name in names}, seed=self.router_seed)


def __getattr__(name: str):
    if name in ("route_top_k", "routed_ffn"):  # they need transformers, which a list of methods does not
        from hf_distill.students import routed

        return getattr(routed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- objective ------------------------------------------------------------------------------------------------------
class Mimic(Objective):
    """KD on the teacher's tokens and, for "kd_lm", the label loss; both in one projection where they share rows.

    Added to a `BalanceLoss` for sparse students: see `objective_for`. With "all" tokens or the "official" alignment the
    two terms are means over other rows, which `MimicRows` marks in the batch.
    """

    paper = CARD

    def __init__(self, config: LlavaModConfig, loss_type: str = "kd_lm"):
        super().__init__()
        one_of("loss_type", loss_type, LOSSES)
        self.config, self.loss_type = config, loss_type
        self.marked = marks_rows(config.distill_tokens, config.mask_alignment)
        if self.marked:
            self.per = {"kd": "kd_token", "lm": "lm_token"}

    def logit_terms(self, progress: float) -> dict[str, Divergence]:
        size = self.config.common_vocab
        return {"kd": ForwardKL() if size is None else FirstEntries(size), "lm": LabelCrossEntropy()}

    def weights(self, progress: float) -> dict[str, float]:
        return {"kd": 1.0, "lm": float(self.loss_type == "kd_lm")}

    def row_weights(self, student: Signals, teacher: Signals | None, progress: float) -> dict[str, Tensor]:
        if not self.marked:
            return {}
        marks = {term: student.batch[f"cached_{term}"].float() for term in ("kd", "lm")}
        return {term: mark * (len(mark) / mark.sum().clamp(min=1)) for term, mark in marks.items()}

    def count(self, batch: dict) -> dict[str, int]:
        return {f"{term}_token": int(batch[f"cached_{term}"].sum()) for term in ("kd", "lm")} if self.marked else {}


def objective_for(student, config: LlavaModConfig, loss_type: str) -> Objective:
    """What a student is trained for in stages 1 and 2: Mimic, and balance where it has routers."""
    from hf_distill.students import BalanceLoss, routed_blocks

    objective = Mimic(config, loss_type)
    if not config.aux_loss_coef or not routed_blocks(student):
        return objective
    balanced = objective + config.aux_loss_coef * BalanceLoss(config.aux_loss_form)
    balanced.paper = CARD
    return balanced


def adaptor_objective() -> Objective:
    """What the projector is trained for in stage 0: the next token of captions."""
    objective = NextToken()
    objective.paper = CARD
    return objective


# ---- running --------------------------------------------------------------------------------------------------------
def build_trainer(student, teacher, train_dataset, config: LlavaModConfig, args, *, stage="sparse", **arguments):
    """The trainer of one stage, with `args` as they are: learning rate and steps are theirs, not the config's.

    Args:
        student: a model or path. For stage "sparse" a dense one is upcycled first; a sparse one must have the config's
            experts.
        stage: one of STAGES; "preference" takes rows of pairs and gives a DistillDPOTrainer.
        args: DistillSFTConfig; for "preference" also DistillDPOConfig, whose own loss, beta and balance then hold.

    Raises:
        ValueError: settings, models or data that do not fit together, before any long work.
    """
    from hf_distill.methods._llava_mod_stages import build_stage

    one_of("stage", stage, STAGES)
    return build_stage(student, teacher, train_dataset, config, args, stage=stage, **arguments)


def distill(
    student,
    teacher,
    train_dataset,
    config: LlavaModConfig,
    args,
    *,
    caption_dataset=None,
    sparse_dataset=None,
    preference_dataset=None,
    eval_dataset=None,
    preference_eval_dataset=None,
    processing_class=None,
    data_collator=None,
    callbacks=None,
    peft_config=None,
    compute_metrics=None,
    resume_from_checkpoint=None,
):
    """Run the stages, and give back the clean student in eval mode, loaded from the last stage's folder.

    Args:
        train_dataset: of stages 1 and 2, and of stage 0 without a `caption_dataset`.
        sparse_dataset: of stage 2 (paper: VQA, documents, OCR); None is `train_dataset`.
        preference_dataset: rows of (image,) prompt, chosen, rejected; needed for stage 3.
        args: DistillSFTConfig of all stages; each has the config's learning rate and, where given, steps.
        resume_from_checkpoint: True goes on where a killed run ended: finished stages are skipped, the unfinished one
            goes on from its newest complete checkpoint.
        data_collator, compute_metrics: of stages 0 to 2.

    Raises:
        ValueError: what would fail in a later stage, before the first; an output folder that holds another run; an
            adapter (train one stage with it by `build_trainer`).
    """
    from hf_distill.methods._llava_mod_stages import check_run, run

    data = {"adaptor": caption_dataset if caption_dataset is not None else train_dataset, "dense": train_dataset}
    data |= {"sparse": sparse_dataset if sparse_dataset is not None else train_dataset}
    data |= {"preference": preference_dataset}
    check_run(config, data, peft_config, resume_from_checkpoint)
    shared = {"eval_dataset": eval_dataset, "data_collator": data_collator, "compute_metrics": compute_metrics}
    return run(
        student,
        teacher,
        data,
        config,
        args,
        of_stage={stage: shared for stage in STAGES[:3]} | {"preference": {"eval_dataset": preference_eval_dataset}},
        processing_class=processing_class,
        callbacks=callbacks,
        resume=bool(resume_from_checkpoint),
    )


__all__ = [
    "CARD",
    "STAGES",
    "LlavaModConfig",
    "Mimic",
    "balance_loss",
    "build_trainer",
    "distill",
    "mimic_kd_loss",
    "mimic_objective",
    "next_token_ce",
    "preference_loss",
    "route_top_k",  # noqa: F822
    "routed_ffn",  # noqa: F822
    "sequence_logps",
]
