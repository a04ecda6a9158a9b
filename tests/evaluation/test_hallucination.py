"""Hallucination scores against counts made by hand."""

import pytest

from hf_distill.evaluation.hallucination import (
    KINDS,
    chair_scores,
    mentioned_objects,
    object_questions,
    pope_scores,
    yes_no,
)


def test_pope_scores_differ_from_counts_made_by_hand():
    # 5 present, 3 absent: 3 yes right, 1 no wrong, 1 no answer; 2 absent called present, 1 right no
    answers = [True, True, True, False, None, True, True, False]
    present = [True, True, True, True, True, False, False, False]
    scores = pope_scores(answers, present)
    assert scores == {
        "accuracy": 4 / 8,
        "precision": 3 / 5,
        "recall": 3 / 5,
        "f1": pytest.approx(3 / 5),
        "yes_ratio": 5 / 8,
        "hallucination_rate": 2 / 3,
        "unanswered": 1 / 8,
    }


def test_a_model_that_always_says_no_has_no_division_by_zero_and_no_hallucination():
    scores = pope_scores([False, False], [True, False])
    assert (scores["precision"], scores["recall"], scores["f1"], scores["hallucination_rate"]) == (0, 0, 0, 0)
    assert scores["accuracy"] == 0.5


def test_no_answer_about_an_absent_object_counts_as_a_no():
    scores = pope_scores([None, None], [True, False])
    assert (scores["accuracy"], scores["unanswered"], scores["hallucination_rate"]) == (0, 1, 0)


def test_unequal_or_empty_lists_are_scored():
    for answers, present in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match=f"got {len(answers)} answers to {len(present)} questions"):
            pope_scores(answers, present)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True), ("No.", False), ("There is not one", False), ("TRUE", True), ("", None), ("nobody", None),
        ("Yes, there is no doubt", True),
    ],
)  # fmt: skip
def test_answers_are_read_wrongly(text, expected):
    assert yes_no(text) is expected


OBJECTS = [{"dog", "ball"}, {"dog", "ball", "tree"}, {"dog", "tree"}, {"cat"}, {"dog", "ball"}]


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_unbalanced_or_false(kind):
    questions = object_questions(OBJECTS, kind, per_image=2)
    for i, image in enumerate(OBJECTS):
        own = [q for q in questions if q.image == i]
        assert sum(q.present for q in own) == sum(not q.present for q in own) > 0
        assert all((q.object in image) == q.present for q in own)
        assert len({q.object for q in own}) == len(own)


def test_popular_and_adversarial_objects_are_not_the_most_frequent_and_the_most_often_together():
    absent = {kind: [q.object for q in object_questions(OBJECTS, kind, per_image=1) if not q.present] for kind in KINDS}
    # held: dog 4, ball 3, tree 2, cat 1. With {dog, tree} of image 2: ball meets dog 3 times and tree once, cat none
    assert absent["popular"] == ["tree", "cat", "ball", "dog", "tree"]
    assert absent["adversarial"][:3] == ["tree", "cat", "ball"]
    together = [{"a", "b"}, {"a", "b"}, {"a"}, {"c"}, {"c"}, {"c"}]
    third = {kind: [q for q in object_questions(together, kind, 1) if q.image == 2][1].object for kind in KINDS[1:]}
    assert third == {"popular": "c", "adversarial": "b"}


def test_random_questions_do_not_depend_on_the_seed_or_on_other_images_draws():
    few, many = object_questions(OBJECTS, per_image=1), object_questions(OBJECTS, per_image=1, seed=1)
    assert few != many
    assert few == object_questions(OBJECTS, per_image=1)
    with pytest.raises(ValueError, match="kind must be one of random, popular, adversarial, got 'rare'"):
        object_questions(OBJECTS, "rare")


SYNONYMS = {"dog": "dog", "puppy": "dog", "hot dog": "sausage", "dog house": "kennel", "bus": "bus", "cat": "cat"}


def test_mentions_miss_plurals_synonyms_or_longer_names():
    assert mentioned_objects("Two puppys, dogs and a Hot dog beside buses.", SYNONYMS) == [
        "dog",
        "dog",
        "sausage",
        "bus",
    ]
    assert mentioned_objects("a dog house", SYNONYMS) == ["kennel"]
    assert mentioned_objects("a catalogue", SYNONYMS) == []


def test_chair_differs_from_counts_made_by_hand():
    captions = ["a dog, a puppy and a cat", "nothing here", "a bus and a hot dog"]
    scores = chair_scores(captions, [{"dog"}, {"cat"}, {"bus", "sausage"}], SYNONYMS)
    # mentions dog, dog, cat | - | bus, sausage: 5, one wrong; one caption of three is wrong; 3 of 4 objects are named
    assert scores == {"chair_i": 1 / 5, "chair_s": 1 / 3, "coverage": 3 / 4, "mentions": 5 / 3}
    assert chair_scores(["nothing"], [{"dog"}], SYNONYMS)["chair_i"] == 0
