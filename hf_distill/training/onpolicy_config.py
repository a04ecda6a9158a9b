"""Settings of on-policy and mixed training. Names are TRL's, except where a method's own setting has the name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SCHEDULES = ("constant", "linear", "adaptive")


@dataclass
class OnPolicyArguments:
    """Whose texts the student learns from. TRL's `temperature`, `top_p` and `top_k` are `sampling_…` here."""

    lmbda: float = field(
        default=0.0,
        metadata={
            "help": "Chance that the student's own samples stand in for a micro-batch's completions: 0 is off-policy, "
            "1 on-policy. With lmbda_schedule linear or adaptive: at the start."
        },
    )
    lmbda_schedule: str = field(
        default="constant",
        metadata={
            "help": "constant; linear: from lmbda to lmbda_end; adaptive (DistiLLM): raised when the validation loss "
            "rises, older samples are replayed."
        },
    )
    lmbda_end: float = field(default=1.0, metadata={"help": "linear: lmbda at the last step."})
    lmbda_step: float = field(
        default=0.1, metadata={"help": "adaptive: by how much lmbda is raised (DistiLLM's code: 0.1)."}
    )
    lmbda_tolerance: float = field(
        default=0.1,
        metadata={
            "help": "adaptive: lmbda is raised when the validation cross-entropy (nats) is this much above its lowest "
            "since the last raise (DistiLLM's code: 0.1)."
        },
    )
    replay_capacity: int = field(
        default=1000, metadata={"help": "adaptive: how many of the student's texts are kept (DistiLLM's code: 1000)."}
    )
    seq_kd: bool = field(
        default=False,
        metadata={
            "help": "Sequence-level KD: the teacher's texts stand in for the data set's completions. Each is written "
            "once and kept in seq_kd_store."
        },
    )
    seq_kd_store: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's texts. Default: teacher_texts in output_dir."}
    )
    max_completion_length: int = field(default=512, metadata={"help": "Tokens of a sampled text at most."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling, not of the loss; 0 takes the likeliest token."}
    )
    sampling_top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens that together have this probability."}
    )
    sampling_top_k: int = field(default=0, metadata={"help": "Sample among so many likeliest tokens; 0: among all."})
    use_vllm: bool = field(
        default=False, metadata={"help": "Sample with vLLM (pip install 'trl[vllm]'). Draws are then vLLM's own."}
    )
    vllm_mode: str = field(default="colocate", metadata={"help": "colocate (in this process) or server."})
    vllm_model_impl: str = field(default="vllm", metadata={"help": "vLLM's model code: vllm or transformers."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Offload vLLM's weights during the optimizer step."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "server: its address, instead of host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "server: its host."})
    vllm_server_port: int = field(default=8000, metadata={"help": "server: its port."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "server: seconds to wait until it is up."})
    vllm_group_port: int = field(default=51216, metadata={"help": "server: port over which weights are sent."})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": "colocate: share of the GPU's memory."})
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "colocate: longest prompt and completion. Default: the model's."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "colocate: GPUs that share a vLLM model."})

    @property
    def writes_text(self) -> bool:
        """Whether some completions may be written during training."""
        return self.lmbda > 0 or self.lmbda_schedule != "constant" or self.seq_kd

    def check_text_settings(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        if self.lmbda_schedule not in SCHEDULES:
            raise ValueError(f"lmbda_schedule must be one of {', '.join(SCHEDULES)}, got {self.lmbda_schedule!r}")
        for name in ("lmbda", "lmbda_end", "lmbda_step"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("lmbda_tolerance", "sampling_temperature"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be 0 or positive and finite, got {getattr(self, name)}")
        for name in ("replay_capacity", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.sampling_top_p <= 1:
            raise ValueError(f"sampling_top_p must be above 0 and at most 1, got {self.sampling_top_p}")
        if self.sampling_top_k < 0:
            raise ValueError(f"sampling_top_k must be 0 (off) or positive, got {self.sampling_top_k}")
        if self.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"vllm_mode must be colocate or server, got {self.vllm_mode!r}")
        if self.lmbda_schedule == "adaptive" and self.eval_strategy == "no":
            raise ValueError(
                "lmbda_schedule adaptive follows the validation loss: set eval_strategy and give eval data"
            )
        if self.seq_kd and self.sampling_top_k:
            raise ValueError("the teacher's texts (seq_kd) are drawn without top_k: set sampling_top_k to 0")
        if self.seq_kd and self.lmbda_schedule == "constant" and self.lmbda == 1:
            raise ValueError("with lmbda 1 no text of the teacher is ever used: lower lmbda, or leave seq_kd out")


__all__ = ["OnPolicyArguments"]
