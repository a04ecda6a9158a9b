import json
import math
import sys
import types

import pytest
from datasets import Dataset, DatasetDict

from hf_distill.cli import main
from hf_distill.testing import SETUPS, TinyImage, TinySequence
from hf_distill.testing.setups import picture_of
from tests.helpers import tiny_llama, tiny_tokenizer
from tests.launching import run_worker


@pytest.mark.parametrize("task", ["language", "vlm", "image", "text"])
def test_a_student_is_not_measured_beside_its_teacher(task, tmp_path, capsys):
    flags = ["--task", task, "--tiny", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    vlm = ["--teacher_model_name_or_path", "llava-hf/llava-interleave-qwen", "--model_name_or_path", "Qwen/Qwen2.5"]
    vlm += ["--vision_tower_name_or_path", "google/siglip", "--dataset_name", "x", "--generate", "--answer_tokens", "2"]
    main(["evaluate", *flags, *(vlm if task == "vlm" else [])])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    own = {"cross_entropy", "teacher_kl", "agreement", "ece", "parameters", "teacher_parameters", "times_smaller"}
    own |= {"student_memory_bytes", "teacher_memory_bytes", "times_less_memory", "times_faster"}
    assert own <= found.keys() and all(math.isfinite(value) for value in found.values())
    more = {"language": {"student_tokens_per_second_read"}, "vlm": {"exact_match", "teacher_exact_match"}}
    assert more.get(task, {"accuracy", "macro_f1", "student_forward_ms"}) <= found.keys()
    assert found["student_memory_bytes"] > found["weight_bytes"]
    assert (tmp_path / "reliability.png").stat().st_size > 3000
    assert "KL(teacher || student)" in capsys.readouterr().out or task != "language"


def test_a_task_that_there_is_not_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match="--task must be one of language, vlm, image, text, got 'audio'"):
        main(["evaluate", "--task", "audio"])


# ---- batches and ranks ----------------------------------------------------------------------------------------------
QUESTIONS = [(f"w{i} w{i + 3}" + " w7" * (i % 4), f"w{(5 * i) % 60} w2" + " w9" * (i % 3)) for i in range(7)]


def models_and_data(folder) -> None:
    """A pair and seven rows for each task, saved."""
    sets = {"language": Dataset.from_list([{"prompt": q, "completion": f" {a}"} for q, a in QUESTIONS])}
    pair = {"language": (tiny_llama(seed=1), tiny_llama(32, 3, seed=2), tiny_tokenizer())}
    image, text = TinyImage(), TinySequence()
    vlm = SETUPS["distill", "vision-language"]
    for task, setup in (("image", image), ("text", text), ("vlm", vlm)):
        pair[task] = (setup.student(), setup.teacher(), setup.processing_class())
    pictures = [picture_of([[[(i * 9 + x * y) % 256] * 3 for x in range(8)] for y in range(8)]) for i in range(7)]
    sets["image"] = Dataset.from_dict({"image": pictures, "label": [image.labels[i % 5] for i in range(7)]})
    texts = [question for question, _ in QUESTIONS]
    sets["text"] = Dataset.from_dict({"text": texts, "label": [text.labels[i % 3] for i in range(7)]})
    sets["vlm"] = vlm.dataset(7)
    for task, (student, teacher, processing_class) in pair.items():
        for name, model in (("student", student), ("teacher", teacher)):
            model.save_pretrained(folder / task / name)
            processing_class.save_pretrained(folder / task / name)
        DatasetDict({"train": sets[task], "test": sets[task]}).save_to_disk(folder / task / "data")


def test_numbers_depend_on_batches_or_ranks(tmp_path):
    from tests import evaluate_worker

    models_and_data(tmp_path)
    here = evaluate_worker.run(tmp_path, [1, 3, 8])
    said = run_worker("tests/evaluate_worker.py", tmp_path, "3", ranks=2)
    there = json.loads(next(line for line in said.splitlines() if line.startswith("FOUND "))[6:])
    assert set(there) == {f"{task} 3" for task in evaluate_worker.FLAGS}
    for task in evaluate_worker.FLAGS:
        reference = here[f"{task} 1"]
        assert "exact_match" in reference or task in ("image", "text")
        assert "fidelity agreement" in reference or task == "vlm"
        for other in (here[f"{task} 3"], here[f"{task} 8"], there[f"{task} 3"]):
            assert other == pytest.approx(reference, abs=1e-6, rel=1e-6)


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models_and_data(folder)
    return folder


def flags_of(folder, task: str, tmp_path, *more: str, student: str = "student") -> list[str]:
    named = {"model": student, "teacher_model": "teacher"}
    flags = [word for name, own in named.items() for word in (f"--{name}_name_or_path", str(folder / task / own))]
    out = ["--dataset_name", str(folder / task / "data"), "--output_dir", str(tmp_path / "out"), "--speed_rows", "0"]
    return ["evaluate", "--task", task, *flags, *out, "--use_cpu", "true", "--disable_tqdm", "true", *more]


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_other_classes_than_the_datasets_are_evaluated(who, saved, tmp_path):
    other = TinyImage()
    other.labels = ("ant", "bee", "cow", "dog", "eel")
    model, folder = getattr(other, who)(), saved / "image" / f"other-{who}"
    model.save_pretrained(folder)
    other.processing_class().save_pretrained(folder)
    flags = flags_of(saved, "image", tmp_path)
    flags[flags.index(str(saved / "image" / who))] = str(folder)
    with pytest.raises(ValueError, match=f"classes and the {who}'s have different names.*ant, bee, cow"):
        main(flags)


