"""Two ranks write the cache that one writes, and learn from it what one learns beside the teacher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import relative_difference
from tests.teachers.cached_worker import MODES, cache, live_teacher, run

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_two_ranks_cache_or_learn_something_else(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "tests/teachers/cached_worker.py", str(two)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cache(one, live_teacher(), per_device=6)
    weights, facts = run(one, live_teacher(), per_device=6)
    found = json.loads((two / "facts.json").read_text())
    for mode in MODES:
        assert files(two / mode) == files(one / mode)
        assert (found[mode]["wrapper"], found[mode]["ranks"]) == ("DistributedDataParallel", 2)
        assert found[mode]["eval_loss"] == pytest.approx(facts["eval_loss"], rel=1e-5)
        assert relative_difference(load_file(two / f"{mode}.safetensors"), weights) < 1e-5
