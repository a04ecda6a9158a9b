"""A run that is killed and restarted ends where the uninterrupted one does, to the last bit."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_distill.training.saving import FILE
from tests.launching import run_worker

WORKER = "tests/training/resume_worker.py"


def tensors(folder: Path) -> dict:
    """Student weights, and all that the objective and the trainer keep."""
    weights = [name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).is_file()]
    assert len(weights) == 1
    return {**load_file(folder / weights[0]), **load_file(folder / FILE)}


def assert_same_run(root: Path, ours: str, reference: str) -> None:
    for step in (9, 11):
        a, b = (tensors(root / name / f"checkpoint-{step}") for name in (ours, reference))
        assert a.keys() == b.keys()
        assert {"state.paced/pace", "parameter.parts.1.projectors.0.weight", "tokens"} <= a.keys()
        differing = [name for name in a if not torch.equal(a[name], b[name])]
        assert not differing, f"{ours} differs from {reference} at step {step} in {differing}"
    logs, expected = (json.loads((root / f"{name}.json").read_text())["logs"] for name in (ours, reference))
    assert [log["step"] for log in logs] == [log["step"] for log in expected] == [2, 4, 6, 8, 10]
    assert logs == expected, f"{ours} logged other values than {reference}"
    assert {"loss/paced/kd", "num_tokens", "agreement", "grad_norm"} <= logs[0].keys()
    assert [log["num_tokens"] for log in logs] == sorted({log["num_tokens"] for log in logs})


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    run_worker(WORKER, root)
    return root


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume2")
    run_worker(WORKER, root, ranks=2)
    return root


def ends(root: Path, rank: int) -> dict[str, int]:
    return json.loads((root / f"ends-{rank}.json").read_text())


@pytest.mark.parametrize("run", ["lora-5", "lora-8", "full-4"])
def test_a_killed_run_goes_on_differently(one_process, run):
    how = ends(one_process, 0)
    assert (how[f"{run} killed"], how[f"{run} resumed"]) == (-signal.SIGKILL, 0)
    assert_same_run(one_process, run, run.split("-")[0])


def test_a_killed_run_of_two_processes_goes_on_differently(two_processes):
    assert ends(two_processes, 0) == {"full": 0, "full-5 killed": -signal.SIGKILL, "full-5 resumed": 0}
    assert ends(two_processes, 1) == {"full": 0, "full-5 killed": 1, "full-5 resumed": 0}
    facts = json.loads((two_processes / "full-5.json").read_text())
    assert (facts["ranks"], facts["wrapper"]) == (2, "DistributedDataParallel")
    assert_same_run(two_processes, "full-5", "full")
