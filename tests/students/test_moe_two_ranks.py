"""Two processes of b examples: the same numbers as one process with the same micro-batches, under DDP and FSDP2."""

import json

import pytest
import torch

from tests.launching import run_worker
from tests.students.moe_worker import CASES, train


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("moe")
    run_worker("tests/students/moe_worker.py", folder, ranks=2)
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_or_count_otherwise_than_one(case, facts, tmp_path):
    two = facts[case]
    assert "error" not in two, two["error"]
    family, strategy = case.split()
    assert two["processes"] == 2 and two["wrapper"].startswith("FSDP" if strategy == "fsdp2" else "DistributedData")
    one = train(family, str(tmp_path), gradient_accumulation_steps=2)
    assert one["processes"] == 1 and len(one["logs"]) == len(two["logs"]) == 3
    for ours, alone in zip(two["logs"], one["logs"], strict=True):
        assert ours == pytest.approx(alone, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(torch.tensor(two["router"]), torch.tensor(one["router"]), atol=1e-5, rtol=1e-4)
