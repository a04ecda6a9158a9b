"""What a run knows of hacking is the same on every rank, after a kill, and on one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import run_worker
from tests.methods import teacher_hacking_worker


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("hacking")
    run_worker("tests/methods/teacher_hacking_worker.py", root, ranks=2)
    return root


def facts(root, name: str, rank: int) -> dict:
    return json.loads((root / f"{name}-{rank}.json").read_text())


def test_ranks_know_different_histories(two_ranks):
    first, second = (facts(two_ranks, "whole", rank) for rank in (0, 1))
    assert first == second and first["ranks"] == 2
    assert first["history"]["step"] == [1, 2, 3, 4, 5, 6, 7] and first["round"] == 2


def test_a_killed_run_remembers_or_measures_otherwise(two_ranks):
    assert facts(two_ranks, "killed", 0) == facts(two_ranks, "killed", 1) == facts(two_ranks, "whole", 0)
    ours, whole = (load_file(two_ranks / name / "checkpoint-7" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    told = [json.loads((two_ranks / name / "hacking.json").read_text()) for name in ("killed", "whole")]
    assert told[0] == told[1]


def test_one_process_writes_other_answers_or_measures_other_distances(two_ranks, tmp_path):
    alone, ranks = teacher_hacking_worker.train(tmp_path, "alone", batch=4), facts(two_ranks, "whole", 0)
    assert alone["history"]["step"] == ranks["history"]["step"]
    for name in ("proxy", "golden"):
        assert alone["history"][name] == pytest.approx(ranks["history"][name], rel=1e-3)
