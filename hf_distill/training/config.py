"""The trainers' settings: those of transformers and TRL, plus the teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from hf_distill.losses.balance import FORMS
from hf_distill.losses.engines import ENGINES
from hf_distill.training.onpolicy_config import OnPolicyArguments


@dataclass
class DistillArguments:
    """What every distillation trainer adds. Field names are TRL's where TRL has them."""

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the teacher. May also be passed to the trainer as `teacher`."},
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the teacher."})
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "JSON of keyword arguments for loading the teacher (device_map, max_memory...)."},
    )
    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of a vLLM server that serves teacher_model_name_or_path under that name "
            "(http://localhost:8000). teacher_model_init_kwargs then go to the connection: concurrency, max_cost..."
        },
    )
    teacher_top_k: int = field(
        default=20,
        metadata={"help": "Log-probabilities asked of the server per token. vLLM: at most --max-logprobs, 20."},
    )
    teacher_store: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps the server's answers. Default: teacher_answers in output_dir."},
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The teacher's dtype (float32, bfloat16, float16, auto). "
            "Default: its checkpoint's on a GPU, float32 on a CPU."
        },
    )
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Load the teacher in 8 bit (bitsandbytes)."})
    teacher_load_in_4bit: bool = field(
        default=False, metadata={"help": "Load the teacher in 4 bit nf4 (bitsandbytes)."}
    )
    teacher_adapter_off: bool = field(
        default=False, metadata={"help": "The teacher is the PEFT student's own base, its adapter switched off."}
    )
    measure_teacher_fidelity: int = field(
        default=0,
        metadata={
            "help": "Compare a quantised teacher with its full precision on this many batches before training and log "
            "KL and top-1 agreement. Needs the full-precision teacher to fit beside it. 0 does not measure."
        },
    )
    allow_different_chat_templates: bool = field(
        default=False, metadata={"help": "Go on when student and teacher chat templates render a sample differently."}
    )
    merge_adapter: bool = field(
        default=False,
        metadata={"help": "save_model writes a LoRA student merged into its base; checkpoints keep the adapter."},
    )
    dense_logits: bool = field(
        default=False,
        metadata={
            "help": "Use the models' own full logits instead of backbone and head (more memory; for unusual heads)."
        },
    )
    objective_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the objective's own parameters. Default: the student's."}
    )
    tile_megabytes: int | None = field(
        default=None,
        metadata={
            "help": "Memory for one tile of logits. Results do not depend on it. Default: 1024 on GPU, 128 on CPU, or "
            "what 256 rows need."
        },
    )
    loss_engine: str = field(
        default="auto",
        metadata={
            "help": "How a tile's divergences run: eager, compile (torch.compile), or auto (compile for vocabularies "
            "from 16,384 on a GPU, else eager)."
        },
    )

    def __post_init__(self):
        if sum((self.teacher_load_in_8bit, self.teacher_load_in_4bit)) > 1:
            raise ValueError("teacher_load_in_8bit and teacher_load_in_4bit exclude each other: choose one")
        if self.measure_teacher_fidelity < 0:
            raise ValueError(f"measure_teacher_fidelity counts batches, got {self.measure_teacher_fidelity}")
        if self.objective_learning_rate is not None and not self.objective_learning_rate > 0:
            raise ValueError(f"objective_learning_rate must be positive, got {self.objective_learning_rate}")
        if self.tile_megabytes is not None and self.tile_megabytes < 1:
            raise ValueError(f"tile_megabytes must be at least 1, got {self.tile_megabytes}")
        if self.loss_engine not in ENGINES:
            raise ValueError(f"loss_engine must be one of {', '.join(ENGINES)}, got {self.loss_engine!r}")
        # torch.compile of the whole model would compile a forward that is never called: the backbone is compiled
        self.compile_options = None
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            self.compile_options = {
                "backend": self.torch_compile_backend or "inductor",
                "mode": self.torch_compile_mode,
            }
            self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for
            if self.bf16 is None:
                self.bf16 = False  # TRL's default; several times slower than float32 on a CPU
        super().__post_init__()
        # the filter hides a NaN and waits for the device at every step; the trainer reads terms at logging instead
        self.logging_nan_inf_filter = False


@dataclass
class DistillConfig(DistillArguments, TrainingArguments):
    """Settings of DistillTrainer: classification, encoders, encoder-decoders, anything of the plain Trainer."""


@dataclass
class DistillSFTConfig(OnPolicyArguments, DistillArguments, SFTConfig):
    """Settings of DistillSFTTrainer: language models and VLMs on text, chats and prompt-completion data."""

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        self.check_text_settings()


@dataclass
class DistillDPOConfig(DistillArguments, DPOConfig):
    """Settings of DistillDPOTrainer: preference distillation with the teacher as the reference.

    `loss_type` takes "kto_pair" (see `losses.preference_loss`) beside TRL's, and `label_smoothing` counts for "sigmoid"
    too. TRL's `router_aux_loss_coef` is one value over both halves of a batch; `aux_loss_coef` stands in its place.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    teacher_own_processor: bool = field(
        default=False,
        metadata={
            "help": "The teacher reads the pairs through its own tokenizer or processor and chat template (another "
            "family). Without effect where they are the student's."
        },
    )
    aux_loss_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a sparse student's balance loss, the sum of the chosen and the rejected half's "
            "(LLaVA-MoD: 0.01). 0 leaves it out."
        },
    )
    aux_loss_form: str = field(
        default="gshard", metadata={"help": f"Form of the balance loss: one of {', '.join(FORMS)}. See balance_loss."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.aux_loss_coef < float("inf"):
            raise ValueError(f"aux_loss_coef must be 0 or positive and finite, got {self.aux_loss_coef}")
        if self.aux_loss_form not in FORMS:
            raise ValueError(f"aux_loss_form must be one of {', '.join(FORMS)}, got {self.aux_loss_form!r}")
        if self.router_aux_loss_coef:
            raise ValueError(
                "router_aux_loss_coef is one value over chosen and rejected answers together: use aux_loss_coef, which "
                "adds up both halves' own, and aux_loss_form"
            )
        self.router_aux_loss_coef = 0.0
        if not self.own_losses:
            return
        given = {"ld_alpha": self.ld_alpha is not None, "use_weighting": self.use_weighting}
        given["f_divergence_type"] = self.f_divergence_type != "reverse_kl"
        if refused := [name for name, is_set in given.items() if is_set]:
            raise ValueError(
                f"{', '.join(self.own_losses)} goes without {', '.join(refused)}: leave that at its default"
            )
        if self.label_smoothing and "kto_pair" in self.loss_type:
            raise ValueError("kto_pair takes no label_smoothing: set it to 0, or use sigmoid")

    @property
    def own_losses(self) -> dict[str, float]:
        """Weights of the losses that TRL does not have: "kto_pair", and "sigmoid" with label smoothing."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        own = ("kto_pair", "sigmoid") if self.label_smoothing else ("kto_pair",)
        return {name: weight for name, weight in zip(self.loss_type, weights, strict=True) if name in own}
