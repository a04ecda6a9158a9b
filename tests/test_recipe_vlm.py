"""The vision-language recipe: its embedded default, pairs of the student's own, and data as LLaVA writes it."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from hf_distill.embedded import digits_vqa, small_vlm
from hf_distill.methods.llava_mod import LlavaModConfig
from hf_distill.recipe_vlm import VlmSetup, as_chats, last_stage_arguments, own_pairs, parse_vlm
from hf_distill.tiny_vlm import families_of, made_up_pictures


def recipe():
    path = Path(__file__).parent.parent / "recipes" / "llava_mod.py"
    spec = importlib.util.spec_from_file_location("recipe_llava_mod", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_embedded_default_leaves_out_a_stage_or_counts_parameters_once(tmp_path, capsys, monkeypatch):
    few = digits_vqa.digits_vqa("train").select(range(40))
    teacher = str(tmp_path / "teacher")
    options = dict(pixels=digits_vqa.PIXELS, patch=digits_vqa.PATCH, steps=2, width=32)
    small_vlm.trained_teacher(teacher, digits_vqa.texts(), few, **options)
    some = {name: getattr(digits_vqa, name) for name in ("digits_vqa", "digits_captions")}
    for name, made in some.items():
        monkeypatch.setattr(digits_vqa, name, lambda split, made=made: made(split).select(range(40)))
    argv = ["--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
    recipe().main([*argv, "--output_dir", str(tmp_path)])
    lines = {line[:26].strip(): line[26:].split() for line in capsys.readouterr().out.splitlines()}
    stages = ["teacher", "student, untrained", "student, after sparse", "student, after preference"]
    assert all(stage in lines for stage in stages)
    total, activated = (int(cell.replace(",", "")) for cell in lines["student, after sparse"][:2])
    dense = int(lines["student, untrained"][0].replace(",", ""))
    assert dense < activated < total
    assert (tmp_path / "2_sparse" / "expert_load.png").exists()
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "pairs").is_dir()
    with pytest.raises(ValueError, match="holds another run"):
        recipe().main(["--max_steps", "1", "--output_dir", str(tmp_path)])


def test_a_flag_gives_way_to_the_embedded_settings_or_tiny_runs_long(tmp_path):
    embedded = {"dense_max_steps": 300, "dense_learning_rate": 2e-3}
    *_, config = parse_vlm(LlavaModConfig, embedded, "llava_mod", [])
    assert (config.dense_max_steps, config.dense_learning_rate) == (300, 2e-3)
    *_, config = parse_vlm(LlavaModConfig, embedded, "llava_mod", ["--dense_learning_rate", "0.5", "--max_steps", "3"])
    assert (config.dense_max_steps, config.dense_learning_rate) == (-1, 0.5)
    argv = ["--tiny", "--dataset_name", "x", "--dense_max_steps", "9"]
    *_, config = parse_vlm(LlavaModConfig, embedded, "llava_mod", argv)
    assert config.dense_max_steps == -1
    *_, args, _, config = parse_vlm(LlavaModConfig, {"preference_max_steps": 7}, "llava_mod", [])
    last = last_stage_arguments(args, config, "preference")
    assert (last.max_steps, last.learning_rate, args.max_steps) == (7, 2e-6, 150)


def test_conversations_keep_their_placeholder_or_rows_without_a_picture():
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = Dataset.from_list(
        [{"image": Image.new("RGB", (4, 4)), "conversations": said}, {"image": None, "conversations": said}]
    )
    chats = as_chats(rows)
    assert chats["messages"] == [
        [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    ]
    assert chats[0]["image"].size == (4, 4) and "conversations" not in chats.column_names
    pictures = made_up_pictures()
    assert as_chats(pictures)["messages"] == pictures["messages"]


def test_pairs_hold_right_answers_or_are_drawn_again(tmp_path):
    data = digits_vqa.digits_vqa("train").select(range(24))
    teacher, processor = small_vlm.trained_teacher(
        str(tmp_path / "teacher"), digits_vqa.texts(), data, pixels=16, patch=8, steps=2, width=32
    )
    setup = VlmSetup(teacher, None, processor, data)
    pairs = own_pairs(teacher, setup, 16, str(tmp_path / "pairs"))
    assert 0 < len(pairs) <= 16
    assert all(row["chosen"] != row["rejected"] for row in pairs.remove_columns("image"))
    again = own_pairs(None, setup, 16, str(tmp_path / "pairs"))
    assert again["rejected"] == pairs["rejected"]
    with pytest.raises(ValueError, match="give --preference_dataset_name"):
        own_pairs(teacher, replace(setup, train=made_up_pictures()), 16, str(tmp_path / "other"))


def test_an_unknown_family_is_made_up():
    assert families_of("google/siglip-so400m-patch14-384")[0] == "siglip"
    with pytest.raises(ValueError, match="cannot tell the families of 'no/such' offline"):
        families_of("no/such")
