"""Calibration of language models, token by token, through a trainer's own exact evaluation."""

from __future__ import annotations

import torch

from hf_distill.evaluation.classification import BINS, Reliability
from hf_distill.losses import CalibrationBin

PARTS = ("count", "confidence", "right")


def token_calibration(bins: int = BINS) -> dict[str, CalibrationBin]:
    """What a trainer's `eval_observed` measures for a reliability diagram of its tokens, in the same projection."""
    return {_name(bin, part): CalibrationBin(bin, part, bins) for bin in range(bins) for part in PARTS}


def take_reliability(metrics: dict[str, float], rows: int, prefix: str = "eval", bins: int = BINS) -> Reliability:
    """The diagram from a trainer's evaluation, whose own entries for it are taken out of `metrics`.

    Args:
        rows: tokens that were evaluated, for counts; confidences, accuracies and the error do not depend on it.
    """
    means = torch.tensor(
        [[metrics.pop(f"{prefix}_{_name(bin, part)}") for part in PARTS] for bin in range(bins)], dtype=torch.float64
    )
    share = means[:, 0]
    confidence, right = (means[:, i] / share.where(share > 0, 1.0) for i in (1, 2))
    return Reliability(confidence, right, (share * rows).round().long())


def _name(bin: int, part: str) -> str:
    return f"calibration/{bin}/{part}"
