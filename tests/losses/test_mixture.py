import pytest
import torch

from hf_distill.losses import Agreement, ForwardKL, HeadLogits, LabelCrossEntropy, MixtureLogits, ReverseKL, run_terms
from tests.losses.test_fused import Flops, N, gradients, heads, labels_of

TERMS = {
    "f": (ForwardKL(2.0), 0.5),
    "r": (ReverseKL(), 0.25),
    "label": (LabelCrossEntropy(), 1.0),
    "agree": (Agreement(), 0.0),
}


def mixed(space, weights, v_teacher=13, dtype=torch.float64, parts=3):
    torch.manual_seed(7)
    heads = []
    for m in range(parts):
        width = v_teacher + 2 * m  # padded vocabularies of different sizes
        bias = torch.randn(width, dtype=dtype) if m == 1 else None
        hidden, weight = torch.randn(N, 3 + m, dtype=dtype), torch.randn(width, 3 + m, dtype=dtype)
        heads.append(HeadLogits(hidden, weight, bias, 1 + m / 2, 4.0 if m == 2 else None))
    return MixtureLogits(tuple(heads), weights.to(dtype), space)


def dense(mixture, temperature):
    """log of the mixture (N, V) by the formula."""
    z = torch.stack([part.dense()[:, : mixture.shape[-1]] for part in mixture.parts], 1)
    w = mixture.weights.expand(N, -1)[:, :, None]
    if mixture.space == "logit":
        return ((w * z).sum(1) / temperature).log_softmax(-1)
    return (w * (z / temperature).softmax(-1)).sum(1).log()


def slowly(student, mixture):
    z = student.dense()
    log_q = {t: (z[:, : mixture.shape[-1]] / t).log_softmax(-1) for t in (1.0, 2.0)}
    log_p = {t: dense(mixture, t) for t in (1.0, 2.0)}
    return {
        "f": (log_p[2.0].exp() * (log_p[2.0] - log_q[2.0])).sum(-1).mean(),
        "r": (log_q[1.0].exp() * (log_q[1.0] - log_p[1.0])).sum(-1).mean(),
        "label": torch.nn.functional.cross_entropy(z, labels_of()),
        "agree": (log_q[1.0].argmax(-1) == log_p[1.0].argmax(-1)).double().mean(),
    }


PER_ROW = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.1, 0.1, 0.8], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("weights", [torch.tensor([0.5, 0.2, 0.3]), PER_ROW], ids=["shared", "per row"])
@pytest.mark.parametrize("tile_rows", [1, 2, 64])
def test_a_mixture_is_that_of_its_definition(space, weights, tile_rows):
    leaves, student, _ = heads()
    mixture = mixed(space, weights)
    values, expected = run_terms(student, mixture, TERMS, labels=labels_of(), tile_rows=tile_rows), None
    expected = slowly(student, mixture)
    for name in TERMS:
        torch.testing.assert_close(values[name], expected[name], msg=name)
    expected = gradients(TERMS, expected | {"agree": expected["label"]}, leaves)
    for ours, right in zip(gradients(TERMS, values, leaves), expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_dense_parts_give_what_heads_give_and_shapes_with_batch_dimensions_work():
    leaves, student, _ = heads()
    mixture = mixed("probability", PER_ROW)
    tensors = MixtureLogits(tuple(part.dense() for part in mixture.parts), mixture.weights)
    by_head, by_tensor = (run_terms(student.dense(), m, TERMS, labels=labels_of()) for m in (mixture, tensors))
    batched = MixtureLogits(tuple(p[None] for p in tensors.parts), mixture.weights[None])
    shaped = run_terms(student.dense()[None], batched, TERMS, labels=labels_of()[None], reduction="none")
    for name in TERMS:
        torch.testing.assert_close(by_head[name], by_tensor[name])
        torch.testing.assert_close(shaped[name].mean(), by_tensor[name])


def test_one_part_is_that_teacher_and_improbable_entries_stay_exact():
    leaves, student, teacher = heads()
    far = HeadLogits(teacher.hidden * 300, teacher.weight)  # probabilities below the smallest float
    only = MixtureLogits((far,), torch.ones(1))
    half = MixtureLogits((far, far), torch.tensor([0.25, 0.75]))
    alone = run_terms(student, far, TERMS, labels=labels_of())
    for mixture in (only, half):
        values = run_terms(student, mixture, TERMS, labels=labels_of())
        for name in TERMS:
            torch.testing.assert_close(values[name], alone[name])


def test_each_part_is_projected_once_whatever_the_temperatures_and_masked_rows_never():
    leaves, student, _ = heads(v_student=13)
    mixture = mixed("probability", PER_ROW)
    for mask, rows in ((None, N), (torch.tensor([1, 0, 0, 1, 0]), 2)):
        with Flops() as flops:
            values = run_terms(student, mixture, TERMS, labels=labels_of(vocabulary=13), mask=mask, tile_rows=2)
            sum(w * values[n] for n, (_, w) in TERMS.items()).backward()
        assert flops.get_total_flops() == 2 * rows * 13 * (3 * 4 + 3 + 4 + 5)


def test_mixtures_that_do_not_fit_are_refused():
    leaves, student, teacher = heads()
    with pytest.raises(ValueError, match="same rows"):
        MixtureLogits((teacher, HeadLogits(teacher.hidden[:2], teacher.weight)), torch.ones(2) / 2)
    with pytest.raises(ValueError, match=r"weights of a mixture must be \(2,\)"):
        MixtureLogits((teacher, teacher), torch.ones(3) / 3)
    with pytest.raises(ValueError, match="space must be one of"):
        MixtureLogits((teacher, teacher), torch.ones(2) / 2, "log")
    with pytest.raises(ValueError, match="at least one part"):
        MixtureLogits((), torch.ones(0))
