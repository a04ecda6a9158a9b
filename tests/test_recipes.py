"""Every recipe and every YAML really runs: same flags, same code, tiny models; two steps, save and reload."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

ROOT = Path(__file__).parent.parent
YAMLS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def recipe(slug: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{slug}", ROOT / "recipes" / f"{slug}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_of(path: Path) -> str:
    command = next(line for line in path.read_text().splitlines() if line.startswith("#   accelerate launch"))
    assert path.relative_to(ROOT).as_posix() in command, f"{path.name}: its command names another file"
    return command.split("recipes/")[2].split(".py")[0]


def reloads(folder: Path) -> None:
    kind = (
        json.loads((folder / "config.json").read_text())["architectures"][0]
        if (folder / "config.json").exists()
        else ""
    )
    if "Classification" in kind:
        return classifies(folder, "image" if "Image" in kind else "text")
    if "ConditionalGeneration" in kind:
        return describes(folder)
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def describes(folder: Path) -> None:
    """The saved vision-language student answers a question about a picture."""
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": content}]
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert pipe(chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"] is not None


def classifies(folder: Path, kind: str) -> None:
    """The saved classifier says something of a picture or a text, by the names of its classes."""
    prompt = Image.new("RGB", (40, 30)) if kind == "image" else "range(3) gives 0 1 2"
    names = set(json.loads((folder / "config.json").read_text())["id2label"].values())
    said = pipeline(f"{kind}-classification", model=str(folder), device="cpu")(prompt, top_k=len(names))
    assert {entry["label"] for entry in said} == names


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_configuration_runs_two_steps_saves_and_reloads(path, tmp_path):
    out = tmp_path / "out"
    recipe(recipe_of(path)).main(["--config", str(path), "--tiny", "--output_dir", str(out)])
    reloads(out)
    assert "distilled with" in (out / "README.md").read_text()


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_configuration_says_first_whether_it_was_run_at_full_size(path):
    assert path.read_text().splitlines()[0].startswith(("# Not run at full size yet", "# Run at full size"))


@pytest.mark.parametrize("slug", ["logit_kd", "taid", "fidelity"])
def test_recipe_without_a_model_or_data_runs_the_embedded_default(slug, tmp_path, capsys):
    recipe(slug).main(["--max_steps", "2", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "out")])
    assert "KL(teacher || student)" in capsys.readouterr().out
    reloads(tmp_path / "out")


def rows(n: int) -> list[dict]:
    return [{"text": f"x{i} = {i}\n" * (1 + i % 3)} for i in range(n)]


def test_recipe_takes_a_student_cut_from_the_teacher_and_files_of_the_user(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows(12))))
    teacher = str(ROOT / "hf_distill" / "embedded" / "teacher")
    out = tmp_path / "out"
    argv = ["--teacher_model_name_or_path", teacher, "--student_init", "from_teacher", "--student_layers", "0,3"]
    recipe("logit_kd").main([*argv, "--dataset_name", str(data), "--max_steps", "1", "--output_dir", str(out)])
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_cache_of_made_up_models_is_made_and_a_cache_is_no_model(tmp_path):
    from hf_distill.cli import main

    main(["cache", "--tiny", "--mode", "topk", "--k", "4", "--output_dir", str(tmp_path)])
    cache = str(tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["codec"]["k"] == 4
    argv = ["--teacher_model_name_or_path", cache, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="is a cache of others"):
        recipe("logit_kd").main([*argv, "--tiny"])
    with pytest.raises(ValueError, match="name a model with --teacher_model_name_or_path, got CachedTeacher"):
        recipe("logit_kd").main([*argv, "--student_init", "from_teacher", "--dataset_name", "x"])


def test_data_comes_from_every_kind_of_place(tmp_path):
    import pandas
    from datasets import Dataset

    from hf_distill.recipe import load_data

    frame = pandas.DataFrame(rows(5))
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.json", orient="records")
    Dataset.from_list(rows(5)).save_to_disk(tmp_path / "saved")
    for name in ("a.csv", "a.parquet", "a.json", "saved"):
        found = load_data(str(tmp_path / name))
        found = found["train"] if isinstance(found, dict) else found
        assert [row["text"] for row in found] == [row["text"] for row in rows(5)], name
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, row in enumerate(rows(5)):
        (folder / f"{i}.txt").write_text(row["text"])
    assert [row["text"] for row in load_data(str(folder))["train"]] == [row["text"] for row in rows(5)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher_model_name_or_path", "no/such"], "cannot load the teacher from 'no/such'"),
        (["--dataset_name", "no_such_file.jsonl", "--tiny_teacher"], "no_such_file.jsonl"),
        (["--student_init", "halved", "--dataset_name", "x"], "student_init must be"),
    ],
)
def test_wrong_flags_are_named(argv, message, tmp_path):
    teacher = str(ROOT / "hf_distill" / "embedded" / "teacher")
    if "--tiny_teacher" in argv or "--student_init" in argv:
        argv = [a for a in argv if a != "--tiny_teacher"]
        argv += ["--teacher_model_name_or_path", teacher, "--model_name_or_path", teacher]
    with pytest.raises((ValueError, OSError), match=message):
        recipe("logit_kd").main([*argv, "--output_dir", str(tmp_path)])


def test_a_second_run_into_the_same_folder_is_refused_before_anything_is_loaded_and_can_go_on(tmp_path, capsys):
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2"]
    argv = [*saving, "--output_dir", str(tmp_path / "out")]
    recipe("taid").main([*argv, "--max_steps", "1"])
    with pytest.raises(ValueError, match="holds another run .checkpoint-1.: .*--resume"):
        recipe("taid").main([*argv, "--max_steps", "1", "--teacher_model_name_or_path", "not loaded"])
    recipe("taid").main([*argv, "--max_steps", "2", "--resume"])
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
