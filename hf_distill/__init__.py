"""Knowledge distillation for Hugging Face users: one teacher layer, one objective layer, one file per paper."""

from __future__ import annotations

import importlib
import logging

__version__ = "0.1.0"

_HOME = {
    "Signals": "signals",
    "HeadLogits": "signals",
    "SparseLogits": "signals",
    "Objective": "objectives",
    "LogitKD": "objectives",
    "NextToken": "objectives",
    "FeatureKD": "objectives",
    "OBJECTIVES": "baselines",
    "HintonKD": "baselines",
    "DKD": "baselines",
    "DIST": "baselines",
    "NKD": "baselines",
    "FitNet": "baselines",
    "AttentionTransfer": "baselines",
    "RKD": "baselines",
    "SimilarityPreserving": "baselines",
    "CorrelationCongruence": "baselines",
    "CRD": "baselines",
    "ULD": "baselines.cross_tokenizer",
    "ReviewHint": "baselines",
    "Teacher": "teachers",
    "FrozenTeacher": "teachers",
    "AdapterOffTeacher": "teachers",
    "EMATeacher": "teachers",
    "PeerTeacher": "teachers",
    "MutualKD": "teachers",
    "PrivilegedTeacher": "teachers",
    "TeacherInputs": "teachers",
    "add_teacher_inputs": "teachers",
    "EnsembleTeacher": "teachers",
    "RoutedTeacher": "teachers",
    "GatedKD": "teachers",
    "TextTeacher": "teachers",
    "LocalTextTeacher": "teachers",
    "RemoteTextTeacher": "teachers",
    "RemoteTeacher": "teachers",
    "CachedTeacher": "teachers",
    "cache_teacher": "teachers",
    "upcycle_to_moe": "students",
    "UpcycleConfig": "students",
    "activated_parameters": "students",
    "attach_router_outputs": "students",
    "check_lora_reaches_experts": "students",
    "BalanceLoss": "students",
    "DataCollatorForDistillation": "curricula",
    "DataCollatorForPreferenceDistillation": "curricula.preference",
    "contrastive_pairs": "curricula.pairs",
    "DistillCallback": "training.callbacks",
    "TeacherAgreementCallback": "training.callbacks",
    "EMATeacherCallback": "training.callbacks",
    "SampleCompletionsCallback": "training.callbacks",
    "RouterTelemetryCallback": "training.routers",
    "TeacherHackingCallback": "training.hacking",
    "DistillTrainer": "training.trainers",
    "DistillSFTTrainer": "training.trainers",
    "DistillDPOTrainer": "training.trainers",
    "DistillConfig": "training.config",
    "DistillSFTConfig": "training.config",
    "DistillDPOConfig": "training.config",
}
__all__ = [*_HOME, "__version__"]


# bitsandbytes asks for one more package at every start on a CPU, whether or not anything is quantised
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'hf_distill' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hf_distill.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
