"""The evidence of DDK: a tiny run of every row, what a second call does again, and the card."""

import json

import pytest

from benchmarks import evidence_ddk as evidence
from benchmarks.evidence_cards import END, START
from benchmarks.evidence_ddk_card import write_cards

SIZES = evidence.Sizes(
    teacher=(32, 1), student=(32, 1), teacher_steps=1, pretrain_steps=1, steps=4, interval=2, batch=2, block=16,
    vocabulary=300, validation=2, test=2, characters={"stdlib": 40_000},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    lines = "\n".join(f"Line {i} of a text that nobody has seen, and the {i % 7} kings in it." for i in range(900))
    for path in ("tinyshakespeare/input.txt", "wikitext2/valid.txt"):
        (folder / "data" / path).parent.mkdir(parents=True)
        (folder / "data" / path).write_text(lines)
    (folder / "data" / "gsm8k").mkdir()
    problems = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}, of course."} for i in range(1000)]
    (folder / "data" / "gsm8k" / "train_1000.jsonl").write_text("\n".join(map(json.dumps, problems)))
    run(folder)
    return folder


def run(folder) -> None:
    paths = ["--data", folder / "data", "--work", folder / "work", "--results", folder / "results"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "write_cards", lambda results: None)
        evidence.main([*map(str, paths), "--seeds", "2"], SIZES)


def test_a_second_call_trains_again_or_a_lost_run_is_not_made_anew(folder):
    records = {path: path.stat().st_mtime_ns for path in (folder / "work" / "records").iterdir()}
    assert len(records) == len(evidence.CASES) * len(evidence.ROWS) * (len(evidence.RATES) + 2)
    lost = next(path for path in records if json.loads(path.read_text())["run"]["test"])
    lost.unlink()
    run(folder)
    assert {path for path, when in records.items() if path.stat().st_mtime_ns != when} == {lost}


def test_a_row_draws_by_another_mixture_than_its_name(folder):
    cases = json.loads((folder / "results" / "evidence_ddk.json").read_text())["cases"]
    rows = next(iter(cases.values()))["rows"]
    shares = {row: [v for k, v in each["runs"][0]["rounds"][0].items() if "/r/" in k] for row, each in rows.items()}
    assert shares[evidence.UNIFORM] == [0.25] * 4
    assert shares[evidence.NATURAL] == shares[evidence.ALONE] != shares[evidence.UNIFORM]
    assert shares[evidence.OURS] not in (shares[evidence.NATURAL], shares[evidence.UNIFORM])
    losses = {row: each["runs"][0]["run"]["test"]["worst"] for row, each in rows.items()}
    assert losses[evidence.ALONE] != losses[evidence.NATURAL], "the labels alone have a teacher"


def test_the_card_lacks_a_row_or_a_path_is_printed(folder, tmp_path):
    (tmp_path / "ddk.md").write_text(f"{START}\n{END}\n")
    write_cards(folder / "results", tmp_path)
    text = (tmp_path / "ddk.md").read_text()
    assert all(f"| {row} |" in text for row in evidence.ROWS)
    assert text.count("| DDK beside |") == 2 and text.count(f"| {evidence.UNIFORM} |") == 4
    assert "--data DIR" in text and str(folder) not in text and (tmp_path / "evidence_ddk.png").is_file()
    result = json.loads((folder / "results" / "evidence_ddk.json").read_text())
    assert {"command", "machine", "versions", "commit", "cases"} <= result.keys()
