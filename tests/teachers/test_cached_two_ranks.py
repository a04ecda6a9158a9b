"""Two ranks write the cache that one writes, and learn from it what one learns beside the teacher."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import relative_difference
from tests.launching import run_worker
from tests.teachers.cached_worker import MODES, cache, live_teacher, run


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


def test_two_ranks_cache_or_learn_something_else(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    run_worker("tests/teachers/cached_worker.py", two, ranks=2)
    cache(one, live_teacher(), per_device=6)
    weights, facts = run(one, live_teacher(), per_device=6)
    found = json.loads((two / "facts.json").read_text())
    for mode in MODES:
        assert files(two / mode) == files(one / mode)
        assert (found[mode]["wrapper"], found[mode]["ranks"]) == ("DistributedDataParallel", 2)
        assert found[mode]["eval_loss"] == pytest.approx(facts["eval_loss"], rel=1e-5)
        assert relative_difference(load_file(two / f"{mode}.safetensors"), weights) < 1e-5
