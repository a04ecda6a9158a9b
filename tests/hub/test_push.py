"""Uploading over HTTP with the real client, to a server that speaks the Hub's API, faults included."""

import json
import re

import pytest

from hf_distill.hub.push import HubUploadError, push_run
from tests.hub.local_hub import local_hub
from tests.hub.push_worker import FAULTS
from tests.launching import run_worker


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the worker found, the server it pushed to, and the run's folder."""
    folder = tmp_path_factory.mktemp("push")
    environment = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0"}
    with local_hub() as hub:
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
        run_worker("tests/hub/push_worker.py", folder, environment=environment)
    return json.loads((folder / "facts.json").read_text()), hub, folder / "student"


def test_the_pushed_student_is_another_one(pushed):
    facts, hub, folder = pushed
    assert facts["weights"] and facts["tokenizer"]
    on_hub = hub.repos["me/student"]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert on_hub[name] == (folder / name).read_bytes(), name
    assert b"org/texts" in on_hub["README.md"]


def test_the_objective_or_other_state_lies_beside_the_student(pushed):
    _, hub, _ = pushed
    beside = {name for name in hub.repos["me/student"] if "/" not in name}
    assert not [name for name in beside if re.search("objective|optimizer|scheduler|rng|trainer_state", name)]
    inside = {name.split("/")[1] for name in hub.repos["me/student"] if name.startswith("last-checkpoint/")}
    assert {"distill_objective.safetensors", "trainer_state.json", "model.safetensors"} <= inside
    retried = set(hub.repos["me/a-broken-Hub"])
    assert not [name for name in retried if "/" in name or name == "training_args.bin"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_upload_is_unnamed_or_cannot_be_tried_again(pushed, fault):
    facts, hub, folder = pushed
    assert re.search(FAULTS[fault][2], facts[fault]), facts[fault]
    assert f"hf-distill push {folder} --hub_model_id me/{fault.replace(' ', '-')}" in facts[fault]
    assert (
        hub.repos[f"me/{fault.replace(' ', '-')}"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    )
    assert facts["folder is whole"]


def test_a_folder_without_a_student_is_pushed(tmp_path):
    with pytest.raises(ValueError, match="holds nothing, no saved student"):
        push_run(tmp_path)
    with pytest.raises(ValueError, match="does not exist, no saved student"):
        push_run(tmp_path / "absent")


def test_a_hub_that_is_off_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        HubUploadError, match="was not asked: .*; nothing was lost, the student is in .*hf-distill push"
    ):
        push_run(tmp_path, "a//b")
