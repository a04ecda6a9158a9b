"""MixupCollator: what it mixes, how much, and what its draws depend on."""

import pytest
import torch

from hf_distill.curricula.mixup import MixupCollator, mix, mixup_labels

CLASSES = 4


def features(n: int = 8, seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 2, 2, generator=draw), "labels": i % CLASSES} for i in range(n)]


def collator(fraction: float = 1.0, **settings) -> MixupCollator:
    return MixupCollator(fraction=fraction, num_labels=CLASSES, **settings)


def sources(batch: dict, clean: list[dict]) -> list[tuple[int, int]]:
    """For each row the pair of examples that it mixes at its recorded share."""
    x, found = torch.stack([f["pixel_values"] for f in clean]), []
    for i, lam in enumerate(batch["mix_lambda"]):
        for r in range(len(clean)):
            for s in range(len(clean)):
                if torch.allclose(batch["pixel_values"][i], lam * x[r] + (1 - lam) * x[s], atol=1e-6):
                    found.append((r, s))
                    break
            if len(found) > i:
                break
    return found


def test_rows_are_no_convex_combinations_at_their_share():
    clean = features()
    batch = collator()(clean)
    pairs = sources(batch, clean)
    assert len(pairs) == 8 and sorted(r for r, _ in pairs) == list(range(8)) == sorted(s for _, s in pairs)
    assert sum(r != s for r, s in pairs) > 4
    for i, (r, s) in enumerate(pairs):
        expected = torch.zeros(CLASSES)
        expected[clean[r]["labels"]] += batch["mix_lambda"][i]
        expected[clean[s]["labels"]] += 1 - batch["mix_lambda"][i]
        torch.testing.assert_close(batch["labels"][i], expected)
    torch.testing.assert_close(batch["labels"].sum(-1), torch.ones(8))
    assert torch.equal(batch["labels_hard"], batch["labels"].argmax(-1))


def test_nothing_mixed_is_no_permutation():
    clean = features()
    batch = collator(0.0)(clean)
    assert (batch["mix_lambda"] == 1).all() and set(batch["labels"].unique().tolist()) == {0.0, 1.0}
    rows = {x["pixel_values"].numpy().tobytes(): x["labels"] for x in clean}
    for x, label in zip(batch["pixel_values"], batch["labels_hard"], strict=True):
        assert rows.pop(x.numpy().tobytes()) == label  # to the bit, each once
    assert not rows


@pytest.mark.parametrize(
    ("fraction", "size", "mixed"), [(0.5, 8, 4), (0.1, 20, 2), (1.0, 8, 8), (0.1, 4, 0), (0.5, 1, 0)]
)
def test_another_number_is_mixed(fraction, size, mixed):
    for seed in range(5):
        batch = collator(fraction, seed=seed)(features(size))
        assert (batch["mix_lambda"] < 1).sum() == mixed


def test_official_sampling_is_not_with_replacement():
    """A requested clean share q = 0.9 leaves about exp(-0.9) = 41 % mixed."""
    clean = features(100)
    shares = [(collator(0.1, sampling="official", seed=s)(clean)["mix_lambda"] < 1).float().mean() for s in range(50)]
    assert 0.38 < sum(shares) / 50 < 0.43


def test_shares_are_not_beta_or_not_per_sample():
    lam = torch.cat([collator(seed=s)(features(100))["mix_lambda"] for s in range(100)])
    assert abs(lam.mean() - 0.5) < 0.01 and abs(lam.var() - 1 / 12) < 0.003  # Beta(1, 1)
    assert len(lam.unique()) > 9000
    narrow = torch.cat([collator(alpha=0.2, seed=s)(features(100))["mix_lambda"] for s in range(50)])
    assert abs(narrow.var() - 1 / 5.6) < 0.01  # Beta(a, a) has variance 1 / (4 (2 a + 1))
    assert len(collator(per_sample=False)(features())["mix_lambda"].unique()) == 1


def test_draws_depend_on_anything_but_seed_epoch_and_content():
    one, same = collator(), collator()
    first = one(features())
    state = torch.get_rng_state()
    one(features(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    again = same(features())
    assert all(torch.equal(first[k], again[k]) for k in first)
    others = [collator(seed=1)(features()), one(features(seed=1))]
    one.epoch = 1
    others.append(one(features()))
    assert not any(torch.equal(first["mix_lambda"], other["mix_lambda"]) for other in others)


def test_a_teachers_own_pixels_are_mixed_otherwise():
    clean = [f | {"teacher_pixel_values": 3 * f["pixel_values"]} for f in features()]
    batch = collator()(clean)
    torch.testing.assert_close(batch["teacher_pixel_values"], 3 * batch["pixel_values"])


class TestRefusals:
    def test_texts_and_missing_labels(self):
        texts = [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": 0}] * 2
        with pytest.raises(ValueError, match="holds input_ids, attention_mask: token ids"):
            collator()(texts)
        with pytest.raises(ValueError, match="one class per example"):
            collator()([{"pixel_values": torch.ones(3, 2, 2)}])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 0.0}, "must be positive"),
            ({"alpha": float("nan")}, "must be positive"),
            ({"fraction": 1.1}, "0 to 1, got 1.1"),
            ({"fraction": float("nan")}, "0 to 1"),
            ({"sampling": "half"}, "one of exact, official"),
            ({"num_labels": None}, "at least 2, got None"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MixupCollator(**dict(num_labels=3) | settings)


def test_pure_functions_are_not_the_formulas():
    lam = torch.tensor([1.0, 0.25])
    x = torch.tensor([[torch.inf, 2.0], [4.0, 6.0]])
    first, second = torch.tensor([0, 1]), torch.tensor([1, 1])
    assert mix(x[:, :1], first, second, lam)[0] == torch.inf
    torch.testing.assert_close(mix(x[1:], torch.tensor([0]), torch.tensor([0]), lam[1:]), x[1:])
    soft = mixup_labels(torch.tensor([0, 1]), torch.tensor([2, 2]), lam.double(), 3)
    assert soft.tolist() == [[1, 0, 0], [0, 0.25, 0.75]] and soft.dtype == torch.float64
