"""Measures of imitation against hand-made tables and slow loops."""

import math

import pytest
import torch

from hf_distill.evaluation.extraction import extractor_of, first_letter, last_number, whole_text
from hf_distill.evaluation.fidelity import (
    answer_fidelity,
    sentence_bleu,
    spearman,
    text_fidelity,
    token_fidelity,
    token_measures,
)
from hf_distill.losses import HeadLogits, observe


# ---- tokens ---------------------------------------------------------------------------------------------------------
def test_token_measures_match_a_loop_over_positions():
    s, t = torch.randn(2, 4, 11, dtype=torch.float64), torch.randn(2, 4, 13, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    found = token_fidelity(s, t, mask, topk=(1, 3))
    rows = []
    for b, i in mask.nonzero().tolist():
        q, p = s[b, i].softmax(0), t[b, i, :11].softmax(0)
        both = set(q.topk(3).indices.tolist()) & set(p.topk(3).indices.tolist())
        rows.append(
            {
                "token_top1_agreement": float(q.argmax() == p.argmax()),
                "kl_teacher_student": (p * (p / q).log()).sum().item(),
                "kl_student_teacher": (q * (q / p).log()).sum().item(),
                "tvd": (p - q).abs().sum().item() / 2,
                "student_entropy": -(q * q.log()).sum().item(),
                "teacher_entropy": -(p * p.log()).sum().item(),
                "top3_overlap": len(both) / 3,
            }
        )
    assert found.keys() == rows[0].keys()
    for name, value in found.items():
        assert value == pytest.approx(sum(row[name] for row in rows) / len(rows), abs=1e-12), name


def test_the_teacher_itself_differs_from_itself_or_strangers_agree():
    z, mask = torch.randn(3, 5, 40), torch.ones(3, 5, dtype=torch.bool)
    own = token_fidelity(z, z, mask, topk=(1, 4))
    assert own["token_top1_agreement"] == own["top4_overlap"] == 1
    assert own["kl_teacher_student"] == own["kl_student_teacher"] == own["tvd"] == 0
    strangers = token_fidelity(torch.randn(4000, 40), torch.randn(4000, 40), torch.ones(4000, dtype=torch.bool))
    assert strangers["token_top1_agreement"] == pytest.approx(1 / 40, abs=0.01)
    assert strangers["top3_overlap"] == pytest.approx(3 / 40, abs=0.01)


def test_masked_positions_change_a_measure():
    s, t, mask = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    before = token_fidelity(s, t, mask)
    s[~mask], t[~mask] = 1e4, float("nan")
    assert token_fidelity(s, t, mask) == before


def test_nothing_to_measure_is_a_number():
    z = torch.randn(2, 3, 7)
    with pytest.raises(ValueError, match="count at least one token, got .* with 0"):
        token_fidelity(z, z, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="rows' shape"):
        token_fidelity(z, z, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the 9 likeliest of 7"):
        token_fidelity(z, z, torch.ones(2, 3, dtype=torch.bool), topk=(9,))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        token_measures((0,))


def test_measures_of_heads_differ_from_those_of_their_logits_or_from_tile_to_tile():
    student = HeadLogits(torch.randn(9, 4), torch.randn(23, 4))
    teacher = HeadLogits(torch.randn(9, 6), torch.randn(23, 6))
    dense = observe(student.dense(), teacher.dense(), token_measures((1, 5)))
    for tile_rows in (1, 4, 9):
        tiled = observe(student, teacher, token_measures((1, 5)), tile_rows=tile_rows)
        for name, value in tiled.items():
            torch.testing.assert_close(value, dense[name], msg=name)


# ---- answers --------------------------------------------------------------------------------------------------------
def test_the_splits_of_agreement_are_those_of_a_table_by_hand():
    gold = [1, 2, 3, 4, 5, 6]
    teacher = [1, 2, 3, 9, 9, 9]
    found = answer_fidelity([1, 2, 8, 9, 8, 7], teacher, gold)
    assert found["student_accuracy"] == pytest.approx(2 / 6) and found["teacher_accuracy"] == pytest.approx(3 / 6)
    assert found["agreement"] == pytest.approx(3 / 6) and found["inherited_errors"] == pytest.approx(1 / 6)
    assert found["agreement_given_teacher_correct"] == pytest.approx(2 / 3)
    assert found["agreement_given_teacher_wrong"] == pytest.approx(1 / 3)


def test_the_more_accurate_student_cannot_be_the_less_faithful_one():
    gold, teacher = [1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 9, 9]
    free, loyal = [1, 2, 3, 4, 8, 8], [1, 2, 9, 9, 9, 8]
    free, loyal = (answer_fidelity(student, teacher, gold) for student in (free, loyal))
    assert free["student_accuracy"] > loyal["student_accuracy"] and free["agreement"] < loyal["agreement"]


def test_no_answer_is_right_or_empty_splits_are_reported():
    found = answer_fidelity([None, 1], [None, 1], [2, 1])
    assert found["student_accuracy"] == 0.5 and found["agreement"] == 1 and found["inherited_errors"] == 0.5
    assert "agreement_given_teacher_wrong" not in answer_fidelity([1], [1], [1])
    assert "agreement_given_teacher_correct" not in answer_fidelity([1], [2], [1])
    assert answer_fidelity([None], [None], [None])["student_accuracy"] == 0
    for lists in (([], [], []), ([1], [1, 2], [1])):
        with pytest.raises(ValueError, match="one answer of student, teacher and gold per example"):
            answer_fidelity(*lists)


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        (last_number, "so 1,234.50 and then -7", -7.0),
        (last_number, "#### 1,000.", 1000.0),
        (last_number, "42.0", 42.0),
        (last_number, "none", None),
        (first_letter, "Because of (B), not C", "B"),
        (first_letter, "Everything", None),
        (whole_text, "The  Cat.", "cat"),
        (whole_text, " ", None),
    ],
)
def test_an_answer_is_extracted_otherwise(extract, text, answer):
    assert extract(text) == answer


