"""What hacking is told by: distances along sequences, the power law of a healthy run, and the verdict."""

import json
import math

import pytest
import torch

from hf_distill.evaluation.hacking import fit_power_law, hacking_verdict, picture, sequence_divergence


def looped(reference, student, mask, divergence):
    """(sum over valid tokens, tokens, sequences), position by position."""
    total = 0.0
    for b in range(mask.shape[0]):
        for s in range(mask.shape[1]):
            if mask[b, s]:
                p, q = reference[b, s].double().softmax(0), student[b, s].double().softmax(0)
                forward = sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))
                reverse = sum(q[v] * (q[v] / p[v]).log() for v in range(len(p)))
                parts = {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": (forward + reverse) / 2}
                total += parts[divergence].item()
    return total, int(mask.sum()), len(mask)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_distances_differ_from_a_loop_over_positions(divergence, dtype):
    torch.manual_seed(0)
    reference, student = (torch.randn(3, 4, 6).to(dtype) for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    total, tokens, sequences = looped(reference, student, mask, divergence)
    found = sequence_divergence(reference, student, mask, divergence=divergence)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert found["per_token"].item() == pytest.approx(total / tokens, abs=tolerance)
    assert found["per_sequence"].item() == pytest.approx(total / sequences, abs=tolerance)


def test_the_first_argument_is_the_reference_and_the_same_model_is_at_distance_zero():
    torch.manual_seed(0)
    a, b, mask = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.ones(2, 3)
    forward, reverse = sequence_divergence(a, b, mask), sequence_divergence(b, a, mask, divergence="reverse_kl")
    torch.testing.assert_close(forward["per_token"], reverse["per_token"])
    assert forward["per_token"] != sequence_divergence(b, a, mask)["per_token"]
    assert sequence_divergence(a, a, mask) == {"per_token": 0, "per_sequence": 0}
    assert sequence_divergence(a, b, torch.zeros(2, 3)) == {"per_token": 0, "per_sequence": 0}


def test_distances_refuse_what_they_cannot_compare():
    z = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match="divergence must be one of forward_kl, reverse_kl, jeffreys, got 'tvd'"):
        sequence_divergence(z, z, torch.ones(2, 3), divergence="tvd")
    with pytest.raises(ValueError, match=r"aligned.*\(2, 3, 5\).*\(2, 2, 5\)"):
        sequence_divergence(z, z[:, :2], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 3\)"):
        sequence_divergence(z, z, torch.ones(2, 5))


# ---- the power law ---------------------------------------------------------------------------------------------------
STEPS = [100 * i for i in range(1, 21)]


def test_a_pure_power_law_is_not_recovered_or_is_flagged():
    law = fit_power_law(STEPS, [3.7 * s**-0.42 for s in STEPS])
    assert law["exponent"] == pytest.approx(0.42, abs=1e-9)
    assert law["log_coefficient"] == pytest.approx(math.log(3.7), abs=1e-9)
    assert max(map(abs, law["residuals"])) < 1e-9 and len(law["residuals"]) == len(STEPS)
    assert law["flag_step"] is None


def bent(at: int) -> list[float]:
    """Falls no more from step `at` on."""
    return [2.0 * min(s, at) ** -0.5 for s in STEPS]


def test_a_bent_curve_is_flagged_at_another_evaluation():
    metric = bent(1200)  # residual 0.5 · log(s / 1200): above 0.1 from 1500 (0.112) on; two in a row at 1600
    law = fit_power_law(STEPS, metric)
    assert law["flag_step"] == 1600
    assert law["residuals"][STEPS.index(1500)] == pytest.approx(0.5 * math.log(1500 / 1200), abs=1e-9)
    assert fit_power_law(STEPS, metric, patience=1)["flag_step"] == 1500
    assert fit_power_law(STEPS, metric, tolerance=0.2)["flag_step"] == 1900  # above from 1800 (0.203)
    assert fit_power_law(STEPS, metric, tolerance=0.3)["flag_step"] is None


def test_evaluations_that_were_fitted_count_for_the_flag():
    """The first half bends by itself; only what comes after k fitted ones may raise the flag."""
    metric = [2.0 * s**-0.5 for s in STEPS]
    metric[3:7] = [m * 2 for m in metric[3:7]]
    assert fit_power_law(STEPS, metric, fit_points=10)["flag_step"] is None
    assert (
        fit_power_law(STEPS, [m * 2 if i in (2, 3) else m for i, m in enumerate(bent(3000))], fit_points=2)["flag_step"]
        == 400
    )


def test_a_faster_fall_or_a_gap_in_the_run_raises_the_flag():
    assert fit_power_law(STEPS, [2.0 * s**-0.5 * (0.5 if s > 1200 else 1) for s in STEPS])["flag_step"] is None
    alternating = [2.0 * s**-0.5 * (1.5 if s > 1000 and s % 200 else 1) for s in STEPS]
    assert fit_power_law(STEPS, alternating)["flag_step"] is None
    assert fit_power_law(STEPS, alternating, patience=1)["flag_step"] == 1100


def test_the_default_fits_other_than_the_first_half_and_at_least_four():
    noisy = [2.0 * s**-0.5 * (1.2 if s > 1000 else 1) for s in STEPS]
    assert fit_power_law(STEPS, noisy)["exponent"] == pytest.approx(0.5, abs=1e-9)
    assert fit_power_law(STEPS[:6], noisy[:4] + [9.0, 9.0])["flag_step"] == 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1.0]), "2 steps and 1 values"),
        (([1], [1.0]), "at least 2 evaluations, got 1"),
        (([0, 1, 2], [1.0, 1.0, 1.0]), "steps must be positive"),
        (([2, 1], [1.0, 1.0]), "must grow"),
        (([1, 2], [1.0, 0.0]), "0.0 at step 2"),
        (([1, 2], [1.0, float("nan")]), "nan at step 2"),
        (([1, 2, 3], [1.0, 1.0, 1.0], 4), "fit_points"),
        (([1, 2, 3], [1.0, 1.0, 1.0], 1), "fit_points"),
        (([1, 2, 3], [1.0, 1.0, 1.0], 2, float("nan")), "tolerance"),
        (([1, 2, 3], [1.0, 1.0, 1.0], 2, 0.1, 0), "patience"),
    ],
)
def test_a_law_that_cannot_be_fitted_is_fitted(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(*arguments)


# ---- the verdict -----------------------------------------------------------------------------------------------------
E = [10, 20, 30, 40, 50, 60]
FALLING = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
U = [6.0, 5.0, 4.0, 4.1, 4.2, 4.5]


def test_the_three_shapes_get_other_verdicts():
    assert hacking_verdict(E, FALLING, U) == {
        "hacking": True,
        "overfitting": False,
        "best_step": 30,
        "first_hacking_step": 50,
        "final_minus_best": 0.5,
    }
    both_fall = hacking_verdict(E, FALLING, FALLING)
    assert (both_fall["hacking"], both_fall["overfitting"], both_fall["first_hacking_step"]) == (False, False, None)
    assert (both_fall["best_step"], both_fall["final_minus_best"]) == (60, 0.0)
    both_rise = hacking_verdict(E, U, U)
    assert (both_rise["hacking"], both_rise["overfitting"], both_rise["first_hacking_step"]) == (False, True, None)


def test_a_small_rise_or_one_evaluation_alone_is_hacking():
    assert not hacking_verdict(E, FALLING, [6.0, 5.0, 4.0, 4.05, 4.06, 4.07])["hacking"]
    assert hacking_verdict(E, FALLING, [6.0, 5.0, 4.0, 4.05, 4.08, 4.09])["first_hacking_step"] == 60
    assert not hacking_verdict(E, FALLING, [6.0, 5.0, 4.0, 4.2, 4.0, 4.2])["hacking"]
    assert hacking_verdict(E, FALLING, [6.0, 5.0, 4.0, 4.2, 4.0, 4.2], patience=1)["first_hacking_step"] == 40
    assert hacking_verdict(E, FALLING, U, min_rel_increase=0.1)["hacking"] is False
    assert hacking_verdict(E, FALLING, U, patience=3)["first_hacking_step"] == 60


def test_a_rise_is_measured_from_another_evaluation_than_the_best_so_far():
    golden = [3.0, 4.0, 4.0, 2.0, 1.0, 0.5]  # hacked at 30, and better than ever at the end
    verdict = hacking_verdict(E, FALLING, golden)
    assert (verdict["first_hacking_step"], verdict["best_step"], verdict["final_minus_best"]) == (30, 60, 0.0)


def test_a_student_that_is_the_truth_hacks():
    assert not hacking_verdict(E, [0.0] * 6, [0.0] * 6)["hacking"]
    assert not hacking_verdict(E, [0.0] * 6, [0.0] * 6, min_rel_increase=0.0)["overfitting"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "at least one evaluation"),
        (([1, 2], [1.0, 1.0], [1.0]), "2 steps, 2 proxy and 1 golden"),
        (([1], [float("inf")], [1.0]), "inf at step 1"),
        (([2, 1], [1.0, 1.0], [1.0, 1.0]), "must grow"),
        (([1], [1.0], [1.0], 0), "patience"),
        (([1], [1.0], [1.0], 2, -0.1), "min_rel_increase"),
    ],
)
def test_a_verdict_without_evaluations_is_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        hacking_verdict(*arguments)


def test_the_picture_shows_both_distances_and_is_written_without_an_oracle_too(tmp_path):
    runs = {"offline": {"step": E, "proxy": FALLING, "golden": U}, "online": {"step": E, "proxy": FALLING}}
    path = picture(runs, tmp_path / "a.png", title="Chain")
    assert path.stat().st_size > 5000
    assert picture({"run": {"step": [0], "proxy": [0.0], "golden": [0.0]}}, tmp_path / "b.png").stat().st_size > 2000
    json.dumps(hacking_verdict(E, FALLING, U) | fit_power_law(E, FALLING))
