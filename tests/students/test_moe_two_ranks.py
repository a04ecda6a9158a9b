"""Two processes of b examples: the same numbers as one process with the same micro-batches, under DDP and FSDP2."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.students.moe_worker import CASES, train
from tests.training.test_scaling_two_ranks import ROOT, free_port


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("moe")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    done = subprocess.run(
        [*command, str(free_port()), os.path.join(ROOT, "tests/students/moe_worker.py"), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
