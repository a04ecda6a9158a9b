"""Token calibration through the trainer's evaluation: exact, whatever the batches and ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hf_distill import DistillSFTTrainer, LogitKD
from hf_distill.evaluation.calibration import take_reliability, token_calibration
from hf_distill.evaluation.classification import reliability
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.launching import run_worker

HELD_OUT = text_dataset(11, seed=3)


def build(folder, batch: int) -> DistillSFTTrainer:
    trainer = DistillSFTTrainer(
        tiny_llama(),
        teacher=tiny_llama(32, seed=1),
        objective=LogitKD(),
        args=sft_arguments(folder, per_device_eval_batch_size=batch),
        train_dataset=text_dataset(2),
        eval_dataset=HELD_OUT,
        processing_class=tiny_tokenizer(),
    )
    trainer.eval_observed = token_calibration()
    return trainer


def measured(folder, batch: int) -> dict:
    metrics = build(folder, batch).evaluate()
    diagram = take_reliability(metrics, rows=1000)
    assert not [name for name in metrics if "calibration" in name]
    numbers = {k: v for k, v in metrics.items() if not k.endswith(("runtime", "second", "time"))}
    return numbers | {"ece": diagram.error, "confidence": diagram.confidence.tolist()}


def test_the_diagram_is_not_that_of_all_tokens(tmp_path):
    trainer = build(tmp_path, 4)
    metrics = trainer.evaluate()
    logits, labels = [], []
    for row in trainer.eval_dataset:
        ids = torch.tensor(row["input_ids"])[None]
        with torch.no_grad():
            logits.append(trainer.model(ids).logits[0, :-1].float())
        labels.append(ids[0, 1:])
    logits, labels = torch.cat(logits), torch.cat(labels)
    ours, slow = take_reliability(metrics, rows=len(labels)), reliability(logits, labels)
    assert torch.equal(ours.count, slow.count) and (slow.count > 0).sum() > 1
    torch.testing.assert_close(ours.confidence, slow.confidence, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.accuracy, slow.accuracy, atol=1e-6, rtol=1e-5)
    assert ours.error == pytest.approx(slow.error, abs=1e-6)


def test_batches_or_ranks_change_the_evaluation(tmp_path):
    reference = measured(tmp_path, 1)
    for batch in (3, 8):
        assert_same(measured(tmp_path, batch), reference)
    run_worker(Path(__file__), tmp_path, ranks=2)
    assert_same(json.loads((tmp_path / "two.json").read_text()), reference)


def assert_same(ours: dict, reference: dict) -> None:
    assert ours.keys() == reference.keys() and reference["ece"] > 0
    for name, value in reference.items():
        assert ours[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


if __name__ == "__main__":
    found = measured(sys.argv[1], 3)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1], "two.json").write_text(json.dumps(found))
