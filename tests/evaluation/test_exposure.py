"""Exposure: ranks, estimates, planted canaries, and a model that knows one."""

import json
import math

import pytest
import torch
from datasets import Dataset

from hf_distill.evaluation.exposure import (
    Canary,
    Digits,
    _candidates,
    check_fits,
    draw_canaries,
    exposure,
    insert_canaries,
    log_perplexities,
    measure_exposure,
    read_canaries,
    skew_normal_exposure,
)
from tests.helpers import tiny_llama, tiny_tokenizer

WORDS = [f"w{i}" for i in range(20, 60)]


# ---- ranks -----------------------------------------------------------------------------------------------------------
def test_exposure_is_not_that_of_the_rank():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    order = values.argsort()
    assert exposure(values, order[0]) == math.log2(100) and exposure(values, order[-1]) == 0.0
    assert exposure(values.tolist(), int(order[24])) == pytest.approx(2.0)


def test_ties_are_counted_as_smaller():
    assert exposure([1.0, 1.0, 1.0, 2.0], 2) == 2.0


def test_a_secret_that_is_not_known_has_another_mean_than_one_in_log_2():
    draw = torch.Generator().manual_seed(0)
    found = [exposure(torch.randn(512, generator=draw), 0) for _ in range(2000)]
    assert abs(sum(found) / len(found) - 1 / math.log(2)) < 0.1


@pytest.mark.parametrize(("values", "index"), [([1.0], 0), ([1.0, float("nan")], 0), ([1.0, 2.0], 2)])
def test_what_cannot_be_ranked_is_ranked(values, index):
    with pytest.raises(ValueError):
        exposure(values, index)


@pytest.mark.parametrize("shape", [-3.0, 0.0, 4.0])
@pytest.mark.parametrize("rank", [20, 2000])
def test_the_fit_extrapolates_wrongly(shape, rank):
    """Against the whole space of 400,000 values, a skew-normal sample itself, of which the fit sees 20,000."""
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(400_000, generator=draw, dtype=torch.float64) for _ in range(2))
    delta = shape / math.sqrt(1 + shape**2)
    space = 30 + 5 * (delta * a.abs() + math.sqrt(1 - delta**2) * b)
    index = int(space.argsort()[rank - 1])
    estimate = skew_normal_exposure(space[:20_000], space[index].item())
    assert estimate == pytest.approx(exposure(space, index), abs=0.8)


def test_a_far_tail_loses_its_digits():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.cat([normal, -normal])  # no skewness at all
    normal = (normal - normal.mean()) / normal.std(correction=0)
    expected = -torch.special.log_ndtr(torch.tensor(-12.0, dtype=torch.float64)).item() / math.log(2)
    assert skew_normal_exposure(normal, -12.0) == pytest.approx(expected, rel=1e-3)
    assert skew_normal_exposure(normal, 0.0) == pytest.approx(1.0, rel=1e-3)
    assert skew_normal_exposure(normal, 50.0) == pytest.approx(0.0, abs=1e-3)


# ---- canaries --------------------------------------------------------------------------------------------------------
def test_digits_are_not_all_numbers_of_that_length():
    assert list(Digits(2))[:3] == ["00", "01", "02"] and len(list(Digits(2))) == 100
    assert Digits(6).index(Digits(6)[90412]) == 90412


def test_a_canary_without_its_secret_is_accepted():
    for template, secret in (("no place", "07"), ("two {} {}", "07"), ("number {}", "7"), ("number {}", "0x")):
        with pytest.raises(ValueError):
            Canary(template, secret, Digits(2))
    with pytest.raises(ValueError, match="3 different secrets"):
        draw_canaries("{}", ["a", "b"], 3)


def test_canaries_are_inserted_another_number_of_times_or_together():
    data = Dataset.from_dict({"text": [f"row {i}" for i in range(200)], "more": list(range(200))})
    canaries = draw_canaries("number {}", Digits(4), 2, seed=1)
    planted = insert_canaries(data, canaries, [5, 1], seed=2)
    texts = planted["text"]
    assert [texts.count(c.text()) for c in canaries] == [5, 1] and len(texts) == 206
    assert set(data["text"]) < set(texts) and max(i for i, t in enumerate(texts) if "number" in t) > 50
    assert list(insert_canaries(data, canaries, [5, 1], seed=2)["text"]) == list(texts)
    with pytest.raises(ValueError, match="no column 'words'"):
        insert_canaries(data, canaries, 1, column="words")
    with pytest.raises(ValueError, match="per canary"):
        insert_canaries(data, canaries, [1])


def test_canaries_of_a_file_are_others(tmp_path):
    path = tmp_path / "canaries.json"
    listed = [{"template": "a {}", "secret": "07", "digits": 2}, {"template": "{}", "secret": "x", "space": ["x", "y"]}]
    path.write_text(json.dumps(listed))
    first, second = read_canaries(str(path))
    assert first.text() == "a 07" and first.place == 7 and second.place == 0
    for wrong in ("[{}]", "nothing"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="cannot read canaries"):
            read_canaries(str(path))


# ---- of a model ------------------------------------------------------------------------------------------------------
def canary() -> Canary:
    return Canary("w1 w2 w3 {}", "w33", WORDS)


def test_log_perplexities_are_not_those_of_each_text_alone():
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    texts = ["w1 w2", "w4 w5 w6 w7 w8", "w9 w1 w2"]
    found = log_perplexities(model, tokenizer, texts, batch_size=2)
    assert model.training
    for text, value in zip(texts, found, strict=True):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = -sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        assert value.item() == pytest.approx(expected, rel=1e-5)


def test_a_secret_that_was_learnt_by_heart_has_no_exposure():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    before = measure_exposure(model, tokenizer, [canary()])
    ids = torch.tensor([tokenizer(canary().text())["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    after = measure_exposure(model, tokenizer, [canary()])
    assert before[canary().text()] < after[canary().text()] == pytest.approx(math.log2(40))
    sampled = measure_exposure(model, tokenizer, [canary()], method="sample", sample=8)
    assert sampled[canary().text()] == 3.0
    fitted = measure_exposure(model, tokenizer, [canary()], method="skew_normal", sample=30)
    assert fitted[canary().text()] > 5.0


def test_a_sample_holds_the_secret_twice_or_is_another_one_each_time():
    for seed in range(20):
        values, place = _candidates(canary(), "sample", 39, seed)
        assert len(set(values)) == len(values) == 39 and values[place] == "w33"
    assert _candidates(canary(), "sample", 8, 1) == _candidates(canary(), "sample", 8, 1)


def test_a_canary_longer_than_the_context_is_measured():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has 4 tokens and the context 3"):
        measure_exposure(tiny_llama(), tokenizer, [canary()], max_length=3)
    with pytest.raises(ValueError, match="the context 3"):
        check_fits(canary(), tiny_llama(max_position_embeddings=3), tokenizer)
    for wrong in ({"method": "guess"}, {"sample": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            measure_exposure(tiny_llama(), tokenizer, [canary()], **wrong)
    with pytest.raises(ValueError, match="no canaries"):
        measure_exposure(tiny_llama(), tokenizer, [])
