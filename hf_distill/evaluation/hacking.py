"""Teacher hacking: a student that comes closer to its imperfect teacher while it moves away from the truth.

The proxy is the distance from the teacher, the golden measure the distance from an oracle that stands for the truth.
Without an oracle, hacking is told by a proxy that leaves the power law of its first evaluations (arXiv 2502.02671).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hf_distill.losses import DIVERGENCES, run_terms

DISTANCES = ("forward_kl", "reverse_kl", "jeffreys")
ON_DETECT = ("warn", "stop", "switch_to_on_policy")


def distance_named(divergence: str):
    """The Divergence of a name in DISTANCES. Raises ValueError for another name."""
    if divergence not in DISTANCES:
        raise ValueError(f"divergence must be one of {', '.join(DISTANCES)}, got {divergence!r}")
    return DIVERGENCES[divergence]()


def sequence_divergence(
    reference_logits: Tensor, student_logits: Tensor, mask: Tensor, divergence: str = "forward_kl"
) -> dict[str, Tensor]:
    """How far the student is from a reference (teacher or oracle) along sequences, temperature 1.

    Along sequences drawn from the reference, the sum of the forward KL over tokens is an unbiased estimate of the KL
    between the two distributions of whole sequences.

    Args:
        reference_logits, student_logits: (B, S, V), aligned, of any float dtype; float64 stays, else sums are float32.
        mask: (B, S), 1 where a token counts.
        divergence: one of DISTANCES; Jeffreys is the mean of forward and reverse KL, as in `losses`.

    Returns:
        0-d tensors: "per_token", the sum over valid tokens ÷ their number, and "per_sequence", that sum ÷ B.

    Raises:
        ValueError: an unknown divergence, or shapes that do not fit.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[2.0, 0.0], [2.0, 0.0]]])
        >>> found = sequence_divergence(z, z.flip(-1), torch.tensor([[1, 1]]))
        >>> {name: round(value.item(), 4) for name, value in found.items()}
        {'per_token': 1.5232, 'per_sequence': 3.0464}
    """
    if reference_logits.shape[:2] != student_logits.shape[:2]:
        shapes = f"{tuple(reference_logits.shape)} and {tuple(student_logits.shape)}"
        raise ValueError(f"logits must be aligned, (B, S, V) each, got {shapes}")
    if mask.shape != student_logits.shape[:2]:
        raise ValueError(f"mask must have the shape {tuple(student_logits.shape[:2])}, got {tuple(mask.shape)}")
    terms = {"sum": (distance_named(divergence), 1.0)}
    total = run_terms(student_logits, reference_logits, terms, mask=mask, reduction="sum")["sum"]
    return {"per_token": total / mask.sum().clamp(min=1), "per_sequence": total / max(len(mask), 1)}


def fit_power_law(
    steps: Sequence[float],
    metric: Sequence[float],
    fit_points: int | None = None,
    tolerance: float = 0.1,
    patience: int = 2,
) -> dict:
    """The law a · s^-b of a run's first evaluations, and where the run leaves it.

    Give a true divergence, whose floor is 0, without the evaluations of warm-up.

    Args:
        steps: of the evaluations, growing and positive.
        metric: the proxy (or a training loss) there, positive.
        fit_points: how many of the first evaluations are fitted, by least squares of log metric on log step. None takes
            the first half, at least 4 (all, where there are fewer).
        tolerance: a log residual above it counts as slower than the law. Ours.
        patience: so many evaluations in a row, after the fitted ones, raise the flag. Ours.

    Returns:
        "exponent" b, "log_coefficient" log a, "residuals" (log metric - log law, natural, for every evaluation), and
        "flag_step", the step at which the flag went up, or None.

    Raises:
        ValueError: fewer than two evaluations, steps that do not grow, values not positive, settings out of range.

    Example:
        >>> law = fit_power_law([1, 2, 4, 8, 16, 32], [1.0, 0.5, 0.25, 0.125, 0.125, 0.125])
        >>> round(law["exponent"], 6), law["flag_step"]
        (1.0, 32)
    """
    steps, metric = list(steps), list(metric)
    if len(steps) != len(metric):
        raise ValueError(f"a law needs one value per step, got {len(steps)} steps and {len(metric)} values")
    if len(steps) < 2:
        raise ValueError(f"a law needs at least 2 evaluations, got {len(steps)}")
    _check_steps(steps)
    if steps[0] <= 0:
        raise ValueError(f"steps must be positive (log 0 is infinite), got {steps[0]}: leave the first evaluation out")
    for step, value in zip(steps, metric, strict=True):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"the metric must be positive and finite, got {value} at step {step}")
    if fit_points is None:
        fit_points = min(max(4, len(steps) // 2), len(steps))
    if not 2 <= fit_points <= len(steps):
        raise ValueError(f"fit_points must lie between 2 and the {len(steps)} evaluations there are, got {fit_points}")
    check_settings(tolerance=tolerance, patience=patience)
    x, y = [math.log(s) for s in steps], [math.log(m) for m in metric]
    mean_x, mean_y = (math.fsum(v[:fit_points]) / fit_points for v in (x, y))
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x[:fit_points], y[:fit_points], strict=True))
    slope /= math.fsum((a - mean_x) ** 2 for a in x[:fit_points])
    intercept = mean_y - slope * mean_x
    residuals = [b - (intercept + slope * a) for a, b in zip(x, y, strict=True)]
    above = [i >= fit_points and residual > tolerance for i, residual in enumerate(residuals)]
    return {
        "exponent": -slope,
        "log_coefficient": intercept,
        "residuals": residuals,
        "flag_step": _first_run(steps, above, patience),
    }


def hacking_verdict(
    steps: Sequence[float],
    proxy: Sequence[float],
    golden: Sequence[float],
    patience: int = 2,
    min_rel_increase: float = 0.02,
) -> dict:
    """Whether the student left the truth while it came closer to its teacher. Ours: the paper judges pictures.

    b is the evaluation with the lowest golden distance so far. An evaluation whose golden distance has risen to at
    least (1 + min_rel_increase) times that of b is hacking where the proxy is not above that of b, and ordinary
    overfitting where it is; `patience` of a kind in a row decide. Values that do not rise at all never count.

    Returns:
        "hacking", "overfitting", "best_step" (of the lowest golden distance of all), "first_hacking_step" (at which the
        count reached patience) or None, "final_minus_best" (of the golden distance).

    Raises:
        ValueError: no evaluations, lists of different lengths, values not finite, steps that do not grow, settings out
            of range.

    Example:
        >>> hacking_verdict([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 1.5, 1.5])["first_hacking_step"]
        4
    """
    steps, proxy, golden = list(steps), list(proxy), list(golden)
    if not len(steps) == len(proxy) == len(golden):
        raise ValueError(
            f"one value of each per step, got {len(steps)} steps, {len(proxy)} proxy and {len(golden)} golden"
        )
    if not steps:
        raise ValueError("a verdict needs at least one evaluation, got none")
    _check_steps(steps)
    for step, *values in zip(steps, proxy, golden, strict=True):
        for value in values:
            if not math.isfinite(value):
                raise ValueError(f"distances must be finite, got {value} at step {step}")
    check_settings(patience=patience, min_rel_increase=min_rel_increase)
    best, hacked, overfitted = 0, [], []
    for e, value in enumerate(golden):
        if value < golden[best]:
            best = e
        risen = value > golden[best] and value >= (1 + min_rel_increase) * golden[best]
        hacked.append(risen and proxy[e] <= proxy[best])
        overfitted.append(risen and proxy[e] > proxy[best])
    first = _first_run(steps, hacked, patience)
    return {
        "hacking": first is not None,
        "overfitting": _first_run(steps, overfitted, patience) is not None,
        "best_step": steps[best],
        "first_hacking_step": first,
        "final_minus_best": golden[-1] - golden[best],
    }


def check_settings(
    *,
    tolerance: float = 0.1,
    patience: int = 2,
    min_rel_increase: float = 0.02,
    fit_points: int | None = None,
) -> None:
    """Settings of the law and the verdict are in range. Raises ValueError, naming what is not."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be 0 or positive and finite, got {tolerance}")
    if not (patience >= 1 and patience == int(patience)):
        raise ValueError(f"patience must be a whole number of evaluations, at least 1, got {patience}")
    if not 0 <= min_rel_increase < math.inf:
        raise ValueError(f"min_rel_increase must be 0 or positive and finite, got {min_rel_increase}")
    if fit_points is not None and not fit_points >= 2:
        raise ValueError(f"fit_points must be at least 2, got {fit_points}")


