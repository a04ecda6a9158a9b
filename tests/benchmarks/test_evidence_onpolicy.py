"""The evidence on on-policy training: every row runs, finished runs are kept, and the card says what came out."""

import json

from benchmarks import evidence_onpolicy
from benchmarks.evidence_onpolicy import ROWS, main
from benchmarks.evidence_onpolicy_card import write_cards


def test_a_row_does_not_run_or_is_trained_twice(tmp_path, monkeypatch):
    data = tmp_path / "data" / "tinyshakespeare"
    data.mkdir(parents=True)
    speech = "First Citizen:\nBefore we proceed any further, hear me speak, and hear what all of us would say to you."
    (data / "input.txt").write_text("\n\n".join(f"{speech} {i}" for i in range(200)))
    sizes = "--steps 2 --teacher_steps 1 --student_steps 1 --teacher_size 32 1 --student_size 32 1".split()
    paths = ["--data", data.parent, "--results", tmp_path / "results", "--work", tmp_path / "work"]
    argv = [*map(str, paths), *sizes, "--seed_list", "0"]
    main(argv)
    result = json.loads((tmp_path / "results" / "evidence_onpolicy.json").read_text())
    assert list(result["rows"]) == list(ROWS)
    monkeypatch.setattr(evidence_onpolicy, "train_once", None)  # a second run reads what is finished
    main(argv)
    assert json.loads((tmp_path / "results" / "evidence_onpolicy.json").read_text())["rows"] == result["rows"]
    write_cards(tmp_path / "results", tmp_path)
    text = (tmp_path / "onpolicy.md").read_text()
    assert all(f"| {name} |" in text for name in ROWS) and (tmp_path / "evidence_onpolicy.png").is_file()
    assert "not told apart" in text, "one seed tells nothing"
