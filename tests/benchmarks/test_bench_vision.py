"""What the benchmark of classification objectives counts. No timing is asserted: machines differ."""

import pytest
import torch

from benchmarks import bench_vision, report
from benchmarks.bench_vision import FORWARD, MORE, PLAIN, SMALL, SUM
from benchmarks.harness import Report

LOGITS = ["Hinton KD", "DKD", "PLD"]


@pytest.fixture(scope="module")
def measured():
    torch.set_num_threads(1)
    out = Report("vision", bench_vision.CLOCK, {})
    return out, bench_vision.measure(out, rounds=1, only=[*LOGITS, "FitNet", "mutual KD"], **SMALL)


def test_a_logit_objective_does_other_products_than_student_and_teacher(measured):
    rows = measured[1]["rows"]
    assert rows[SUM]["gigaflops"] == pytest.approx(rows[PLAIN]["gigaflops"] + rows[FORWARD]["gigaflops"])
    for name in LOGITS:
        assert rows[name]["gigaflops"] == pytest.approx(rows[SUM]["gigaflops"])
    assert rows["FitNet"]["gigaflops"] > rows[SUM]["gigaflops"]
    assert rows["mutual KD"]["gigaflops"] > rows[SUM]["gigaflops"] + 1.5 * rows[FORWARD]["gigaflops"]


def test_a_slow_objective_is_not_named(measured, monkeypatch):
    out, entry = measured
    assert set(entry["above"]) <= set(LOGITS), "a method that does more is a complaint"
    monkeypatch.setattr(bench_vision, "LIMIT", 0.0)
    again = bench_vision.measure(out, rounds=1, only=["DKD", "FitNet"], **SMALL)
    assert "DKD" in again["above"] and "FitNet" not in again["above"]
    assert "Others above 0 × the sum: " in again["note"] and f"FitNet {MORE['FitNet']}" in again["note"]


def test_every_row_that_does_more_is_a_row():
    assert set(MORE) <= bench_vision.rows().keys()


def test_the_page_leaves_out_the_note(measured, tmp_path):
    measured[0].write(tmp_path)
    text = report.section("vision", measured[0].result, None)
    assert "More than one pass" in text and "| PLD |" in text and f"× {SUM}" in text
