"""The pages' snippets run, in their order, on tiny stand-ins for what they name; links lead somewhere."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import hf_distill
from hf_distill.cli import main, paper_table
from hf_distill.methods import cards
from hf_distill.recipe import EMBEDDED
from hf_distill.tiny import made_up_rows, tiny_model
from tests.teachers.local_endpoint import local_endpoint

DOCS = Path(__file__).parents[1] / "docs"
IDS = {
    "Qwen/Qwen2.5-0.5B-Instruct": "student",
    "Qwen/Qwen2.5-7B-Instruct": "teacher",
    "Qwen/Qwen2.5-Coder-7B-Instruct": "coder",
    "HuggingFaceH4/ultrachat_200k": "ultrachat",
}
QUICK = dict(use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=2, report_to="none", disable_tqdm=True)
QUICK |= dict(save_strategy="no", gradient_checkpointing=False)


def blocks(page: str) -> list[tuple[str, int, str]]:
    """(language, line, text) of the page's fenced blocks."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(python|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(m[1], text.count("\n", 0, m.start(2)), m[2]) for m in found]


@pytest.fixture
def world(tmp_path, monkeypatch) -> dict:
    """Tiny models and data under the names of the page, in the folder where it runs; its other variables."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    for seed, name in enumerate(("student", "teacher", "coder")):
        tiny_model("qwen2", len(tokenizer), tokenizer, seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    rows = made_up_rows()
    DatasetDict({"train_sft": rows}).save_to_disk("ultrachat")
    for name, width in (("small", 8), ("large", 16)):
        torch.manual_seed(width)
        sizes = dict(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2)
        BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **sizes)).save_pretrained(name)
    asked = [
        {"prompt": f"range({i})?", "completion": f" It gives {i} numbers.", "hint": "Count them."} for i in range(4)
    ]
    pairs = [{"prompt": f"range({i})?", "chosen": f" {i} numbers.", "rejected": " None at all."} for i in range(4)]
    reviews = [{"input_ids": [1 + i, 2, 3 + i % 5], "labels": i % 3} for i in range(8)]
    return {
        "load_ultrachat": lambda: rows,
        "QUICK": QUICK,
        "questions": Dataset.from_list(asked),
        "pairs": Dataset.from_list(pairs),
        "reviews": Dataset.from_list(reviews),
        "small_classifier": "small",
        "large_classifier": "large",
        "__name__": "page",
    }


def on_stand_ins(text: str) -> str:
    text = text.replace('load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft")', "load_ultrachat()")
    for name, folder in IDS.items():
        text = text.replace(name, folder)
    return re.sub(r'Config\(output_dir="', 'Config(**QUICK, output_dir="', text)


def test_a_snippet_about_teachers_does_not_run(world):
    for language, line, text in blocks("teachers.md"):
        text = on_stand_ins(text)
        if language == "bash":
            program, *arguments = shlex.split(text.replace("\\\n", " "))
            assert program == "hf-distill", f"line {line}: {program}"
            main(arguments)
        else:  # as many lines before it as on the page, so that a traceback names the page's line
            exec(compile("\n" * line + text, str(DOCS / "teachers.md"), "exec"), world)
    assert Path("runs/averaged/model.safetensors").is_file() and Path("texts/teacher.json").is_file()


def test_a_snippet_about_written_texts_does_not_run(world):
    ((_, line, text),) = [block for block in blocks("on_policy.md") if block[0] == "python"]
    exec(compile("\n" * line + on_stand_ins(text), str(DOCS / "on_policy.md"), "exec"), world)
    assert world["trainer"].state.global_step == 1


def test_the_snippet_across_tokenizers_does_not_run(world):
    ((_, line, text),) = [block for block in blocks("cross_tokenizer.md") if block[0] == "python"]
    exec(compile("\n" * line + on_stand_ins(text), str(DOCS / "cross_tokenizer.md"), "exec"), world)
    assert Path("runs/uld/model.safetensors").is_file()


def test_a_snippet_about_remote_teachers_does_not_run(world):
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    with local_endpoint(AutoModelForCausalLM.from_pretrained("teacher"), tokenizer, name="teacher") as server:
        for language, line, text in blocks("remote_teachers.md"):
            text = on_stand_ins(text).replace("http://localhost:8000", server.url)
            if language == "bash":
                program, *arguments = shlex.split(text.replace("\\\n", " "))
                assert program == "hf-distill", f"line {line}: {program}"
                main(arguments)
            else:
                exec(compile("\n" * line + text, str(DOCS / "remote_teachers.md"), "exec"), world)
    assert hf_distill.CachedTeacher("caches/served").codec.k == 16
    assert world["trainer"].state.global_step == 1 and len(world["answers"]) == 4


def test_a_teacher_is_missing_from_its_page():
    text = (DOCS / "teachers.md").read_text(encoding="utf-8")
    kinds = [n for n in hf_distill.teachers.__all__ if n.endswith("Teacher") and n not in ("Teacher", "TextTeacher")]
    assert len(kinds) > 8 and not [name for name in kinds if name not in text]


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_a_link_leads_nowhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{page}: {target}"
        elif not target.startswith("http"):
            assert (DOCS / target.split("#")[0]).exists(), f"{page}: {target}"


def test_a_snippet_about_sparse_students_does_not_run(world, capsys):
    settings = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    SiglipVisionModel(SiglipVisionConfig(**settings, image_size=8, patch_size=4)).save_pretrained("siglip")
    SiglipImageProcessorPil().save_pretrained("siglip")
    variables: dict = {}
    for language, line, text in blocks("vision_language.md"):
        if language == "python":
            text = on_stand_ins(text).replace("google/siglip-base-patch16-224", "siglip")
            exec(compile("\n" * line + text, str(DOCS / "vision_language.md"), "exec"), variables)
    count = variables["activated_parameters"](variables["sparse"])
    assert count.activated < count.total and str(count.activated) in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_a_page_names_a_recipe_or_configuration_that_is_not_there(page):
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    for name in re.findall(r"(?:recipes|benchmarks|examples)/[\w/.-]+\.(?:py|yaml)", text):
        assert (DOCS.parent / name).is_file(), f"{page}: {name}"


PAGES = ["../README.md", "quickstart.md", "recipes_by_job.md", "memory.md", "classification.md", "vision_language.md"]
RUN_ELSEWHERE = ("pip", "make", "python -m benchmarks", "python examples/")
YAMLS = {f"recipes/configs/{path.name}" for path in (DOCS.parent / "recipes" / "configs").glob("*.yaml")}


def commands(page: str) -> list[list[str]]:
    """Words of each command of a page's bash blocks, comments left out."""
    lines = [
        line
        for language, _, text in blocks(page)
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if "..." not in line and (words := shlex.split(line, comments=True))]


