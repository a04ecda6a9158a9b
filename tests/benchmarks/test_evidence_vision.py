"""The evidence on classification: what is paired, what is remembered, what a kill leaves, what a card says."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import cifar, evidence_cards, evidence_vision
from benchmarks.classification import Records, Remembered, Table, Task
from benchmarks.classification_rows import ALONE, CIFAR_ROWS, KD
from benchmarks.classification_tasks import ASPECTS, image_dataset, with_aspects
from benchmarks.evidence_vision import Study
from hf_distill import FrozenTeacher
from hf_distill.taps import tap

IMAGES = 20


def tiny_task(data=None, work=None) -> Task:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(IMAGES, 3, 32, 32, generator=draw), torch.arange(IMAGES) % 10
    train = image_dataset(x, y, noisy=y > 5)
    return Task(
        teacher=Remembered(cifar.resnet(9, width=4), x, name="a teacher"),
        make_student=partial(cifar.resnet, width=2),
        train=train,
        tune=train.select(range(15)),
        validation=train.select(range(15, IMAGES)),
        tests={"test": train},
        facts={"teacher": "a tiny ResNet", "student": "a tinier one", "data": "noise"},
    )


ROWS = {name: CIFAR_ROWS[name] for name in (ALONE, KD, "DKD", "CRD", "PLD")}
TABLE = Table("Noise", tiny_task, ROWS, steps=3, rates=(1e-3, 1e-2), batch=10)


def options_of(tmp_path, monkeypatch, *argv: str):
    monkeypatch.setitem(evidence_vision.TABLES, "noise", TABLE)
    paths = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    return evidence_vision.parse([*paths, "--tables", "noise", *argv])


def trained(monkeypatch) -> list[tuple]:
    """(row's slug, rate, seed, tuning) of every student that is trained from here on."""
    runs, real = [], evidence_vision.train_once

    def counted(task, table, row, changes, rate, seed, *, tuning):
        runs.append((row.slug, rate, seed, tuning))
        return real(task, table, row, changes, rate, seed, tuning=tuning)

    monkeypatch.setattr(evidence_vision, "train_once", counted)
    return runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three seeds of all rows."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        Study("noise", options_of(folder, patch, "--seeds", "3")).measure()
    return folder, json.loads((folder / "evidence_vision_noise.json").read_text())


def test_a_finished_run_is_done_again_and_others_are_not(finished, monkeypatch):
    folder, _ = finished
    runs = trained(monkeypatch)
    Study("noise", options_of(folder, monkeypatch, "--seeds", "3")).measure()
    assert runs == []
    Study("noise", options_of(folder, monkeypatch, "--seed_list", "3", "--methods", "dkd")).measure()
    assert [(slug, seed, tuning) for slug, _, seed, tuning in runs] == [
        ("next_token", 3, False),
        ("kd", 3, False),
        ("dkd", 3, False),
    ]
    longer = Study("noise", options_of(folder, monkeypatch, "--steps", "4"))
    assert longer.records.read(f"{ALONE} choice", longer.asked(longer.rows[ALONE])) is None, "of another budget"


def test_rows_do_not_start_from_one_student_or_see_other_orders(finished):
    _, result = finished
    for row in result["rows"].values():
        assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
        assert len({run["learning_rate"] for run in row["runs"]}) == 1
        assert {run["steps"] for run in row["runs"]} == {3}
    task = tiny_task()
    states = [task.make_student(0).state_dict() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_the_test_images_choose_the_learning_rate(monkeypatch, tmp_path):
    seen = []
    real = evidence_vision.train_once

    def watched(task, table, row, changes, rate, seed, *, tuning):
        if tuning:
            task = replace(task, tests=None, train=None)  # what it may not look at
        run = real(task, table, row, changes, rate, seed, tuning=tuning)
        seen.append((tuning, run.steps))
        return run

    monkeypatch.setattr(evidence_vision, "train_once", watched)
    study = Study("noise", options_of(tmp_path, monkeypatch, "--methods", "kd"))
    study.chosen(KD)
    choices = len(ROWS[KD].choices)
    assert seen == [(True, 1)] * (len(TABLE.rates) + choices - 1)


def test_what_a_teacher_said_is_given_to_another_image():
    x = torch.randn(6, 3, 32, 32)
    model = cifar.resnet(1, width=4).eval()
    kept, live = Remembered(model, x, name="kept"), FrozenTeacher(model)
    needs = frozenset({"logits", "hidden_states", tap("embedding"), tap("layer2")})
    for batch in (x[[4, 1]], x.flip(0), torch.cat([x[:1], torch.randn(1, 3, 32, 32)])):
        ours, theirs = (t({"pixel_values": batch}, needs) for t in (kept, live))
        torch.testing.assert_close(ours.logits, theirs.logits)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(a, b)
        assert ours.features.keys() == theirs.features.keys()
        for name in ours.features:
            torch.testing.assert_close(ours.features[name], theirs.features[name])
    model.forward = None  # from here on only what is kept
    torch.testing.assert_close(kept({"pixel_values": x[2:3]}).logits, kept({"pixel_values": x}).logits[2:3])


def test_two_processes_do_the_same_run(tmp_path):
    records = Records(tmp_path)
    with records.claimed("row", {"seed": 1}) as mine, records.claimed("row", {"seed": 1}) as again:
        assert mine and not again
        with records.claimed("row", {"seed": 2}) as other:
            assert other
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    claim = records._path("row", {"seed": 1}).with_suffix(".claim")
    claim.write_text(dead.stdout.strip())
    with records.claimed("row", {"seed": 1}) as mine:
        assert mine, "what a killed process was at is left for good"
    assert not claim.exists() and os.listdir(tmp_path) == []


def test_a_card_claims_what_was_not_measured(finished, tmp_path):
    folder, result = finished
    accuracies = {ALONE: (0.4, 0.5, 0.6), KD: (0.42, 0.53, 0.63), "DKD": (0.3, 0.8, 0.5), "PLD": (0.5, 0.61, 0.7)}
    for name, values in accuracies.items():
        for run, value in zip(result["rows"][name]["runs"], values, strict=True):
            run["test"]["accuracy"] = value
    (tmp_path / "evidence_vision_noise.json").write_text(json.dumps(result))
    (tmp_path / "pld.md").write_text(f"my words\n{evidence_cards.START}\nbefore\n{evidence_cards.END}\nmy limits\n")
    evidence_cards.write_classification(tmp_path, tmp_path)
    text = (tmp_path / "pld.md").read_text()
    assert text.startswith("my words\n") and text.endswith("\nmy limits\n") and "before" not in text
    assert "| PLD | student alone | +0.1033 ± 0.0033 | beats |" in text
    assert "| PLD | Hinton KD | +0.0767 ± 0.0033 | beats |" in text
    assert "DKD" not in text and "3 paired seeds" in text and "a tiny ResNet" in text and result["command"] in text
    every = (tmp_path / "classification.md").read_text()
    assert "| DKD | student alone | +0.0333 ± 0.1333 | not told apart |" in every
    assert (tmp_path / "evidence_noise.png").stat().st_size > 0
    assert not (tmp_path / "bdkd.md").exists()


def test_a_row_that_is_not_finished_is_paired_with_other_seeds(finished):
    _, result = finished
    rows = {name: row | {"runs": list(row["runs"])} for name, row in result["rows"].items()}
    rows["PLD"]["runs"] = rows["PLD"]["runs"][1:]
    found = evidence_cards._runs(result | {"rows": rows})
    assert "PLD" not in found and {len(runs) for runs in found.values()} == {3}
    rows[KD]["runs"] = []
    assert evidence_cards._runs(result | {"rows": rows}) == {}


def test_calibration_error_is_better_when_higher(finished):
    _, result = finished
    for run in result["rows"]["PLD"]["runs"]:
        run["test"]["ece"] = -1.0 - run["seed"] / 100
    assert evidence_cards._difference(evidence_cards._runs(result), "PLD", ALONE, "ece").endswith("| beats")


def test_a_method_s_first_card_hides_what_its_file_says():
    text = evidence_cards.begun("pld")
    module = __import__("hf_distill.methods.pld", fromlist=["CARD"])
    assert module.CARD.title in text and module.__doc__.strip().splitlines()[0] in text
    assert evidence_cards.START in text and evidence_cards.END in text


def test_aspects_do_not_follow_the_class():
    task = tiny_task()
    answers, labels = with_aspects(task.train, task)["aspect_probs"], task.train["labels"]
    assert tuple(answers[0].shape) == (len(ASPECTS),)
    for i in range(IMAGES):
        for j in range(IMAGES):
            assert torch.equal(answers[i], answers[j]) == (labels[i] == labels[j]).item(), "two classes look alike"
    mixed = with_aspects(task.train, task, shuffled=True)["aspect_probs"]
    assert any(not torch.equal(mixed[i], mixed[i + 10]) for i in range(10)), "the control tells the class"


def test_unknown_rows_and_missing_data_pass(capsys, tmp_path):
    for argv, message in (
        (["--data", str(tmp_path), "--methods", "nothing"], "no rows of nothing"),
        (["--tables", "cifar10"], "--data must name"),
    ):
        with pytest.raises(SystemExit):
            evidence_vision.parse(argv)
        assert message in capsys.readouterr().err


def test_a_method_is_run_without_the_rows_that_its_card_compares_with():
    rows = evidence_vision.TABLES["sst2"].rows
    asked = {name for name, row in rows.items() if evidence_vision.wanted(name, row, ["sinkd"])}
    assert {"SinKD", *evidence_cards.BESIDE["sinkd"]} <= asked and not {"DKD", "LELP"} & asked
    assert set(evidence_cards.BESIDE) <= {row.slug for row in rows.values()}


def test_every_table_has_what_it_is_compared_with():
    for name, table in evidence_vision.TABLES.items():
        assert list(table.rows)[:2] == [ALONE, KD], name
        assert set(table.measures) <= evidence_cards.LABELS.keys(), name