def check_reaction(on_detect: str, online_ratio: float, trainer=None) -> None:
    """What a flag does is known and can be done by this trainer. Raises ValueError."""
    if on_detect not in ON_DETECT:
        raise ValueError(f"on_detect must be one of {', '.join(ON_DETECT)}, got {on_detect!r}")
    if not 0 < online_ratio <= 1:
        raise ValueError(f"online_ratio must lie above 0 and at most 1, got {online_ratio}")
    if trainer is not None and on_detect == "switch_to_on_policy" and not hasattr(trainer, "set_lmbda"):
        raise ValueError(
            f'on_detect="switch_to_on_policy" needs a trainer that generates (set_lmbda), and {type(trainer).__name__} '
            'does not: use "warn" or "stop"'
        )


def _check_steps(steps: list) -> None:
    if any(not b > a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"steps must grow from evaluation to evaluation, got {steps}")


def _first_run(steps: list, marks: list[bool], patience: int):
    """The step at which `patience` marks in a row were reached; None where they never are."""
    count = 0
    for step, mark in zip(steps, marks, strict=True):
        count = count + 1 if mark else 0
        if count >= patience:
            return step
    return None


def _top(runs: list[dict], name: str) -> float:
    """A little above what the runs have come down to; all of it where they have not come down far."""
    highest = max(value for run in runs for value in run[name])
    return min(1.02 * highest, 1.35 * max(min(run[name]) for run in runs)) or 1.0