@pytest.mark.parametrize("task", ["language", "image", "text", "vlm"])
def test_an_empty_set_is_evaluated(task, saved, tmp_path, monkeypatch):
    from hf_distill import recipe, recipe_classification, recipe_vlm

    whole = recipe.splits
    for module in (recipe, recipe_classification, recipe_vlm):
        monkeypatch.setattr(module, "splits", lambda *given: (whole(*given)[0], whole(*given)[1].select([])))
    with pytest.raises(ValueError, match="the evaluation set is empty: check --dataset_test_split"):
        main(flags_of(saved, task, tmp_path))


def test_an_empty_split_that_was_saved_is_an_index_error(saved, tmp_path):
    data = DatasetDict.load_from_disk(saved / "language" / "data")
    data["test"] = data["test"].select([])
    data.save_to_disk(tmp_path / "data")
    flags = flags_of(saved, "language", tmp_path)
    flags[flags.index("--dataset_name") + 1] = str(tmp_path / "data")
    with pytest.raises(ValueError, match="an empty split"):
        main(flags)


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("language", ["--answer_extractor", "numbers"], "answer_extractor must be number, letter, exact or package"),
        ("language", ["--generate", "--answer_extractor", "letter"], "no answer was found in the reference ' w0 w2'"),
        ("language", ["--control_model_name_or_path", "x"], "add --fidelity"),
        ("language", ["--topk", "0"], "topk must hold numbers of at least 1"),
        ("language", ["--answer_tokens", "0"], "answer_tokens must be at least 1"),
        ("image", ["--generate"], "--generate: for models that write"),
        ("vlm", ["--lm_eval_tasks", "x"], "for language models"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_ignored(task, more, said, saved, tmp_path):
    with pytest.raises(ValueError, match=said):
        main(flags_of(saved, task, tmp_path, *more))


# ---- lm-eval --------------------------------------------------------------------------------------------------------
def test_a_missing_lm_eval_is_not_named(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-distill\[lm-eval\]'"):
        main(flags_of(saved, "language", tmp_path, "--lm_eval_tasks", "arc_easy"))


def test_lm_eval_gets_another_model_or_its_numbers_are_lost(saved, tmp_path, monkeypatch):
    asked = {}

    class Wrapped:
        def __init__(self, pretrained, tokenizer, batch_size):
            asked.update(parameters=pretrained.num_parameters(), tokenizer=tokenizer, batch_size=batch_size)

    class TaskManager:
        def __init__(self, include_path):
            self.all_tasks = ["mine", include_path]

    def simple_evaluate(model, tasks, limit, task_manager):
        asked.update(tasks=tasks, limit=limit)
        return {"results": {"mine": {"alias": "mine", "acc,none": 0.25, "acc_stderr,none": "N/A", "f1,strict": 1.0}}}

    modules = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.models": {}}
    modules |= {"lm_eval.models.huggingface": {"HFLM": Wrapped}, "lm_eval.tasks": {"TaskManager": TaskManager}}
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    more = ["--lm_eval_tasks", "mine", "--lm_eval_limit", "3", "--per_device_eval_batch_size", "5"]
    main(flags_of(saved, "language", tmp_path, *more))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {k: v for k, v in found.items() if k.startswith("lm_eval/")} == {
        "lm_eval/mine/acc": 0.25,
        "lm_eval/mine/f1,strict": 1.0,
    }
    assert asked["parameters"] == tiny_llama().num_parameters() and asked["batch_size"] == 5
    assert asked["tasks"] == ["mine"] and asked["limit"] == 3 and asked["tokenizer"] is not None
    with pytest.raises(ValueError, match="lm-eval knows no task other"):
        main(flags_of(saved, "language", tmp_path / "again", "--lm_eval_tasks", "other"))


# ---- fidelity -------------------------------------------------------------------------------------------------------
def test_a_teacher_that_is_the_student_is_not_imitated_perfectly(saved, tmp_path, capsys):
    control = str(saved / "language" / "student")
    more = ["--fidelity", "--generate", "--answer_tokens", "3", "--control_model_name_or_path", control]
    main(flags_of(saved, "language", tmp_path, *more, student="teacher"))
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    own, other = report["student"], report["control"]
    assert own["agreement"] == own["token_top1_agreement"] == own["top5_overlap"] == own["rationale_bleu"] == 1
    assert own["kl_teacher_student"] == own["tvd"] == 0 and other["kl_teacher_student"] > 0.1
    assert report["improvement"] == own["student_accuracy"] - other["student_accuracy"]
    table = (tmp_path / "out" / "fidelity.md").read_text()
    assert table.startswith("| measure | student | control |") and "| same answer as the teacher | 1.0000 |" in table
    assert table.strip() in capsys.readouterr().out
