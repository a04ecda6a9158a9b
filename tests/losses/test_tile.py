"""What a tile says, entry by entry, beside a loop in float64."""

import math

import pytest
import torch

from hf_distill.losses.tile import MixtureTile, Tile

STUDENT = [[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 4.0, -1.0]]
TEACHER = [[0.2, 1.0, -3.0, 2.0], [-1.0, 2.0, 2.5, 0.0]]
INF = math.inf


def tile(**more) -> Tile:
    return Tile(torch.tensor(STUDENT, dtype=torch.float64), torch.tensor(TEACHER, dtype=torch.float64), **more)


def probabilities(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def close(found: torch.Tensor, wanted: list) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [None, 0.5, 1.0, 2.0])
def test_a_softmax_is_of_another_temperature_or_side(temperature):
    given = () if temperature is None else (temperature,)
    q, p = ([probabilities(row, temperature or 1.0) for row in rows] for rows in (STUDENT, TEACHER))
    log_q, log_p = ([[math.log(x) for x in row] for row in rows] for rows in (q, p))
    one = tile()
    close(one.q(*given), q)
    close(one.p(*given), p)
    close(one.log_q(*given), log_q)
    close(one.log_p(*given), log_p)
    close(
        one.log_ratio(*given), [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(log_q, log_p, strict=True)]
    )
    rows = list(zip(q, p, strict=True))
    close(one.forward_kl(*given), [sum(b * math.log(b / a) for a, b in zip(x, y, strict=True)) for x, y in rows])
    close(one.reverse_kl(*given), [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in rows])
    mixed = [[0.3 * a + 0.7 * b for a, b in zip(x, y, strict=True)] for x, y in rows]
    close(one.mixture(temperature or 1.0, 0.3), mixed)


def test_a_softmax_is_taken_twice_or_shared_between_temperatures():
    one = tile()
    assert one.log_q(2.0) is one.log_q(2.0) and one.p() is one.p(1.0)
    assert not torch.equal(one.log_q(2.0), one.log_q(1.0))


def test_the_most_likely_entry_is_another_one():
    assert tile().student_top().tolist() == [3, 2] and tile().teacher_top().tolist() == [3, 2]
    other = Tile(torch.tensor(STUDENT)[:, [3, 0, 1, 2]], torch.tensor(TEACHER)[:, [0, 3, 1, 2]])
    assert other.student_top().tolist() == [0, 3] and other.teacher_top().tolist() == [1, 3]
    assert other.student_top().shape == (2,)


def test_entries_that_one_side_rules_out_count():
    s, t = torch.tensor([[0.0, 1.0, -INF]]), torch.tensor([[0.5, -INF, -INF]])
    one = Tile(s, t)
    assert one.inside().tolist() == [[True, False, False]]
    assert one.log_ratio().isfinite().all() and one.log_ratio()[0, 1:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(one.log_ratio()[0, 0], torch.tensor(-math.log(1 + math.e)))
    assert one.filled(torch.tensor([math.nan, INF, -INF, 2.0])).tolist() == [0.0, 0.0, 0.0, 2.0]
    kept = Tile(s, t, finite=True).filled(torch.tensor([math.nan, INF, 2.0]))
    assert kept[0].isnan() and kept[1] == INF


def test_a_mixture_falls_to_zero():
    both = torch.tensor([[0.0, -INF]])
    assert Tile(both, both).mixture(1.0, 0.5)[0, 1] == torch.finfo(torch.float32).tiny


def test_a_teacher_that_is_not_there_is_silent():
    with pytest.raises(ValueError, match="compares with a teacher, but none was given"):
        Tile(torch.zeros(1, 2)).log_p()


def test_a_mixture_of_teachers_is_divided_by_a_temperature_again():
    log_probs = torch.tensor(TEACHER).log_softmax(-1)
    one = MixtureTile(torch.tensor(STUDENT), log_probs)
    assert one.log_p() is log_probs and one.log_p(1.0) is log_probs and not one.finite
    assert one.teacher_top().tolist() == [3, 2]
    for temperature in (0.5, 2.0):
        with pytest.raises(ValueError, match="made for the temperatures that its divergences declare"):
            one.log_p(temperature)


class Marks:
    """Adds one to all that it may write to."""

    def __init__(self, full_vocabulary: bool | None):
        if full_vocabulary is not None:
            self.full_vocabulary = full_vocabulary

    def add_grad(self, tile, value, row_weight, out):
        out.add_(1.0)


@pytest.mark.parametrize(("full", "width"), [(None, 4), (False, 4), (True, 6)])
def test_a_gradient_leaves_the_vocabulary_that_its_divergence_reads(full, width):
    out = torch.zeros(2, 6)
    one = tile()
    one.add_grad(Marks(full), torch.zeros(2), torch.ones(2), out)
    assert out[:, :width].eq(1).all() and out[:, width:].eq(0).all()


def test_the_tile_of_the_whole_vocabulary_is_another():
    whole = Tile(torch.zeros(2, 6))
    assert whole.full is whole and tile(full=whole).full is whole