def test_an_extractor_of_ones_own_is_not_found_or_a_wrong_name_is_taken():
    assert extractor_of("math:sqrt") is math.sqrt and extractor_of("number") is last_number
    for name in ("numbers", "math", "math:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(ValueError, match="answer.extractor"):
            extractor_of(name)


def test_texts_are_compared_by_other_than_their_answers():
    student, teacher, gold = ["1 + 1 = 2", "so 5"], ["2", "so 5"], ["= 2", "= 4"]
    found = text_fidelity(student, teacher, gold, last_number)
    assert found["student_accuracy"] == 0.5 and found["agreement"] == 1 and found["inherited_errors"] == 0.5
    assert found["rationale_bleu"] == pytest.approx((sentence_bleu("1 + 1 = 2", "2") + 1) / 2)
    assert text_fidelity(["?"], ["1"], ["1"], last_number)["student_unanswered"] == 1
    with pytest.raises(ValueError, match="no answer was found in the reference 'yes'"):
        text_fidelity(["1"], ["1"], ["yes"], last_number)


# ---- texts ----------------------------------------------------------------------------------------------------------
def test_bleu_is_not_the_formula():
    # 1-grams 3/4, 2-grams (2+1)/(3+1), 3-grams (1+1)/(2+1), 4-grams (0+1)/(1+1); one word shorter than the reference
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 5 / 4)
    assert sentence_bleu("a b c x", "a b c d e") == pytest.approx(expected, abs=1e-12)
    assert sentence_bleu("a a a", "a b c") < sentence_bleu("a b x", "a b c")  # a repeated word counts once
    assert sentence_bleu("a b c d e f", "a b c") < 1
    assert sentence_bleu("one two", "one two") == 1
    assert sentence_bleu("", "a") == sentence_bleu("b", "a") == sentence_bleu("a", "") == 0


def test_rank_correlation_is_not_that_of_ranks():
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    scipy = pytest.importorskip("scipy.stats")
    x, y = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    assert spearman(x, y) == pytest.approx(scipy.spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(spearman([1, 1], [1, 2]))
    for lists in (([1], [1]), ([1, 2], [1])):
        with pytest.raises(ValueError, match="two values of each at least"):
            spearman(*lists)
