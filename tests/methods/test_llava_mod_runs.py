"""Killed in any stage a run goes on there and ends the same; two ranks learn what one process does."""

import json

import pytest

from hf_distill.methods.llava_mod import STAGES
from tests.launching import run_worker

FOLDERS = [f"{i}_{stage}" for i, stage in enumerate(STAGES)]


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("llava_mod")
    run_worker("tests/methods/llava_mod_worker.py", folder, timeout=600)
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_starts_over_or_ends_elsewhere(stage, facts):
    fact = facts[f"killed in {stage}"]
    assert "error" not in fact, fact["error"]
    at = STAGES.index(stage)
    assert fact["died"] and fact["finished"] == list(STAGES[:at]) and fact["left"] == ["checkpoint-2"]
    assert fact["begun"] == {FOLDERS[at]: 2} | dict.fromkeys(FOLDERS[at + 1 :], 0)
    assert not fact["difference"], fact["difference"]


def test_a_stage_killed_before_its_student_was_saved_counts_as_finished(facts):
    fact = facts["killed at the end"]
    assert "error" not in fact, fact["error"]
    assert (
        fact["died"] and fact["finished"] == ["adaptor", "dense"] and fact["left"] == ["checkpoint-4", "checkpoint-2"]
    )
    assert fact["begun"] == {"2_sparse": 4, "3_preference": 0} and not fact["difference"], fact


def test_half_written_folders_are_taken_for_whole(facts):
    fact = facts["half-written"]
    assert "error" not in fact, fact["error"]
    assert fact["begun"] == {"2_sparse": 0, "3_preference": 0} and not fact["left"] and not fact["difference"], fact


def test_a_finished_run_trains_again(facts):
    assert facts["again"] == {"begun": {}}


def test_a_text_student_starts_over_or_ends_elsewhere(facts):
    fact = facts["text"]
    assert "error" not in fact, fact["error"]
    assert fact["died"] and fact["begun"] == {"2_sparse": 2, "3_preference": 0} and not fact["difference"], fact


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_learn_otherwise_than_one(strategy, facts):
    fact = facts[strategy]
    assert "error" not in fact, fact["error"]
    assert fact["ranks"] == [2]
    layers = {"0_adaptor": "Qwen2DecoderLayer", "1_dense": "Qwen2DecoderLayer"}
    layers |= dict.fromkeys(FOLDERS[2:], "Qwen2MoeDecoderLayer")
    for folder, groups in fact["groups"].items():  # each stage shards its own layers
        assert (layers[folder] in groups) == (strategy == "fsdp2"), fact["groups"]
    assert not fact["difference"], fact["difference"]
    assert facts["moved"] == {"kind": "LlavaForConditionalGeneration", "vision": False, "rest": True}
