"""DDK killed inside a round draws, weighs and ends as if nothing had happened, on one process and on two."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_distill.training.saving import FILE
from tests.launching import run_worker


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(root: Path, ours: str, reference: str) -> None:
    for step in (6, 9):
        folders = [root / name / f"checkpoint-{step}" for name in (ours, reference)]
        weights = [next(folder.glob("*model.safetensors")).name for folder in folders]
        a, b = ({**load_file(f / w), **load_file(f / FILE)} for f, w in zip(folders, weights, strict=True))
        assert {"state.weights", "state.factors", "state.cursors", "state.teacher_ppl"} <= a.keys() == b.keys()
        differing = [name for name in a if not torch.equal(a[name], b[name])]
        assert not differing, f"{ours} differs from {reference} at step {step} in {differing}"
    logs, expected = (json.loads((root / f"{name}.json").read_text())["logs"] for name in (ours, reference))
    assert logs == expected and any("ddk/r/a" in log for log in logs)


def rounds(root: Path, name: str, rank: int = 0) -> dict[int, dict]:
    """Each round as it was drawn; again after a restart only if it is the same."""
    found: dict[int, dict] = {}
    for line in lines(root / f"{name}-{rank}.jsonl"):
        assert found.setdefault(line["round"], line) == line, "a restarted round is another"
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ddk")
    run_worker("tests/methods/ddk_worker.py", root)
    return root


@pytest.mark.parametrize("run", ["inside-5", "boundary-8"])
def test_a_killed_round_goes_on_as_another(one_process, run):
    name = run.split("-")[0]
    how = json.loads((one_process / "ends-0.json").read_text())
    assert (how[f"{name} killed"], how[f"{name} resumed"]) == (-signal.SIGKILL, 0)
    assert_same_run(one_process, run, name)
    whole, killed = rounds(one_process, name), rounds(one_process, run)
    assert whole == killed and len(whole) == 3
    assert len(lines(one_process / f"{run}-0.jsonl")) > 3, "nothing was restarted"


def test_ranks_draw_or_weigh_differently(one_process, tmp_path_factory):
    root = tmp_path_factory.mktemp("ddk2")
    run_worker("tests/methods/ddk_worker.py", root, ranks=2)
    assert json.loads((root / "ends-0.json").read_text())["inside killed"] == -signal.SIGKILL
    facts = json.loads((root / "inside-5.json").read_text())
    assert (facts["ranks"], facts["wrapper"]) == (2, "DistributedDataParallel")
    assert_same_run(root, "inside-5", "inside")
    first, second = (rounds(root, "inside", rank) for rank in (0, 1))
    assert first == second == rounds(root, "inside-5") and len(first) == 3
    alone, both = (load_file(folder / "inside" / "checkpoint-3" / FILE) for folder in (one_process, root))
    # validation sets of 3 rows on 2 ranks: one row is repeated, and must not count
    torch.testing.assert_close(both["state.teacher_ppl"], alone["state.teacher_ppl"], rtol=1e-5, atol=0)
