"""Every teacher with every trainer, in one process and in two: the table says what comes of it."""

import importlib.util
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import relative_difference
from tests.launching import run_worker
from tests.teachers.every_teacher_worker import TASKS, Cell, run_all

WITHOUT_BITS, NEEDS_BITS = importlib.util.find_spec("bitsandbytes") is None, "8 and 4 bit need bitsandbytes"
TOLERANCE = 1e-5
# an 8-bit product finds its outlier columns among all rows of a batch: what it says of a row depends on the others
COUPLED = {"8bit": 5e-3}

# what a cell comes to: two steps, or this refusal before there is a trainer
OUTCOMES = {
    "trains": None,
    "no rows": r'this teacher has no rows before a head: use mode="logits" .* or "topk"',
    "no logits": "needs logits of its teacher, {kind} gives only scores or text: use a FrozenTeacher",
    "no tokens": "tells of the next token: the student must be a causal language model",
    "no model": "needs a teacher model as its reference: .*FrozenTeacher, or a CachedTeacher .*; got {kind}",
    "no scores": r'the {kind} .* does not hold how likely each answer is: .*cache_teacher\(.*mode="scores"\)',
}
TABLE = """
    teacher         type               bert       vit        sft        dpo
    frozen          FrozenTeacher      trains     trains     trains     trains
    8bit            FrozenTeacher      trains     trains     trains     trains
    4bit            FrozenTeacher      trains     trains     trains     trains
    adapter_off     AdapterOffTeacher  trains     trains     trains     no model
    cached_hidden   CachedTeacher      no rows    no rows    trains     no scores
    cached_topk     CachedTeacher      trains     trains     trains     no scores
    cached_sampled  CachedTeacher      trains     trains     trains     no scores
    cached_scores   CachedTeacher      no logits  no logits  no logits  trains
    cached_logits   CachedTeacher      trains     trains     trains     no scores
    privileged      PrivilegedTeacher  trains     trains     trains     no model
    ema             EMATeacher         trains     trains     trains     no model
    peer            PeerTeacher        trains     trains     trains     no model
    ensemble        EnsembleTeacher    trains     trains     trains     no model
    routed          RoutedTeacher      trains     trains     trains     no model
    gated           EnsembleTeacher    trains     trains     trains     no model
    remote          RemoteTeacher      no tokens  no tokens  trains     no model
    text            LocalTextTeacher   no logits  no logits  no logits  no model
"""
HEADER, *LINES = (re.split(r"\s{2,}", line.strip()) for line in TABLE.strip().splitlines())
EXPECTED = {f"{line[0]}-{task}": (line[1], line[2 + i]) for line in LINES for i, task in enumerate(TASKS)}
# the student that another teacher's words make too: a cache is its teacher (of three classes topk keeps all)
SAME = {
    "bert": {"frozen", "cached_logits", "cached_topk"},
    "vit": {"frozen", "cached_logits", "cached_topk"},
    "sft": {"frozen", "cached_logits", "cached_hidden", "remote"},  # of k = 64 words
    "dpo": {"frozen", "cached_scores"},
}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Facts and weights of every cell in this process."""
    return run_all(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Facts of every cell on both ranks, and the weights."""
    folder = tmp_path_factory.mktemp("two")
    run_worker("tests/teachers/every_teacher_worker.py", folder, ranks=2)
    weights: dict[str, dict] = {name: {} for name in EXPECTED}
    for name, value in load_file(folder / "weights.safetensors").items():
        cell, name = name.split("/", 1)
        weights[cell][name] = value
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(2)], weights


def check(facts: dict, name: str, ranks: int) -> None:
    """The facts are what the table says."""
    assert "error" not in facts, facts["error"]
    kind, outcome = EXPECTED[name]
    if outcome != "trains":
        assert "refused" in facts, f"it trains: {facts}"
        assert not facts["built"], "it is refused only when training has begun"
        assert re.search("^(ValueError|TypeError): .*" + OUTCOMES[outcome].format(kind=kind), facts["refused"])
        return
    assert "refused" not in facts, facts["refused"]
    assert (facts["steps"], facts["ranks"], len(facts["losses"])) == (2, ranks, 2)
    assert (facts["wrapper"] == "DistributedDataParallel") == (ranks == 2)
    assert all(map(math.isfinite, facts["losses"])) and facts["moved"] > 1e-3


def test_a_teacher_or_trainer_is_missing_in_the_table():
    assert [line[0] for line in LINES] == list(Cell.TEACHERS) and HEADER[2:] == list(TASKS)
    assert {outcome for _, outcome in EXPECTED.values()} == OUTCOMES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_teacher_under_a_trainer_does_something_else(name, one, two):
    if "bit-" in name and WITHOUT_BITS:
        pytest.skip(NEEDS_BITS)
    alone, together = one[0][name], [facts[name] for facts in two[0]]
    check(alone, name, 1)
    for facts in together:
        check(facts, name, 2)
    if EXPECTED[name][1] != "trains":
        return
    tolerance = COUPLED.get(name.split("-")[0], TOLERANCE)
    assert relative_difference(two[1][name], one[1][name]) < tolerance
    losses = [sum(pair) / 2 for pair in zip(*(facts["losses"] for facts in together), strict=True)]
    assert losses == pytest.approx(alone["losses"], rel=tolerance)


@pytest.mark.skipif(WITHOUT_BITS, reason=NEEDS_BITS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("task", ["bert", "vit"])
def test_a_classifier_s_head_is_quantised(task, bits, tmp_path):
    """transformers leaves it as it is only where it has no bias; bitsandbytes cannot multiply three 4-bit rows."""
    model = Cell(f"{bits}bit", task, tmp_path).quantised(bits).model
    kinds = {type(module).__name__ for module in model.modules()}
    assert type(model.classifier) is torch.nn.Linear and {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds


@pytest.mark.parametrize("task", TASKS)
def test_a_teacher_is_taken_for_another(task, one):
    """Two teachers make two students; a cache makes its teacher's."""
    students = {n.removesuffix(f"-{task}"): w for n, w in one[1].items() if n.endswith(f"-{task}") and w}
    students.pop("adapter_off", None)  # other weights
    for a, first in students.items():
        for b in list(students)[: list(students).index(a)]:
            apart = relative_difference(first, students[b])
            assert (apart < TOLERANCE) == ({a, b} <= SAME[task]), (a, b, apart)
