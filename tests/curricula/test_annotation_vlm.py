"""Annotation by a vision-language model, as the recipe runs it: a tiny LLaVA, pictures and questions in a file."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_from_disk
from PIL import Image as Picture

from hf_distill.curricula.annotation import SUFFIX
from hf_distill.testing.vlm import TinyVLM

ROOT = Path(__file__).parents[2]
QUESTIONS = ["w3 w4 w5", "w7"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the model, the pictures and the questions."""
    folder = tmp_path_factory.mktemp("annotation")
    setup = TinyVLM()
    setup.teacher().save_pretrained(folder / "vlm")
    setup.processing_class().save_pretrained(folder / "vlm")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, setup.size, setup.size, 3), generator=draw, dtype=torch.uint8).numpy()
    rows = {"image": [Picture.fromarray(p) for p in pixels], "label": [0, 1, 0, 1, 1]}
    features = Features({"image": Image(), "label": ClassLabel(names=["w8", "w9"])})
    DatasetDict({"train": Dataset.from_dict(rows, features=features)}).save_to_disk(folder / "data")
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    return folder


def annotate(world, output) -> Dataset:
    spec = importlib.util.spec_from_file_location("annotate_recipe", ROOT / "recipes" / "multi_aspect_annotate.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    flags = {"dataset_name": world / "data", "vlm_name": world / "vlm", "question_file": world / "questions.txt"}
    flags |= {"output_dir": output, "yes_token": "w1", "no_token": "w2", "batch_size": 3}
    recipe.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    return load_from_disk(str(output / "data"))["train"]


def test_the_answers_are_not_the_model_s_own(world, tmp_path):
    data = annotate(world, tmp_path)
    assert data.column_names == ["image", "label", "aspect_probs"]
    setup, model, processor = TinyVLM(), TinyVLM().teacher().eval(), TinyVLM().processing_class()
    words = setup.words.index("w1"), setup.words.index("w2")
    for row in data:
        for question, ours in zip(QUESTIONS, row["aspect_probs"], strict=True):
            parts = [{"type": "image"}, {"type": "text", "text": f"{question} {SUFFIX}".strip()}]
            text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
            inputs = processor(text=[text], images=[[row["image"]]], return_tensors="pt")
            with torch.no_grad():
                yes, no = model(**inputs).logits[0, -1, list(words)].tolist()
            assert ours == pytest.approx(torch.tensor([yes, no]).softmax(0)[0].item(), abs=1e-5)
    answers = torch.tensor(data["aspect_probs"])
    assert answers.std(0).min() > 1e-4, "every picture gets the same answers: it does not see them"


def test_a_second_run_asks_again_or_the_questions_are_lost(world, tmp_path):
    first = annotate(world, tmp_path)["aspect_probs"]
    kept = {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    assert annotate(world, tmp_path)["aspect_probs"] == first
    assert kept == {path: path.read_bytes() for path in (tmp_path / "answers").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "card.json").read_text())["questions"] == QUESTIONS
