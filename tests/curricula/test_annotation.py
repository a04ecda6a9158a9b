"""Annotation: every picture asked once, killed or not, by whichever process; answers that mean what they say."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from hf_distill.curricula import annotation
from hf_distill.curricula.annotation import (
    annotate,
    generate_questions,
    parse_questions,
    question_prompt,
    selection_prompt,
    templated_answers,
    vlm_judge,
)
from hf_distill.teachers.text import TextTeacher

QUESTIONS = ["Is it dark?", "Is it light?"]


def pictures(n: int = 5) -> Dataset:
    images = [Pillow.new("L", (2, 2), 40 * i) for i in range(n)]
    features = Features({"image": Image(), "labels": ClassLabel(names=["a", "b"]), "name": Value("string")})
    columns = {"image": images, "labels": [i % 2 for i in range(n)], "name": [f"p{i}" for i in range(n)]}
    return Dataset.from_dict(columns, features=features)


class Judge:
    """P(dark) from the picture itself; dies before a picture if told so."""

    def __init__(self, dies_at: int | None = None):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, images, questions):
        values = [image.getpixel((0, 0)) / 255 for image in images]
        if self.dies_at is not None and len(self.asked) >= self.dies_at:
            raise KeyboardInterrupt
        self.asked += list(zip(values, questions, strict=True))
        return torch.tensor([v if q == QUESTIONS[1] else 1 - v for v, q in zip(values, questions, strict=True)])


EXPECTED = [[1 - 40 * i / 255, 40 * i / 255] for i in range(5)]


# ---- answers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_answers_belong_to_other_pictures_or_questions(tmp_path, at_once):
    judge = Judge()
    data = annotate(pictures(), QUESTIONS, judge, tmp_path, images_per_call=at_once)
    torch.testing.assert_close(torch.tensor(data["aspect_probs"][:]), torch.tensor(EXPECTED))
    assert len(judge.asked) == 10 and data.column_names[-1] == "aspect_probs"


def test_a_killed_annotation_starts_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        annotate(pictures(), QUESTIONS, Judge(dies_at=4), tmp_path, id_column="name")
    with open(tmp_path / "aspects-00000.jsonl", "ab") as file:
        file.write(b'{"id": "p2", "pro')  # the kill came in the middle of a line
    judge = Judge()
    order = [4, 2, 0, 1, 3]
    data = annotate(pictures().select(order), QUESTIONS, judge, tmp_path, id_column="name")
    assert len(judge.asked) == 6
    torch.testing.assert_close(torch.tensor(data["aspect_probs"][:]), torch.tensor(EXPECTED)[order])
    again = Judge()
    annotate(pictures(), QUESTIONS, again, tmp_path, id_column="name")
    assert not again.asked
    assert len([json.loads(line) for line in open(tmp_path / "aspects-00000.jsonl")]) == 5


class Rank:
    """One of two processes, alone in its test."""

    num_processes = 2

    def __init__(self, process_index: int):
        self.process_index, self.is_main_process = process_index, process_index == 0

    def wait_for_everyone(self) -> None:
        pass


def test_processes_ask_twice_or_leave_out(tmp_path, monkeypatch):
    judges = [Judge(), Judge(), Judge()]
    monkeypatch.setattr(annotation, "PartialState", lambda: Rank(0))
    with pytest.raises(KeyError):  # alone, it has no answers of the other
        annotate(pictures(), QUESTIONS, judges[0], tmp_path)
    assert len(judges[0].asked) == 6  # pictures 0, 2 and 4
    (tmp_path / "aspects-00000.jsonl").rename(tmp_path / "kept")
    monkeypatch.setattr(annotation, "PartialState", lambda: Rank(1))
    with pytest.raises(KeyError):
        annotate(pictures(), QUESTIONS, judges[1], tmp_path)
    assert len(judges[1].asked) == 4
    (tmp_path / "kept").rename(tmp_path / "aspects-00000.jsonl")
    data = annotate(pictures(), QUESTIONS, judges[2], tmp_path)
    assert not judges[2].asked
    torch.testing.assert_close(torch.tensor(data["aspect_probs"][:]), torch.tensor(EXPECTED))


def test_another_s_answers_are_taken(tmp_path):
    annotate(pictures(), QUESTIONS, Judge(), tmp_path, teacher={"weights": "one", "yes": "Yes"})
    for questions, teacher in (
        (QUESTIONS, {"weights": "two", "yes": "Yes"}),
        (QUESTIONS[::-1], {"weights": "one", "yes": "Yes"}),
    ):
        with pytest.raises(ValueError, match="to other questions or another model's"):
            annotate(pictures(), questions, Judge(), tmp_path, teacher=teacher)


def test_bad_data_is_taken(tmp_path):
    for questions in ([], ["Is it?", "Is it?"]):
        with pytest.raises(ValueError, match="must be different, and at least one"):
            annotate(pictures(), questions, Judge(), tmp_path)
    with pytest.raises(ValueError, match="no column photo among image, labels, name"):
        annotate(pictures(), QUESTIONS, Judge(), tmp_path, image_column="photo")
    with pytest.raises(ValueError, match="'labels' repeat"):
        annotate(pictures(), QUESTIONS, Judge(), tmp_path, id_column="labels")
    for answer in (torch.ones(3), torch.tensor([0.5, 1.5]), torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match="must give 2 probabilities"):
            annotate(pictures(), QUESTIONS, lambda images, questions, answer=answer: answer, tmp_path)


def test_a_transform_or_a_format_is_lost(tmp_path):
    data = pictures().with_transform(
        lambda batch: {k: v for k, v in batch.items()} | {"seen": [1] * len(batch["labels"])}
    )
    table = {"Is it a?": ["a"], "Is it either?": ["a", "b"]}
    done = templated_answers(data, table, ["a", "b"])
    assert done[1]["aspect_probs"] == [0.0, 1.0] and done[0]["aspect_probs"] == [1.0, 1.0] and done[0]["seen"] == 1
    formatted = templated_answers(pictures().select_columns(["labels"]).with_format("torch"), table, ["a", "b"])
    assert torch.equal(formatted[0]["aspect_probs"], torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="no such classes: c; the data set has a, b"):
        templated_answers(pictures(), {"Is it c?": ["c"]}, ["a", "b"])


class Asked(TextTeacher):
    """Keeps what it is asked."""

    def __init__(self, template):
        super().__init__()
        self.processor = type("Processor", (), {"chat_template": template})()
        self.prompts = None

    tokenizer = property(lambda self: self.processor)

    def fingerprint(self):
        return {}

    def label_log_probs(self, prompts, labels, *, images=None, normalize=False):
        self.prompts, self.labels, self.images, self.normalised = prompts, labels, images, normalize
        return torch.tensor([[0.25, 0.75]] * len(prompts)).log()


def test_the_model_is_asked_something_else():
    chats, plain = Asked("a template"), Asked(None)
    image = Pillow.new("L", (2, 2))
    assert vlm_judge(chats)([image], QUESTIONS[:1]).tolist() == pytest.approx([0.25])
    content = [{"type": "image"}, {"type": "text", "text": "Is it dark? Answer Yes or No."}]
    assert chats.prompts == [[{"role": "user", "content": content}]] and chats.images == [image]
    assert chats.labels == ["Yes", "No"] and chats.normalised
    vlm_judge(plain, yes=" yes", no=" no", suffix="")([image], QUESTIONS[:1])
    assert plain.prompts == ["<image>\nIs it dark?"] and plain.labels == [" yes", " no"]


# ---- questions -------------------------------------------------------------------------------------------------------
def test_lines_are_taken_for_questions_that_are_none():
    lines = ["Sure:", "1. Is it red?", " 2) **Has it wings?**", '- "Is it round?"', "* is it RED?", "10: Does 3D fit?"]
    text = "\n".join([*lines, "Thank you."])
    assert parse_questions(text) == ["Is it red?", "Has it wings?", "Is it round?", "Does 3D fit?"]


def test_questions_are_not_written_and_chosen():
    asked = []

    def generate(prompt: str) -> str:
        asked.append(prompt)
        count = 6 if len(asked) == 1 else 3
        return "\n".join(f"{i}. Is it {i}?" for i in range(count))

    names = ["ant", "bee"]
    assert generate_questions(generate, names, 70, 3) == ["Is it 0?", "Is it 1?", "Is it 2?"]
    written = [f"Is it {i}?" for i in range(6)]
    assert asked == [question_prompt(names, 70, 6), selection_prompt(written, names, 3)]
    assert "2 classes: ant, bee" in asked[0] and "70 images" in asked[0] and "6. Is it 5?" in asked[1]
    with pytest.raises(ValueError, match="(?s)at least 3 questions, the model gave 1.*Is it so"):
        generate_questions(lambda prompt: "Is it so?", names, 70, 3)
