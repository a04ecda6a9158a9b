"""Written texts over two ranks and over kills: exact counts, and the uninterrupted run to the last bit."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_distill.training.saving import FILE
from tests.helpers import relative_difference, tiny_llama
from tests.launching import run_worker
from tests.training.onpolicy_runs import Seen, loop_loss, trainer_of

WORKER = "tests/training/onpolicy_worker.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("onpolicy")
    run_worker(WORKER, root)
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("onpolicy2")
    run_worker(WORKER, root, ranks=2)
    return root


def tensors(folder: Path) -> dict:
    weights = [name for name in ("model.safetensors", "adapter_model.safetensors") if (folder / name).is_file()]
    return {**load_file(folder / weights[0]), **load_file(folder / FILE)}


def assert_same_run(root: Path, kind: str) -> None:
    for step in (6, 8):
        a, b = (tensors(root / name / f"checkpoint-{step}") for name in (f"{kind}-killed", kind))
        assert a.keys() == b.keys() and "running.text.policy" in a
        differing = [name for name in a if not torch.equal(a[name], b[name])]
        assert not differing, f"{kind}: at step {step} {differing} differ"
    ours, whole = (json.loads((root / f"{name}.json").read_text()) for name in (f"{kind}-killed", kind))
    # the checkpoint's log holds what came before it
    assert ours["logs"] == whole["logs"] and [log["step"] for log in ours["logs"]] == [3, 6], kind
    assert ours["texts"] == whole["texts"][-len(ours["texts"]) :] and ours["texts"]
    if kind == "adaptive":
        assert len(b["running.text.replay.prompts"]) == 5 and b["running.text.policy"][1] > 0.6, "it was raised"
        assert sum(log["on_policy/replayed"] for log in whole["logs"]) > 0


def test_a_killed_run_goes_on_with_other_texts(alone):
    ends = json.loads((alone / "ends-0.json").read_text())
    assert ends == {"mixed": 0, "mixed-killed": -signal.SIGKILL, "mixed-resumed": 0}
    assert_same_run(alone, "mixed")


def test_a_killed_run_of_two_ranks_goes_on_with_other_texts(pair):
    assert json.loads((pair / "ends-0.json").read_text())["adaptive-resumed"] == 0
    assert_same_run(pair, "adaptive")


@pytest.mark.parametrize("name", ["sampled", "ragged"])
def test_two_ranks_divide_by_another_count_than_that_of_what_they_met(pair, name):
    """Batch x accumulation x ranks against a loop in float64 over all loss rows; a ragged end repeats none."""
    ranks = [json.loads((pair / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["losses"] == ranks[1]["losses"]
    batches = [batch for rank in ranks for batch in rank["batches"]]
    student, teacher = tiny_llama(16, 2, seed=1).double().eval(), tiny_llama(32, 3, seed=2).double().eval()
    loss, _ = loop_loss(batches, student, teacher)
    loss.backward()
    assert ranks[0]["losses"][0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {n: p.grad.float() for n, p in student.named_parameters()}
    assert relative_difference(load_file(pair / f"{name}.safetensors"), expected) < 1e-5
    assert ranks[0]["texts"] == ranks[1]["texts"], "ranks decide alike"
    log = ranks[0]["logs"][0]
    if name == "sampled":
        assert 0 < log["on_policy/share"] < 1
        assert ranks[0]["batches"] != ranks[1]["batches"]
    else:
        kept = {(r, b, i // len(batch["input_ids"][0])) for r, rank in enumerate(ranks)
                for b, batch in enumerate(rank["batches"]) for i in batch["loss_rows"]}  # fmt: skip
        assert len(kept) == 7


def test_ranks_draw_the_same_texts_to_the_same_prompts(pair):
    ranks = [json.loads((pair / f"same-{rank}.json").read_text()) for rank in (0, 1)]
    met = [str(batch["input_ids"]) for rank in ranks for batch in rank["batches"]]
    assert len(met) == 4 == len(set(met))


def test_two_ranks_find_another_gradient_than_one(pair, tmp_path):
    """The likeliest tokens need no draws, so that one process writes what two write."""
    seen = Seen()
    settings = dict(per_device_train_batch_size=8, lmbda=1.0, sampling_temperature=0.0, seed=11)
    trainer_of(tmp_path, callbacks=[seen], max_steps=1, **settings).train()
    ranks = [json.loads((pair / f"greedy-{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["losses"][0] == pytest.approx(seen.losses[0], rel=1e-6)
    assert relative_difference(load_file(pair / "greedy.safetensors"), seen.gradients[0]) < 1e-5
    assert ranks[0]["logs"][0]["on_policy/length"] == seen.logs[0]["on_policy/length"]
    assert ranks[0]["logs"][0]["num_tokens"] == seen.logs[0]["num_tokens"]
