"""The evidence of Swing: a tiny run of every row, what a second call does again, and the card."""

import json

import pytest

from benchmarks import evidence_swing as evidence
from benchmarks.evidence_cards import END, START

SIZES = evidence.Sizes(
    teacher=(40, 1), student=(16, 1), teacher_steps=2, steps=2, batch=2, vocabulary=300, repeats=2, values=20, texts=60
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "data" / "tinyshakespeare").mkdir(parents=True)
    lines = [f"Line {i} of a play that nobody has seen, and the {i % 7} kings in it." for i in range(160)]
    (folder / "data" / "tinyshakespeare" / "input.txt").write_text("\n".join(lines))
    run(folder)
    return folder


def run(folder) -> None:
    paths = ["--data", folder / "data", "--work", folder / "work", "--results", folder / "results"]
    evidence.main([*map(str, paths), "--seeds", "2"], SIZES)


def test_a_second_call_trains_again_or_a_lost_run_is_not_made_anew(folder):
    records = {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*-*-*-*.json")}
    assert len(records) == len(evidence.ROWS) * (2 + 2) + 2 * len(evidence.PUBLIC)
    lost = folder / "work" / next(path.name for path in records if path.name.startswith("Swing-"))
    lost.unlink()
    run(folder)
    assert {path for path, when in records.items() if path.stat().st_mtime_ns != when} == {lost}


def test_the_card_lacks_a_row_or_a_path_is_printed(folder, tmp_path):
    (tmp_path / "swing.md").write_text(f"{START}\n{END}\n")
    evidence.write_cards(folder / "results", tmp_path)
    text = (tmp_path / "swing.md").read_text()
    assert all(f"| {row} |" in text for row in (*evidence.ROWS, *evidence.PUBLIC))
    assert "--data DIR" in text and str(folder) not in text and (tmp_path / "evidence_swing.png").is_file()
    result = json.loads((folder / "results" / "evidence_swing.json").read_text())
    assert {"command", "machine", "versions", "commit", "teacher"} <= result.keys()
