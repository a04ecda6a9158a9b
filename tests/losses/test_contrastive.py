"""The memory-contrastive loss against a loop over scores, and the banks' update."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from hf_distill.losses import crd_loss, crd_update

B, D, N, K = 3, 4, 9, 5


def inputs(k: int = K) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    vectors = [normalize(torch.randn(n, D, generator=draw, dtype=torch.float64), dim=1) for n in (B, B, N, N)]
    index = torch.randint(N, (B, 1 + k), generator=draw)
    index[:, 0] = torch.tensor([4, 0, 8])
    return [*vectors, index]


def side(embedding, bank, index, temperature, z=None) -> tuple[float, float]:
    exps = [
        [math.exp(sum(a * b for a, b in zip(bank[j], v, strict=True)) / temperature) for j in row]
        for v, row in zip(embedding.tolist(), index.tolist(), strict=True)
    ]
    z = z or sum(map(sum, exps)) / (len(exps) * len(exps[0])) * len(bank)
    k, loss = len(exps[0]) - 1, 0.0
    for first, *others in exps:
        noise = k / len(bank)
        loss -= math.log(first / z / (first / z + noise + 1e-7)) / len(exps)
        loss -= sum(math.log(noise / (e / z + noise + 1e-7)) for e in others) / len(exps)
    return loss, z


@pytest.mark.parametrize("k", [1, K])  # rows drawn, or a product with the whole bank
@pytest.mark.parametrize("z", [None, (30.0, 50.0)])
def test_crd_matches_a_loop(k, z):
    s, t, student_bank, teacher_bank, index = inputs(k)
    z_s, z_t = z or (None, None)
    loss, *constants = crd_loss(s, t, student_bank, teacher_bank, index, 0.2, z_s, z_t)
    ours, z_ours = side(s, teacher_bank.tolist(), index, 0.2, z_s)
    theirs, z_theirs = side(t, student_bank.tolist(), index, 0.2, z_t)
    assert loss.item() == pytest.approx(ours + theirs, rel=1e-10)
    assert [float(c) for c in constants] == pytest.approx([z_ours, z_theirs], rel=1e-10)


def test_both_ways_to_score_agree():
    s, t, student_bank, teacher_bank, index = inputs()
    padded = [torch.cat([b, torch.zeros(100, D, dtype=b.dtype)]) for b in (student_bank, teacher_bank)]
    many = index.repeat(1, 10)  # 51 · 4 entries: more than 109 rows
    many = torch.cat([index[:, :1], many], 1)
    found = crd_loss(s, t, *padded, many, 0.2, 30.0, 50.0)[0]
    expected = side(s, padded[1].tolist(), many, 0.2, 30.0)[0] + side(t, padded[0].tolist(), many, 0.2, 50.0)[0]
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_gradients_are_wrong_or_reach_banks_and_constants():
    s, t, student_bank, teacher_bank, index = inputs()
    for which in (0, 1):
        given = [s.clone(), t.clone()]

        def loss(x, which=which, given=given):
            return crd_loss(*given[:which], x, *given[which + 1 :], student_bank, teacher_bank, index, 0.2, 30.0, 50.0)[
                0
            ]

        assert torch.autograd.gradcheck(loss, given[which].clone().requires_grad_())
    leaves = [x.clone().requires_grad_() for x in (s, t, student_bank, teacher_bank)]
    loss, *constants = crd_loss(*leaves, index, 0.2)
    loss.backward()
    assert [x.grad is not None for x in leaves] == [True, True, False, False]
    assert not any(c.requires_grad for c in constants)


def test_an_embedding_moved_towards_its_own_row_raises_the_loss():
    s, t, student_bank, teacher_bank, index = inputs()
    z = crd_loss(s, t, student_bank, teacher_bank, index)[1:]
    worse = crd_loss(s, t, student_bank, teacher_bank, index, 0.07, *z)[0]
    better = crd_loss(teacher_bank[index[:, 0]], t, student_bank, teacher_bank, index, 0.07, *z)[0]
    assert better < worse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    *vectors, index = inputs()
    low = [x.to(dtype) for x in vectors]
    with torch.autocast("cpu", torch.bfloat16):
        loss = crd_loss(*low, index)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), crd_loss(*[x.double() for x in low], index)[0], rtol=1e-5, atol=0)


def test_one_example_and_opposite_vectors_are_finite():
    s, t, student_bank, teacher_bank, index = (x[:1] if i in (0, 1, 4) else x for i, x in enumerate(inputs()))
    s = -teacher_bank[index[:, 0]]
    loss = crd_loss(s.float(), t.float(), student_bank.float(), teacher_bank.float(), index)[0]
    assert loss.isfinite()


def test_the_bank_moves_where_it_should_and_stays_elsewhere():
    s, _, bank, _, index = inputs()
    before = bank.clone()
    after = crd_update(bank, s, index[:, 0], momentum=0.3)
    assert torch.equal(bank, before)
    for i, row in enumerate(index[:, 0].tolist()):
        moved = 0.3 * bank[row] + 0.7 * s[i]
        torch.testing.assert_close(after[row], moved / moved.norm())
    others = [r for r in range(N) if r not in index[:, 0].tolist()]
    assert torch.equal(after[others], bank[others])
    assert crd_update(bank, s, index[:, 0], inplace=True) is bank and not torch.equal(bank, before)


def test_of_a_row_that_occurs_twice_not_the_last_embedding_counts():
    s, _, bank, _, _ = inputs()
    twice = crd_update(bank, s, torch.tensor([2, 5, 2]))
    torch.testing.assert_close(twice, crd_update(bank, s[1:], torch.tensor([5, 2])))
    assert crd_update(bank.bfloat16(), s, torch.tensor([0, 1, 2])).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_pass():
    s, t, student_bank, teacher_bank, index = inputs()
    with pytest.raises(ValueError, match="must have one shape"):
        crd_loss(s, t[:, :3], student_bank, teacher_bank, index)
    with pytest.raises(ValueError, match="another width"):
        crd_loss(s[:, :3], t[:, :3], student_bank, teacher_bank, index)
    with pytest.raises(ValueError, match=r"contrast_index must be \(3, 1 \+ negatives\)"):
        crd_loss(s, t, student_bank, teacher_bank, index[:, :1])
