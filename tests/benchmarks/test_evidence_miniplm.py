"""The evidence of MiniPLM: paired rows, runs that are kept, and a card that says what was measured."""

import json

import pytest
import torch

from benchmarks import evidence_miniplm as evidence
from benchmarks.evidence_cards import END, START

PLAN = evidence.Plan(
    characters=30_000,
    block=16,
    vocabulary=300,
    teacher=(32, 1),
    reference=(32, 1),
    student=(32, 1),
    teacher_steps=8,
    reference_steps=2,
    steps=2,
    batch=4,
    rates=(1e-3, 1e-2),
)


def data(folder):
    for name, file in (("wikitext2", "valid.txt"), ("tinyshakespeare", "input.txt")):
        (folder / name).mkdir()
        (folder / name / file).write_text(" ".join(f"{name} word {i * i % 97}" for i in range(1500)))
    (folder / "gsm8k").mkdir()
    rows = [json.dumps({"question": f"{i} + {i}?", "answer": f"{2 * i}, of course"}) for i in range(900)]
    (folder / "gsm8k" / "train_1000.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = evidence.Study(data(tmp_path_factory.mktemp("data")), PLAN, tmp_path_factory.mktemp("work"))
    return made, made.result([0, 1, 2], "the command")


def test_rows_are_not_halves_of_one_corpus_or_seeds_share_a_draw(study):
    made, _ = study
    for table in evidence.TABLES:
        of = {row: made.rows_of(table, row, 0) for row in evidence.ROWS}
        count = len(of[evidence.ALL])
        assert len(of[evidence.KEPT]) == len(of[evidence.RANDOM]) == count // 2
        joined = torch.cat([of[evidence.KEPT], of[evidence.DROPPED]])
        assert sorted(joined.tolist()) == sorted(of[evidence.ALL].tolist())
        assert not torch.equal(of[evidence.RANDOM], made.rows_of(table, evidence.RANDOM, 1))
    rows, kinds = made.parts.corpora["noisy"]
    clean, _ = made.parts.corpora["plain"]
    assert (kinds == -1).float().mean().item() == pytest.approx(PLAN.noise, abs=0.02)
    assert torch.equal(rows[kinds != -1], clean[kinds != -1])


def test_a_second_call_trains_again_or_another_plan_is_mixed_in(study, monkeypatch):
    made, result = study
    monkeypatch.setattr(evidence, "trained", None)
    assert made.result([0, 1, 2], "the command")["tables"] == result["tables"]
    with pytest.raises(ValueError, match="rows of another plan"):
        evidence.Study(None, evidence.Plan(), made.work)


def test_a_card_says_other_numbers_than_the_results(study, tmp_path):
    made, result = study
    runs = result["tables"]["plain"]
    for row, shift in ((evidence.KEPT, -1.0), (evidence.RANDOM, 0.0)):
        for run in runs[row]:
            run["test"] = dict.fromkeys(run["test"], 4.0 + shift + 0.01 * run["seed"])
    (tmp_path / "evidence_miniplm.json").write_text(json.dumps(result))
    evidence.write_cards(tmp_path, tmp_path)
    text = (tmp_path / "miniplm.md").read_text()
    body = text.split(START)[1].split(END)[0]
    assert "it beats a random half (-1.0000 ± 0.0000 nats)" in body
    assert "3.0100 ± 0.0058" in body and "`the command`" in body and (tmp_path / "evidence_miniplm.png").is_file()
    evidence.write_cards(tmp_path, tmp_path)
    assert (tmp_path / "miniplm.md").read_text() == text
