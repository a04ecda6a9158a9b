"""Domains: splitting, holding out, and the sampler that draws a whole interval at its boundary."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_distill.curricula.domains import DomainMixtureSampler, hold_out, split_by_domain, with_domains


def rows(*sizes: int) -> list[list[int]]:
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def domains_of(drawn: list[int], own: list[list[int]]) -> list[int]:
    return [next(i for i, part in enumerate(own) if row in part) for row in drawn]


# ---- the sampler -----------------------------------------------------------------------------------------------------
def test_an_interval_is_drawn_by_other_weights_than_those_set():
    own = rows(500, 300, 200)
    sampler = DomainMixtureSampler(own, 4000, seed=1)
    for weights in (None, torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.6, 0.4, 0.0])):
        if weights is not None:
            sampler.set_weights(weights)
        expected = 4000 * (torch.tensor([0.5, 0.3, 0.2]) if weights is None else weights)
        counts = torch.bincount(torch.tensor(domains_of(list(sampler), own)), minlength=3)
        assert torch.equal(counts, sampler.state["drawn"])
        some = expected > 0
        chi_square = ((counts - expected)[some] ** 2 / expected[some]).sum()
        assert chi_square < 13.8 and not counts[~some].any()  # one of a thousand draws of two degrees of freedom


def test_domains_stand_in_blocks():
    drawn = domains_of(list(DomainMixtureSampler(rows(50, 50), 400, seed=0)), rows(50, 50))
    changes = sum(a != b for a, b in zip(drawn, drawn[1:], strict=False))
    assert 150 < changes < 250


def test_a_domain_repeats_rows_before_all_were_seen_or_never_starts_over():
    own = rows(7, 40)
    sampler, seen = DomainMixtureSampler(own, 10, seed=3), []
    for _ in range(8):
        seen += [row for row in sampler if row < 7]
        sampler.set_weights(torch.tensor([0.5, 0.5]))
    assert len(seen) > 21
    passes = [seen[i : i + 7] for i in range(0, len(seen) - 6, 7)]
    assert all(sorted(one) == own[0] for one in passes) and len({tuple(one) for one in passes}) > 1


def test_a_list_changes_when_it_is_read_again_or_with_the_seed_does_not():
    one, other = (DomainMixtureSampler(rows(30, 30), 20, seed=seed) for seed in (1, 2))
    assert list(one) == list(one) != list(other)
    assert len(one) == 20
    before = list(one)
    one.set_weights(one.natural)
    assert list(one) != before


def test_a_restored_sampler_draws_something_else():
    weights = [torch.tensor([0.2, 0.8]), torch.tensor([0.9, 0.1])]
    first, second = (DomainMixtureSampler(rows(11, 13), 17, seed=5) for _ in range(2))
    first.set_weights(weights[0])
    second.load_state_dict(first.state_dict())
    assert list(second) == list(first)
    for sampler in (first, second):
        sampler.set_weights(weights[1])
    assert list(second) == list(first)
    assert torch.equal(first.state["cursors"], second.state["cursors"]) and first.state["cursors"].sum() == 34


@pytest.mark.parametrize(
    "weights", [torch.tensor([0.5, float("nan")]), torch.tensor([1.0, -1.0]), torch.zeros(2), torch.ones(3)]
)
def test_weights_that_are_none_are_drawn_by(weights):
    with pytest.raises(ValueError, match="2 numbers, not negative"):
        DomainMixtureSampler(rows(3, 3), 4, seed=0).set_weights(weights)


def test_a_domain_without_rows_is_drawn():
    with pytest.raises(ValueError, match="domain 1 has no rows"):
        DomainMixtureSampler([[0], []], 4, seed=0)


# ---- data ------------------------------------------------------------------------------------------------------------
def data(n: int = 20) -> Dataset:
    return Dataset.from_dict({"text": [str(i) for i in range(n)], "domain": ["b" if i % 3 else "a" for i in range(n)]})


def test_rows_change_their_domain():
    parts = split_by_domain(data(), "domain")
    assert list(parts) == ["a", "b"]
    assert all((int(text) % 3 == 0) == (name == "a") for name, part in parts.items() for text in part["text"])
    again = with_domains(parts, "domain")
    assert sorted(zip(again["text"], again["domain"], strict=True)) == sorted(
        zip(data()["text"], data()["domain"], strict=True)
    )


def test_a_held_out_row_is_trained_on():
    train, held = hold_out(split_by_domain(data(), "domain"), 3, seed=0)
    for name in train:
        assert len(held[name]) == 3 and not {*train[name]["text"]} & {*held[name]["text"]}
    assert sum(map(len, train.values())) == 14
    assert held["b"]["text"] == hold_out(split_by_domain(data(), "domain"), 3, seed=0)[1]["b"]["text"]
    assert held["b"]["text"] != hold_out(split_by_domain(data(), "domain"), 3, seed=1)[1]["b"]["text"]


def test_bad_domains_pass():
    with pytest.raises(ValueError, match="'a' has 7 rows, and ddk_eval_samples=7 .* none is left"):
        hold_out(split_by_domain(data(), "domain"), 7, seed=0)
    with pytest.raises(ValueError, match="no column 'source' .* only text, domain"):
        split_by_domain(data(), "source")
    unnamed = Dataset.from_dict({"text": ["x", "y"], "domain": ["a", None]})
    with pytest.raises(ValueError, match="row 1 of the train data has no domain"):
        split_by_domain(unnamed, "domain")
    with pytest.raises(ValueError, match="names a only"):
        split_by_domain(unnamed.select([0]), "domain")
    with pytest.raises(ValueError, match="IterableDataset .* without streaming"):
        split_by_domain(IterableDataset.from_generator(lambda: iter([{"domain": "a"}])), "domain")
