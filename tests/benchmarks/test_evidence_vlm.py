"""The evidence of vision-language methods: rows that go on after a kill, and tables that say what was measured."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import evidence_vlm as evidence
from benchmarks import evidence_vlm_card as card_of
from benchmarks import nlvr
from benchmarks.evidence_vlm_tasks import digits_task
from hf_distill.embedded import digits_vqa
from hf_distill.evaluation.comparison import Run

PLAN = evidence.Plan(adaptor=2, dense=2, sparse=2, preference=2, teacher=3, language=2, batch=4, pair_rows=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All rows on a few digits, and a second seed that says the same."""
    runs = tmp_path_factory.mktemp("runs")
    task = digits_task()
    few = {"train": 48, "captions": 16, "validation": 24, "validation_captions": 8}
    task = replace(
        task, **{name: getattr(task, name).select(range(n)) for name, n in few.items()}, objects=task.objects[:8]
    )
    evidence.measure("digits", task, PLAN, [0], runs)
    seed = shutil.copytree(runs / "digits" / "seed0", runs / "digits" / "seed1")
    for path in map(seed.joinpath, (f"{evidence.slug(row)}.json" for row in evidence.ROWS)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 1}))
    return runs, task


def test_a_second_call_trains_again_or_a_lost_row_is_not_made_anew(folder):
    runs, task = folder
    seed = runs / "digits" / "seed0"
    records = {path: path.stat().st_mtime_ns for path in seed.glob("*.json")}
    assert len(records) == len(evidence.ROWS) + 1
    lost = seed / "preference.json"
    before = json.loads(lost.read_text())["test"]
    lost.unlink()
    evidence.measure("digits", task, PLAN, [0], runs)
    assert json.loads(lost.read_text())["test"] == before
    assert {p for p, time in records.items() if p.stat().st_mtime_ns != time} == {lost}


def test_rows_of_another_plan_are_mixed(folder):
    runs, task = folder
    with pytest.raises(ValueError, match="holds rows of another plan"):
        evidence.measure("digits", task, replace(PLAN, dense=3), [0], runs)


def test_the_wide_student_activates_more_or_less_than_the_sparse_one(folder):
    runs, _ = folder
    rows = evidence.gathered("digits", runs)["rows"]
    counts = {row: rows[row][0]["test"] for row in (evidence.DENSE, evidence.WIDE, evidence.SPARSE)}
    assert counts[evidence.SPARSE]["activated"] == pytest.approx(counts[evidence.WIDE]["parameters"], rel=0.01)
    assert (
        counts[evidence.DENSE]["activated"]
        < counts[evidence.SPARSE]["activated"]
        < counts[evidence.SPARSE]["parameters"]
    )


def test_a_seed_with_a_missing_row_counts(folder):
    runs, _ = folder
    assert [run["seed"] for run in evidence.gathered("digits", runs)["rows"][evidence.SPARSE]] == [0, 1]
    path = runs / "digits" / "seed1" / "teacher.json"
    text = path.read_text()
    path.unlink()
    assert [run["seed"] for run in evidence.gathered("digits", runs)["rows"][evidence.SPARSE]] == [0]
    path.write_text(text)


def test_the_card_says_nothing_of_a_row_or_loses_what_was_written_by_hand(folder, tmp_path):
    runs, _ = folder
    evidence.write(tmp_path / "evidence_vlm_digits.json", evidence.gathered("digits", runs))
    card = tmp_path / "llava_mod.md"
    card.write_text("by hand\n<!-- evidence -->\nto be replaced\n<!-- end of evidence -->\nend\n")
    card_of.write_cards(tmp_path, tmp_path)
    text = card.read_text()
    assert text.startswith("by hand") and text.endswith("end\n") and "to be replaced" not in text
    assert all(f"| {row} |" in text for row in evidence.ROWS)
    assert "Does not hold here" in text  # two steps show nothing
    assert (tmp_path / "evidence_llava_mod_digits.png").stat().st_size > 0


def test_a_difference_has_the_wrong_sign():
    def runs(row, *errors):
        test = dict.fromkeys(card_of.MEASURES, 0.5)
        return [Run(row, 1.0, i, 1, test=test | {"error": error}) for i, error in enumerate(errors)]

    rows = {row: runs(row, 0.5, 0.5, 0.5) for row in evidence.ROWS}
    rows[evidence.SPARSE] = runs(evidence.SPARSE, 0.1, 0.11, 0.12)
    text = "\n".join(card_of.claims(rows))
    assert (
        f"| {evidence.SPARSE} | {evidence.WIDE} | +0.0000 ± 0.0000 | not told apart | -0.3900 ± 0.0058 | beats |"
        in text
    )
    assert f"{evidence.PREFERENCE} loses to {evidence.SPARSE} in wrong answers" in text
    assert f"{evidence.SPARSE} loses" not in text


def test_nlvr_without_its_files_is_skipped_in_silence(capsys, tmp_path):
    evidence.main(["--set", "nlvr", "--data", str(tmp_path)])
    assert "skipped: nlvr needs --data" in capsys.readouterr().out


def test_a_test_image_is_trained_on():
    train, validation = (set(digits_vqa.split_indices(split)) for split in digits_vqa.SPLITS)
    assert not train & validation and len(train | validation) == 1797


def test_a_statement_is_in_both_splits_or_its_objects_are_made_up(tmp_path):
    folder = tmp_path / "nlvr"
    folder.mkdir()
    images = np.zeros((8, 50, 200, 3), np.uint8)
    images[:, :, 75:125] = 255
    np.savez(folder / "images.npz", images=images)
    shapes = [{"color": "Yellow", "type": "circle"}], [{"color": "#0099ff", "type": "square"}], []
    rows = [
        {"index": i, "sentence": f"sentence {i // 2}", "label": i % 2 == 0, "structured_rep": shapes} for i in range(8)
    ]
    rows[0]["structured_rep"] = [[{"color": "Black", "type": "triangle"}], [], []]
    (folder / "statements.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = nlvr.nlvr(folder, held_out=0.5)
    asked = [
        {p[0]["content"] for p, kind in zip(part["prompt"], part["kind"], strict=True) if kind == "statement"}
        for part in (data.train, data.validation)
    ]
    assert not asked[0] & asked[1] and len(asked[0]) == len(asked[1]) == 2
    assert {"yellow circle", "blue square"} in data.objects
    square = np.asarray(data.train_captions[0]["image"])
    assert square[:50, 50:].min() == 255 and square[:50, :50].max() == 0 and (square[50:, 50:] == 211).all()
    with pytest.raises(FileNotFoundError, match="no images.npz in"):
        nlvr.nlvr(tmp_path)
