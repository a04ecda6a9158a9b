import math

import pytest

from hf_distill.evaluation.comparison import Run, paired, token_blocks
from tests.helpers import tiny_tokenizer


def runs(*values: float) -> list[Run]:
    return [Run("x", 1e-3, seed, 10, test={"cross_entropy": value}) for seed, value in enumerate(values)]


def test_a_difference_within_two_standard_errors_is_not_called_better():
    rows = {"method": runs(1.0, 1.2, 0.9), "baseline": runs(1.1, 1.0, 1.05)}
    result = paired(rows, "method", "baseline")
    differences = (-0.1, 0.2, -0.15)
    mean = sum(differences) / 3
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
    assert result.mean == pytest.approx(mean) and result.standard_error == pytest.approx(error)
    assert result.verdict == "not told apart"


def test_pairs_are_compared_seed_by_seed_so_that_a_small_steady_gain_shows():
    rows = {"method": runs(0.99, 1.99, 2.98), "baseline": runs(1.0, 2.0, 3.0)}
    assert paired(rows, "method", "baseline").verdict == "beats"
    assert paired(rows, "baseline", "method").verdict == "loses to"


def test_two_seeds_are_never_enough_for_a_verdict():
    assert paired({"a": runs(1.0, 1.0), "b": runs(2.0, 2.0)}, "a", "b").verdict == "not told apart"


def test_blocks_hold_every_token_once_in_order_with_the_end_token_between_documents():
    tokenizer = tiny_tokenizer()
    texts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    expected = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    blocks = token_blocks(tokenizer, texts, 4)
    flat = [i for row in blocks["input_ids"] for i in row]
    assert flat == expected[: len(expected) // 4 * 4] and blocks["labels"] == blocks["input_ids"]
