"""The evidence on teacher hacking: a tiny chain from end to end, what a kill leaves, what the card says."""

import json

import pytest

from benchmarks import evidence_hacking
from benchmarks.evidence_hacking import OFFLINE, ROWS, STUDENT, TEACHER, measures_of

SHAPE = dict(oracle=[16, 1], teacher=[16, 1], student=[16, 1], oracle_steps=2, teacher_steps=2, student_steps=1)
SHAPE |= dict(oracle_answers=40, prompts=64, eval_prompts=4, prompt_tokens=3, answer_tokens=4)


def argv(folder) -> list[str]:
    data = folder / "data" / "tinyshakespeare"
    if not data.is_dir():
        data.mkdir(parents=True)
        (data / "input.txt").write_text("to be or not to be, that is the question. " * 30)
    flags = {"data": data.parent, "results": folder, "work": folder / "work", "out": folder}
    flags |= {"steps": 4, "evaluate": 2, "tune_share": 0.5, "shape": json.dumps(SHAPE), "seeds": 1}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))] + ["--rates", "0.01"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hacking")
    evidence_hacking.main(argv(folder))
    return folder, json.loads((folder / "evidence_hacking.json").read_text())


def test_rows_start_from_other_students_or_lack_an_evaluation(finished):
    _, result = finished
    assert result["rows"].keys() == ROWS.keys()
    histories = {row: runs[0]["history"] for row, runs in result["rows"].items()}
    assert {tuple(h["step"]) for h in histories.values()} == {(0, 2, 4)}
    assert len({(h["proxy"][0], h["golden"][0]) for h in histories.values()}) == 1
    assert len({h["golden"][-1] for h in histories.values()}) == 3, "rows must learn from different answers"
    assert result["teacher_golden"]["0"] > 0 and str(finished[0]) not in result["command"]


def test_a_finished_run_is_trained_again_or_one_of_other_settings_is_taken(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(evidence_hacking.Study, "trainer", None)
    evidence_hacking.main(argv(folder))
    assert json.loads((folder / "evidence_hacking.json").read_text())["rows"] == result["rows"]
    with pytest.raises(ValueError, match="holds runs of other settings"):
        evidence_hacking.main([*argv(folder), "--evaluate", "1"])


def test_the_card_does_not_say_what_the_histories_do(finished):
    folder, result = finished
    card = (folder / "teacher_hacking.md").read_text()
    assert (folder / "evidence_hacking.png").stat().st_size > 5000
    for row in (OFFLINE, TEACHER, STUDENT):
        assert f"| {row} | 0.01 | " in card
    assert "0 of 1" in card and "not told apart" in card
    run = {"history": {"step": [0, 150, 200, 250, 300, 350, 400], "proxy": [6, 5, 4, 3, 2, 1.5, 1.2]}}
    run["history"]["golden"] = [6, 5, 4, 4.2, 4.3, 4.5, 4.6]
    found = measures_of(run)
    assert found["hacking"] == 1 and found["overfitting"] == 0 and found["golden, lowest"] == 4
    assert found["golden, rise"] == pytest.approx(0.6) and found["exponent"] > 0


def test_data_that_is_not_there_is_found_late(tmp_path):
    with pytest.raises(SystemExit):
        evidence_hacking.main(["--data", str(tmp_path)])
