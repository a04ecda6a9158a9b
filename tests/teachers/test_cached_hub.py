"""A cache made on the command line, taken by a recipe where a teacher goes, and carried over the Hub."""

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitInfo, DatasetCardData, HfApi, RepoUrl
from safetensors.torch import load_file

from hf_distill import CachedTeacher
from hf_distill.cli import main
from hf_distill.teachers import load_teacher
from tests.helpers import relative_difference, text_dataset, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TRAINING = "--bf16 false --use_cpu --report_to none --max_length 16 --disable_tqdm true".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """teacher/, student/, data.jsonl, and cache/ made by the command."""
    place = tmp_path_factory.mktemp("place")
    for name, model in (("teacher", tiny_llama(32, seed=1)), ("student", tiny_llama(seed=2))):
        model.save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    (place / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text_dataset(24)["text"]))
    main(["cache", *flags(place, place / "teacher"), "--output_dir", str(place / "cache"), "--shard_examples", "10"])
    return place


def flags(place, teacher) -> list[str]:
    data = ["--dataset_name", str(place / "data.jsonl"), "--eval_examples", "6"]
    return ["--teacher_model_name_or_path", str(teacher), *data, *TRAINING]


def trained(place, teacher, out) -> dict:
    spec = importlib.util.spec_from_file_location("recipe_logit_kd", ROOT / "recipes" / "logit_kd.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    run = "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --optim sgd --save_strategy no".split()
    student = ["--model_name_or_path", str(place / "student"), "--output_dir", str(out)]
    recipe.main([*flags(place, teacher), *student, *run])
    return load_file(out / "model.safetensors")


def test_a_recipe_trains_another_student_from_a_cache_of_the_command(place, tmp_path, capsys):
    live = trained(place, place / "teacher", tmp_path / "live")
    tables = [capsys.readouterr().out]
    cached = trained(place, place / "cache", tmp_path / "cached")
    tables.append(capsys.readouterr().out)
    assert relative_difference(cached, live) < 1e-5
    live_table, cached_table = (t[t.index("parameters") : t.index("student saved")] for t in tables)
    assert live_table == cached_table and "KL(teacher || student)" in live_table
    assert CachedTeacher(place / "cache").manifest["data"]["examples"] == 24, "evaluation data are cached too"


def test_the_command_goes_on_or_says_what_is_missing(place, capsys):
    main(["cache", *flags(place, place / "teacher"), "--output_dir", str(place / "cache"), "--shard_examples", "10"])
    assert "24 documents" in (out := capsys.readouterr().out) and "--teacher_model_name_or_path" in out
    with pytest.raises(ValueError, match="--teacher_model_name_or_path and --dataset_name"):
        main(["cache", "--output_dir", str(place / "other")])
    with pytest.raises(ValueError, match="is a cache already"):
        main(["cache", *flags(place, place / "cache"), "--output_dir", str(place / "other")])
    with pytest.raises(SystemExit):
        main(["methods", "--mode", "topk"])


class Hub:
    """Datasets of a Hub that is a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, api, repo_id, repo_type, private, exist_ok):
        assert repo_type == "dataset" and exist_ok
        (self.folder / "me" / repo_id).mkdir(parents=True)
        return RepoUrl(f"https://huggingface.co/datasets/me/{repo_id}")

    def upload_folder(self, api, repo_id, folder_path, repo_type, ignore_patterns, commit_message):
        assert repo_type == "dataset"
        ignored = shutil.ignore_patterns(ignore_patterns)
        shutil.copytree(folder_path, self.folder / repo_id, ignore=ignored, dirs_exist_ok=True)
        return CommitInfo(
            commit_url="https://huggingface.co/datasets/me/answers/commit/0",
            commit_message=commit_message,
            commit_description="",
            oid="0",
        )

    def snapshot_download(self, repo_id, repo_type, revision, token):
        assert repo_type == "dataset"
        return str(self.folder / repo_id)


def test_a_cache_changes_on_its_way_over_the_hub(place, tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    for name in ("create_repo", "upload_folder"):
        call = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *a, call=call, **k: call(api, *a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    own = CachedTeacher(place / "cache")
    assert own.push_to_hub("answers") == "https://huggingface.co/datasets/me/answers/commit/0"
    there = {p.name for p in (tmp_path / "me/answers").iterdir()}
    assert {"README.md", "cache.json"} < there and not any(name.startswith(".") for name in there)
    back = load_teacher("hf://datasets/me/answers")
    assert back.store.keys() == own.store.keys() and back.name == own.name
    for key in own.store.keys():
        assert all(torch.equal(a, b) for a, b in zip(own.store.read(key), back.store.read(key), strict=True))
    card = (place / "cache/README.md").read_text()
    data = DatasetCardData(**huggingface_hub.DatasetCard(card).data.to_dict())
    assert "teacher-cache" in data.tags and "| documents | 24 |" in card and str(place / "teacher") in card


def test_the_command_s_help_shows_what_it_adds(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    assert "--shard_examples" in capsys.readouterr().out
