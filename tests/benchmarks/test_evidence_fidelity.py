"""The evidence on fidelity: rows go on after a kill, answers are right, and the card says what was measured."""

import json

import pytest

from benchmarks import evidence_fidelity as evidence
from benchmarks import evidence_fidelity_card as card_of

PLAN = evidence.Plan(
    warm_steps=2, token_warm_steps=2, steps=2, token_steps=2, teacher_steps=2, token_teacher_steps=2, batch=4, train=8,
    teacher_train=16, held_out=6, student=(16, 1), teacher=(32, 1), token_student=(16, 1), token_teacher=(32, 1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "said"), [(37, 48, "7+8=15 3+4+1=8 85"), (5, 4, "5+4=9 0+0=0 9"), (99, 99, "9+9=18 9+9+1=19 198")]
)
def test_a_sum_is_wrong(a, b, said):
    assert evidence.worked(a, b) == (f"{a:02d}+{b:02d}=", said)


def test_a_pair_of_numbers_is_in_two_parts():
    rows = evidence.sums(evidence.Plan())
    parts = [set(rows[name]) for name in ("teacher", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) and set(rows["train"]) <= parts[0]


def test_a_finished_run_is_made_again_or_the_card_loses_a_row(tmp_path, monkeypatch):
    names = (card_of.SFT, "reverse KL", "forward KL, noise 5")
    monkeypatch.setattr(evidence, "ROWS", {name: evidence.ROWS[name] for name in (*names, "forward KL")})
    monkeypatch.setattr(evidence, "TASKS", {card_of.SUMS: evidence.sums_task})
    found = dict(evidence.measure(PLAN, [0, 1], tmp_path, tmp_path / "work"))
    monkeypatch.setattr(evidence, "train_once", lambda *given: pytest.fail("a finished run is made again"))
    assert json.dumps(dict(evidence.measure(PLAN, [0, 1], tmp_path, tmp_path / "work"))) == json.dumps(found)
    result = {"plan": vars(PLAN), "rates": evidence.RATES, "command": "c", "machine": {"cpu": "x", "threads": 1}}
    result |= {"versions": {}, "commit": "abc", "sets": found}
    (tmp_path / "evidence_fidelity.json").write_text(json.dumps(result))
    (tmp_path / "fidelity.md").write_text("by hand\n<!-- evidence -->\n<!-- end of evidence -->\nend\n")
    card_of.write_cards(tmp_path, tmp_path)
    text = (tmp_path / "fidelity.md").read_text()
    assert text.startswith("by hand") and text.endswith("end\n") and all(f"| {name} |" in text for name in names)
    assert "**In words.**" in text and "Not told apart from it" in text  # two seeds of two steps show nothing
    assert "Spearman" in text and (tmp_path / "evidence_fidelity_sums.png").stat().st_size > 3000