def picture(
    runs: dict[str, dict[str, list[float]]], path: str | os.PathLike, *, title: str = "", best: bool = True
) -> Path:
    """Both distances over steps, and golden over proxy, where hacking is a U. Needs matplotlib (the extra `report`).

    Args:
        runs: name -> {"step": [...], "proxy": [...], "golden": [...] (left out without an oracle)}.
        best: mark the lowest golden distance of each run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = dict(zip(("proxy", "golden", "both"), figure.subplots(1, 3), strict=True))
    for i, (name, run) in enumerate(runs.items()):
        style = {"color": f"C{i % 10}", "markersize": 3, "linewidth": 1.3}
        axes["proxy"].plot(run["step"], run["proxy"], "o-", label=name, **style)
        if "golden" not in run:
            continue
        axes["golden"].plot(run["step"], run["golden"], "o-", label=name, **style)
        axes["both"].plot(run["proxy"], run["golden"], "o-", label=name, **style)
        lowest = min(range(len(run["golden"])), key=run["golden"].__getitem__)
        if best:
            axes["golden"].plot(run["step"][lowest], run["golden"][lowest], "*", color=style["color"], markersize=11)
            axes["both"].plot(run["proxy"][lowest], run["golden"][lowest], "*", color=style["color"], markersize=11)
    told = {
        "proxy": ("proxy: distance from the teacher (nats per token)", "step"),
        "golden": ("golden: distance from the oracle (nats per token)", "step"),
        "both": ("golden over proxy (training goes left; its start is cut)", "proxy"),
    }
    for key, (heading, x) in told.items():
        axis = axes[key]
        axis.set_title(heading, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "no oracle", ha="center", transform=axis.transAxes)
    if all(v > 0 for run in runs.values() for v in run["proxy"]):
        axes["proxy"].set_yscale("log")
        axes["proxy"].set_xscale("symlog", linthresh=100)  # a power law is a line there, and step 0 has a place
    told = [run for run in runs.values() if "golden" in run]
    if told:  # the fall of the start would hide the rise
        axes["golden"].set_ylim(top=_top(told, "golden"))
        axes["both"].set_ylim(top=_top(told, "golden"))
        axes["both"].set_xlim(right=_top(told, "proxy"))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return Path(path)
