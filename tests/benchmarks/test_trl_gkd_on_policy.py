"""Beside TRL's GKD trainer on the same prompts and texts: who divides by the tokens that were sampled."""

import pytest

from benchmarks.trl_gkd_on_policy import by_hand, by_ours, by_trl


@pytest.mark.parametrize("accumulation", [1, 2])
def test_our_loss_is_divided_by_the_data_sets_labels_as_trls_is(accumulation):
    exact, sampled = by_hand()
    ours, counted = by_ours(accumulation)
    trl, divided_by = by_trl(accumulation)
    assert counted == sampled and ours == pytest.approx(exact, rel=1e-5)
    assert divided_by != sampled, "the case would not show it"
    assert trl == pytest.approx(exact * sampled / divided_by, rel=1e-4), "TRL has changed what it divides by"
