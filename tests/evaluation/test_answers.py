"""Answers, their likelihoods and rewards against loops over rows without padding or batches."""

import pytest
import torch
from datasets import Dataset

from hf_distill.embedded import digits_vqa, small_vlm
from hf_distill.evaluation.answers import (
    answer_log_probs,
    choose_answers,
    evaluate_pairs,
    evaluate_vlm,
    exact_match,
    generate_answers,
    normalised,
    prompt_inputs,
    reward_statistics,
    score_answers,
)
from hf_distill.evaluation.speed import tokens_per_second


def tiny_vlm(seed: int):
    tokenizer = small_vlm.word_tokenizer(digits_vqa.texts())
    language = small_vlm.language_model(tokenizer, 32, layers=2, feed_forward=32, seed=seed)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.mul_(4)  # so that answers differ between images
    tower = small_vlm.vision_tower(16, 8, width=32, layers=1, seed=seed)
    return small_vlm.small_vlm(tower, language, tokenizer, small_vlm.square_images(16), seed)


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm(0)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Questions and captions, so that prompts and answers differ in length."""
    asked = digits_vqa.digits_vqa("validation").select(range(7)).remove_columns("digit")
    said = digits_vqa.digits_captions("validation").select(range(2)).remove_columns("digit")
    return Dataset.from_list([*asked, *said])


def test_normalising_keeps_case_punctuation_or_articles():
    assert normalised(" The  Cat's hat! ") == normalised("cat s hat") == "cat s hat"
    assert exact_match(["A dog.", "cat"], ["dog", "dog"]) == 0.5
    with pytest.raises(ValueError, match="one answer per reference is needed, got 1 and 2"):
        exact_match(["a"], ["a", "b"])


def test_generated_answers_depend_on_padding_or_batches(vlm, rows):
    model, processor = vlm
    alone = []
    for row in rows:
        inputs = prompt_inputs(processor, [row])
        made = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        alone.append(processor.decode(made, skip_special_tokens=True).strip())
    assert generate_answers(model, processor, rows, batch_size=4, max_new_tokens=4) == alone
    assert len(set(alone)) > 1


def test_log_probs_differ_from_a_loop_over_tokens(vlm, rows):
    model, processor = vlm
    ours = answer_log_probs(model, processor, rows, batch_size=4)
    for i, row in enumerate(rows):
        inputs = prompt_inputs(processor, [row])
        text = row["completion"][0]["content"] + "<end>"
        answer = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            log_probs = model(**inputs).logits[0].log_softmax(-1)
        expected = sum(log_probs[start + j - 1, token] for j, token in enumerate(answer[0].tolist()))
        torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-4)


def test_the_likeliest_candidate_is_not_chosen(vlm, rows):
    model, processor = vlm
    yes = rows.remove_columns("completion").add_column("completion", [[{"role": "assistant", "content": "yes"}]] * 9)
    no = rows.remove_columns("completion").add_column("completion", [[{"role": "assistant", "content": "no"}]] * 9)
    more = answer_log_probs(model, processor, yes) > answer_log_probs(model, processor, no)
    assert choose_answers(model, processor, rows, ["yes", "no"]) == ["yes" if y else "no" for y in more]


def test_rewards_differ_from_counts_made_by_hand():
    # margins 0.1 * ((-1 + 2) - (-3 + 3)) = 0.1, 0.1 * ((-2 + 1) - (-1 + 2)) = -0.2, a tie
    stats = reward_statistics(
        *map(torch.tensor, ([-1.0, -2.0, 0.0], [-3.0, -1.0, 0.0], [-2.0, -1.0, 0.0], [-3.0, -2.0, 0.0]))
    )
    assert stats["reward_accuracy"] == pytest.approx(1 / 3)
    assert stats["reward_margin"] == pytest.approx(-0.1 / 3)


def test_a_student_that_is_its_own_reference_has_a_margin(vlm, rows):
    model, processor = vlm
    pairs = rows.rename_column("completion", "chosen")
    pairs = pairs.add_column("rejected", [[{"role": "assistant", "content": "even odd"}]] * len(rows))
    assert evaluate_pairs(model, model, processor, pairs) == {"reward_accuracy": 0.0, "reward_margin": 0.0}
    other = evaluate_pairs(model, tiny_vlm(1)[0], processor, pairs)
    assert abs(other["reward_margin"]) > 1e-3


def test_scores_count_rows_of_another_kind():
    answers, references = ["yes", "no", "yes", "three"], ["no", "no", "yes", "four"]
    scores = score_answers(answers, references, ["is", "is", "even", "digit"], "is")
    assert scores["accuracy"] == 0.5 and scores["accuracy/even"] == 1 and scores["accuracy/is"] == 0.5
    assert scores["pope/hallucination_rate"] == 0.5  # of two absent objects one is said to be there
    assert score_answers(answers, references, [None] * 4)["pope/accuracy"] == pytest.approx(2 / 3)
    assert "pope/accuracy" not in score_answers(["a"], ["b"], [None])


def test_evaluation_leaves_the_model_in_another_mode(vlm, rows):
    model, processor = vlm
    model.train()
    scores = evaluate_vlm(model, processor, rows, max_new_tokens=2)
    assert model.training and {"accuracy", "accuracy/caption"} <= scores.keys()
    model.eval()


def test_speed_is_not_per_model(vlm, rows):
    model, processor = vlm
    inputs = prompt_inputs(processor, [dict(rows[0]), dict(rows[1])])
    found = tokens_per_second({"one": model, "two": tiny_vlm(1)[0]}, inputs, new_tokens=2, rounds=1)
    assert found.keys() == {"one", "two"} and all(value > 0 for own in found.values() for value in own.values())
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        tokens_per_second({}, inputs, new_tokens=0)
