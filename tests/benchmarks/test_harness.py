"""The benchmarks' arithmetic and their files. No timing is asserted: machines differ."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from benchmarks import bench_memory, harness, loss_variants, report
from benchmarks.harness import MIB, Absent, Report, Variant, interleave


def constant(*seconds: float):
    """A run that reports these times in turn."""
    times = iter(seconds)
    return lambda: next(times)


def test_variants_take_turns_and_the_warm_up_is_not_counted():
    order = []

    def run(name: str, seconds: float):
        order.append(name)
        return seconds

    rows = interleave([Variant(n, lambda n=n: run(n, 1.0)) for n in "ab"], rounds=2)
    assert order == ["a", "b"] * 3
    assert rows["a"]["times"] == [1.0, 1.0]


def test_ratios_are_of_minima_and_of_medians():
    rows = interleave(
        [Variant("floor", constant(2.0, 1.0, 3.0)), Variant("ours", constant(4.0, 9.0, 3.0))], rounds=3, warm_up=False
    )
    assert (rows["ours"]["min"], rows["ours"]["median"]) == (3.0, 4.0)
    assert harness.ratios(rows, "floor")["ours"] == {"min": 3.0, "median": 2.0}
    assert harness.ratios(rows, "ours")["floor"]["min"] == pytest.approx(1 / 3)


def test_a_peer_that_cannot_run_stays_in_the_table_with_its_reason():
    def missing():
        raise Absent("liger-kernel is not installed")

    def broken():
        raise RuntimeError("no kernel image\nmore")

    variants = [Variant("floor", constant(1.0), True), Variant("Liger", missing, True), Variant("TRL", broken)]
    rows = interleave(variants, rounds=1, warm_up=False)
    assert rows["Liger"] == {"absent": "liger-kernel is not installed"}
    assert rows["TRL"] == {"absent": "RuntimeError: no kernel image"}
    ratios = harness.all_ratios(rows, ["floor", "Liger", "not there"])
    assert list(ratios) == ["floor"] and list(ratios["floor"]) == ["floor"]
    text = harness.table({"case": {}, "rows": rows, "ratios": ratios})
    assert "absent: liger-kernel is not installed" in text


def test_ours_must_not_fail_silently():
    def broken():
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="a bug of ours"):
        interleave([Variant("ours", broken, required=True)], rounds=1)


def test_equal_names_and_no_rounds_are_refused():
    with pytest.raises(ValueError, match="different names"):
        interleave([Variant("a", constant()), Variant("a", constant())])
    with pytest.raises(ValueError, match="rounds"):
        interleave([], rounds=0)


def test_growth_is_the_exponent_of_a_power_law():
    x = [512, 1024, 2048]
    assert harness.loglog_slope(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert harness.slope(x, [7 * v + 3 for v in x]) == pytest.approx(7)


def test_memory_beyond_gradients_and_tile_is_what_is_fitted():
    points = [{"rows": n, "peak": (100 + 2 * n) * MIB, "beyond": 2 * n * MIB} for n in (1, 2, 4)]
    fit = bench_memory.fit_of("rows", points)
    assert fit["beyond_exponent"] == pytest.approx(1.0) and fit["beyond_bytes_each"] == pytest.approx(2 * MIB)
    assert fit["peak_exponent"] < 0.1
    noise = [p | {"beyond": p["rows"] * 4096 - 8192} for p in points]
    assert bench_memory.fit_of("rows", noise)["beyond_exponent"] == 0


def test_a_report_says_where_and_on_what_it_was_taken(tmp_path):
    out = Report("loss_cpu", "process CPU time", {"rounds": 1})
    rows = interleave([Variant("floor", constant(1.0)), Variant("ours", constant(2.0))], rounds=1, warm_up=False)
    out.add({"loss": "fKL"}, rows, ["floor"])
    written = json.loads(out.write(tmp_path).read_text())
    assert {"cpu", "cores", "threads", "gpu"} <= written["machine"].keys()
    assert written["versions"].keys() == {"torch", "transformers", "trl", "liger"}
    assert {"commit", "config", "clock", "command"} <= written.keys()
    assert written["load_average"].keys() == {"start", "end"}
    case = written["cases"][0]
    assert case["rows"]["ours"]["times"] == [2.0] and case["ratios"]["floor"]["ours"]["min"] == 2.0


def test_the_page_shows_ratios_and_absent_peers_between_its_markers(tmp_path):
    out = Report("loss_cpu", "process CPU time", {})
    rows = {"floor": {"times": [1.0], "min": 1.0, "median": 1.0, "system": 0.0}, "Liger": {"absent": "no GPU"}}
    rows["ours"] = {"times": [1.25], "min": 1.25, "median": 1.5, "system": 0.0, "gradient_error": 1e-6}
    out.add({"loss": "fKL"}, rows, ["floor"])
    out.write(tmp_path)
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    (tmp_path / "teachers.md").write_text(f"{report.START}{report.END}")
    report.write(tmp_path, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ours | 1250.0 | 1500.0 | 1.25 | 1e-06 |" in text
    assert "| Liger | absent: no GPU |" in text
    assert 0 < (tmp_path / "performance_loss_cpu.png").stat().st_size < 60_000


def test_all_variants_of_a_loss_give_the_same_gradient():
    inputs = loss_variants.make_inputs(6, 40, 8, 12)
    for loss in loss_variants.LOSSES:
        truth = inputs.gradients(loss_variants.naive(inputs, loss))
        for name in ("checkpointed", loss_variants.EAGER):
            found = inputs.gradients(loss_variants.VARIANTS[name](inputs, loss))
            for ours, expected in zip(found, truth, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_floor_is_the_products_of_the_gradient():
    inputs = loss_variants.make_inputs(6, 40, 8, 12)
    floor = loss_variants.Floor(inputs, teacher=True)
    floor()
    logits = inputs.student_hidden @ inputs.student_head.T
    torch.testing.assert_close(floor.teacher_logits, inputs.teacher_hidden @ inputs.teacher_head.T)
    torch.testing.assert_close(floor.d_hidden, logits.detach() @ inputs.student_head.detach())
    torch.testing.assert_close(floor.d_head, logits.detach().T @ inputs.student_hidden.detach())


def test_what_the_losses_warn_of_is_seen_so_that_a_fallback_is_not_timed_as_the_engine():
    logging.getLogger("hf_distill.losses.engines").warning("no C++ compiler")
    try:
        assert loss_variants.engine_warnings.texts == ["no C++ compiler"]
    finally:
        loss_variants.engine_warnings.texts.clear()