def is_tested_elsewhere(words: list[str]) -> bool:
    """Every configuration, every recipe without flags, builds and examples have tests of their own."""
    configured = [word for before, word in zip(words, words[1:], strict=False) if before == "--config"]
    without_flags = words[-1] == "recipes/llava_mod.py"
    return " ".join(words).startswith(RUN_ELSEWHERE) or without_flags or any(name in YAMLS for name in configured)


@pytest.mark.parametrize("page", PAGES)
def test_a_command_of_a_page_does_not_run(page, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hf_distill.hub.push.push_run",
        lambda run, *a, **k: pushed.append(run) or type("Done", (), {"commit_url": "there"}),
    )
    for words in commands(page):
        words = [word for word in words if "=" not in word or word.startswith("--")]  # settings of the environment
        if is_tested_elsewhere(words):
            continue
        if words[0] == "hf-distill":
            tiny = ["--tiny"] if words[1] in ("cache", "evaluate") else []
            main([*words[1:], *tiny])
            continue
        script = next(word for word in words if word.endswith(".py"))
        flags = words[words.index(script) + 1 :]
        spec = importlib.util.spec_from_file_location("documented", DOCS.parent / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        shutil.rmtree("runs/student", ignore_errors=True)
        given = [] if "--output_dir" in flags else ["--output_dir", "runs/student"]
        module.main([*flags, *given, "--tiny"])
    assert pushed == (["runs/student"] if page == "quickstart.md" else [])


def test_a_build_target_of_a_page_is_not_there():
    targets = set(re.findall(r"^([\w-]+):", (DOCS.parent / "Makefile").read_text(), re.MULTILINE))
    asked = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert asked and asked <= targets


def test_the_index_of_papers_is_not_that_of_the_cards():
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    assert paper_table([card for card in cards() if not card.module]) in text


@pytest.mark.parametrize("page", ["quickstart.md", "objectives.md", "callbacks.md"])
def test_a_snippet_of_a_page_does_not_run(page, world):
    for language, line, text in blocks(page):
        if language == "python":
            text = on_stand_ins(text)
            exec(compile("\n" * line + text, str(DOCS / page), "exec"), world)


def test_a_message_of_troubleshooting_is_not_ours():
    source = "".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(hf_distill.__file__).parent.rglob("*.py"))
    )
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 15 and not [m for m in messages if m not in source]
