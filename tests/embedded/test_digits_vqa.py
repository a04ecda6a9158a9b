"""The embedded questions are true, balanced and split by image; the teacher and students are made as they say."""

from collections import Counter

import pytest
import torch

from hf_distill.embedded import small_vlm
from hf_distill.embedded.digits_vqa import (
    KINDS,
    NAMES,
    caption,
    digit_images,
    digits_captions,
    digits_vqa,
    split_indices,
    texts,
)


@pytest.fixture(scope="module")
def questions():
    return digits_vqa("train")


def test_an_answer_is_false(questions):
    for prompt, completion, kind, digit in zip(
        *(questions[name] for name in ("prompt", "completion", "kind", "digit")), strict=True
    ):
        question, answer = prompt[0]["content"].split(), completion[0]["content"]
        if kind == "digit":
            truth = NAMES[digit]
        elif kind == "even":
            truth = "no" if digit % 2 else "yes"
        elif kind == "is":
            truth = "yes" if question[3] == NAMES[digit] else "no"
        else:
            truth = "yes" if digit > NAMES.index(question[4]) else "no"
        assert answer == truth


def test_yes_is_likelier_than_no_or_follows_from_the_question(questions):
    for kind in KINDS[1:]:
        counts = Counter(
            c[0]["content"] for c, k in zip(questions["completion"], questions["kind"], strict=True) if k == kind
        )
        assert abs(counts["yes"] / counts.total() - 0.5) < 0.03, kind


def test_splits_share_images():
    train, validation = split_indices("train"), split_indices("validation")
    assert not set(train) & set(validation) and sorted(train + validation) == list(range(1797))
    assert split_indices("train", seed=1) != train
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        split_indices("test")


def test_kinds_change_the_questions_of_other_kinds(questions):
    some = digits_vqa("train", kinds=("is",))
    asked = {kind: Counter() for kind in KINDS}
    for row in questions.remove_columns("image"):
        asked[row["kind"]][row["prompt"][0]["content"], row["digit"]] += 1
    assert Counter((r["prompt"][0]["content"], r["digit"]) for r in some.remove_columns("image")) == asked["is"]
    with pytest.raises(ValueError, match="kinds must be some of"):
        digits_vqa("train", kinds=("odd",))


def test_an_image_is_another_digits():
    images = digit_images()
    rows = digits_captions("validation")
    for row, i in zip(rows.select(range(20)), split_indices("validation"), strict=False):
        assert row["image"].tobytes() == images[i][0].tobytes()
        assert row["completion"][0]["content"] == caption(images[i][1])


def test_a_word_is_unknown_or_the_template_loses_the_answer():
    tokenizer = small_vlm.word_tokenizer(texts())
    for text in texts():
        assert small_vlm.UNKNOWN not in tokenizer.decode(tokenizer(text)["input_ids"])
    row = digits_captions("validation")[0]
    chat = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], return_assistant_tokens_mask=True, return_dict=True
    )
    answered = [i for i, own in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(answered) == row["completion"][0]["content"] + " <end>"


def test_a_second_call_trains_another_teacher_and_a_student_has_another_tower(tmp_path):
    data = digits_vqa("train").select(range(32))
    make = lambda: small_vlm.trained_teacher(  # noqa: E731
        str(tmp_path / "teacher"), texts(), data, pixels=16, patch=8, steps=2, width=32
    )
    (teacher, processor), (again, _) = make(), make()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), again.parameters(), strict=True))
    student = small_vlm.small_student(teacher, processor, data, seed=3, width=32, layers=2, steps=2)
    towers = [model.model.vision_tower.parameters() for model in (teacher, student)]
    assert all(torch.equal(a, b) for a, b in zip(*towers, strict=True))
    other = small_vlm.small_student(teacher, processor, data, seed=4, width=32, layers=2, steps=2)
    assert not torch.equal(student.lm_head.weight, other.lm_head.weight)


def test_a_constant_batch_is_not_learnt():
    data = digits_vqa("train", kinds=("even",)).select(range(8))
    tokenizer = small_vlm.word_tokenizer(texts())
    model = small_vlm.language_model(tokenizer, 32, layers=1, feed_forward=32)
    batch = small_vlm.text_batch(tokenizer, data)
    before = model(**batch).loss.item()
    small_vlm.train(model, batch, steps=30, learning_rate=1e-2, batch_size=8)
    assert model(**batch).loss.item() < 0.5 * before and not model.training
