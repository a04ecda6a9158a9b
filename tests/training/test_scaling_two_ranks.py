"""Two processes on one machine: the same numbers as one, under DDP and FSDP2, also where rows do not divide.

One pair of processes runs all cases (see distributed_worker.py), since most of a run's time is imports.
"""

import json

import pytest
from safetensors.torch import load_file

from tests.helpers import text_dataset
from tests.launching import run_worker
from tests.training.distributed_worker import CASES, build_stream
from tests.training.scaling_cases import Case, by_hand, compare

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of results, and the facts of each case."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_worker("tests/training/distributed_worker.py", folder, ranks=2, timeout=400)
    return folder, json.loads((folder / "facts.json").read_text())


def fact(ran, name: str) -> dict:
    facts = ran[1][name]
    assert "error" not in facts, facts["error"]
    return facts


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_find_the_numbers_of_one(name, ran):
    facts = fact(ran, name)
    assert facts["processes"] == 2 and facts["steps"] == 2
    sharded = CASES[name].strategy == "fsdp2"
    assert facts["wrapper"].startswith("FSDP") if sharded else facts["wrapper"] == "DistributedDataParallel"
    if not CASES[name].adapter_off:
        assert facts["teacher"].startswith("FSDP") == sharded, "the teacher is sharded with the student"
    assert len(facts["terms_logged"]) == 1, "a step has other terms than the one before"
    worst = compare(load_file(ran[0] / f"{name}.safetensors"), by_hand(CASES[name]))
    assert set(worst) == {"loss", "gradient", "weight", "mean"}
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize("name", ["projectors", "projectors_fsdp2"])
def test_parameters_of_the_objective_train_alike_on_all_ranks_at_their_own_rate(name, ran):
    facts = fact(ran, name)
    assert facts["between_ranks"] == 0 and facts["steps"] == 3
    assert facts["rates"] == [0.01, 0.05]
    assert facts["losses"][-1] < facts["losses"][0]


@pytest.mark.parametrize("name", ["features_only", "features_only_fsdp2"])
def test_an_objective_that_reads_no_logits_goes_on_after_its_first_step(name, ran):
    facts = fact(ran, name)
    assert facts["steps"] == 3 and len(facts["losses"]) == 3


def test_a_bfloat16_student_and_a_float32_projector_shard_side_by_side(ran):
    facts = fact(ran, "low_precision_fsdp2")
    assert facts["dtypes"] == ["torch.bfloat16", "torch.float32"] and facts["projector"] == "torch.float32"
    assert facts["steps"] == 3


def test_a_stream_gives_two_ranks_the_batches_of_one(ran, tmp_path):
    trainer = build_stream(Case(), text_dataset(8, seed=4).to_iterable_dataset())
    trainer.train()
    alone = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert fact(ran, "stream")["losses"] == pytest.approx(alone, rel=TOLERANCE)


def test_ways_of_feeding_ranks_that_cannot_be_counted_are_refused_by_name(ran):
    for setting, message in fact(ran, "refusals").items():
        assert setting in message, (setting, message)


def test_repeated_rows_are_not_counted_after_resuming_inside_an_epoch(ran):
    whole, resumed = fact(ran, "resumed_ragged")["losses"]
    assert len(whole) == 4 and resumed == whole
