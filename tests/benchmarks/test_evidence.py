"""`make evidence`: the commands behind a card, what is left out, and that they parse."""

import importlib
from pathlib import Path

import pytest

from benchmarks import evidence
from hf_distill.methods import METHODS

CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def calls(monkeypatch) -> list[list[str]]:
    found = []

    def run(argv, cwd):
        found.append(argv[1:])
        return type("Done", (), {"returncode": int("sst2" in argv)})

    monkeypatch.setattr(evidence.subprocess, "run", run)
    return found


@pytest.mark.parametrize("slug", evidence.measured())
def test_a_measured_method_has_no_card_with_a_table(slug):
    text = (CARDS / f"{slug}.md").read_text(encoding="utf-8")
    assert "±" in text.split("<!-- evidence -->")[1]


@pytest.mark.parametrize("slug", evidence.measured())
def test_a_step_names_a_module_that_is_not_there(slug):
    for step in evidence.steps_of(slug):
        assert hasattr(importlib.import_module(f"benchmarks.{step.module}"), "main")


def test_a_set_that_is_not_there_is_silent(calls, tmp_path):
    for name in ("cifar10", "resnet_cifar10", "sst2"):
        (tmp_path / name).mkdir()
    wrong = evidence.run("pld", tmp_path)
    assert [argv[argv.index("--tables") + 1] for argv in calls] == ["cifar10", "sst2"]
    assert wrong[0].startswith("failed:") and "left out, trec not in" in wrong[1]
    assert all(str(tmp_path) in argv for argv in calls)


def test_a_dry_run_trains(calls, tmp_path, capsys):
    (tmp_path / "tinyshakespeare").mkdir()
    evidence.run("taid", tmp_path, dry=True)
    assert not calls and "--set tinyshakespeare" in capsys.readouterr().out


def test_an_unmeasured_method_is_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evidence.main(["nothing", "--data", str(tmp_path)])
    assert "no evidence is measured for 'nothing'" in capsys.readouterr().err


def test_methods_without_evidence_are_forgotten():
    assert set(METHODS) - set(evidence.measured()) <= {"preference_kd"}
