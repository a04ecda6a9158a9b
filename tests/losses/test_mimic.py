import math

import pytest
import torch

from hf_distill.losses.mimic import FirstEntries
from hf_distill.losses.tile import Tile
from hf_distill.methods.llava_mod import mimic_kd_loss, mimic_objective, next_token_ce, sequence_logps

B, T, V = 2, 6, 7
# a prompt of two, an answer of three, padding; and an answer that ends the row
LABELS = torch.tensor([[-100, -100, 3, 4, 1, -100], [-100, -100, -100, 2, 5, 1]])
ATTENDED = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def logits(vocabulary: int = V, seed: int = 0, dtype=torch.float64):
    return torch.randn(B, T, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(student, teacher, positions, size: int, form: str) -> float:
    """Position by position, entry by entry."""
    total = 0.0
    for b, t in positions:
        q, p = student[b, t, :size].softmax(0), teacher[b, t, :size].softmax(0)
        for v in range(size):
            total += p[v] * ((p[v].log() if form == "kl" else 0.0) - q[v].log())
    return float(total / len(positions))


POSITIONS = {
    ("next_token", "response"): [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 4)],
    ("official", "response"): [(0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (1, 5)],
    ("next_token", "all"): [(b, t) for b in range(B) for t in range(T - 1)],
    ("official", "all"): [(b, t) for b in range(B) for t in range(T)],
}


@pytest.mark.parametrize("form", ["kl", "ce"])
@pytest.mark.parametrize(("alignment", "tokens"), POSITIONS)
def test_kd_differs_from_a_loop_over_positions(alignment, tokens, form):
    student, teacher = logits(), logits(seed=1)
    ours = mimic_kd_loss(student, teacher, LABELS, alignment, tokens, form=form)
    assert ours.item() == pytest.approx(loop(student, teacher, POSITIONS[alignment, tokens], V, form), rel=1e-12)


def test_kd_on_all_tokens_counts_padding():
    student, teacher = logits(), logits(seed=1)
    ours = mimic_kd_loss(student, teacher, LABELS, "next_token", "all", attention_mask=ATTENDED)
    positions = [(0, t) for t in range(4)] + [(1, t) for t in range(5)]
    assert ours.item() == pytest.approx(loop(student, teacher, positions, V, "kl"), rel=1e-12)
    left = mimic_kd_loss(student, teacher, LABELS, "next_token", "all", attention_mask=ATTENDED.flip(1))
    positions = [(0, t) for t in range(1, 5)] + [(1, t) for t in range(5)]
    assert left.item() == pytest.approx(loop(student, teacher, positions, V, "kl"), rel=1e-12)
    official = mimic_kd_loss(student, teacher, LABELS, "official", "all", attention_mask=ATTENDED)
    positions = [(0, t) for t in range(5)] + [(1, t) for t in range(6)]
    assert official.item() == pytest.approx(loop(student, teacher, positions, V, "kl"), rel=1e-12)


@pytest.mark.parametrize("common", [None, 6])
def test_padded_vocabularies_are_not_cut_before_the_softmax(common):
    student, teacher = logits(V + 3), logits(V, seed=1)
    ours = mimic_kd_loss(student, teacher, LABELS, common_vocab=common)
    positions = POSITIONS["next_token", "response"]
    assert ours.item() == pytest.approx(loop(student, teacher, positions, common or V, "kl"), rel=1e-12)


def test_the_two_forms_have_different_gradients():
    gradients = []
    for form in ("kl", "ce"):
        student = logits().requires_grad_()
        mimic_kd_loss(student, logits(seed=1), LABELS, form=form).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_the_teacher_gets_a_gradient():
    teacher = logits(seed=1).requires_grad_()
    mimic_kd_loss(logits().requires_grad_(), teacher, LABELS).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_half_precision(dtype):
    student, teacher = logits(dtype=dtype), logits(seed=1, dtype=dtype)
    for function in (mimic_kd_loss(student, teacher, LABELS), next_token_ce(student, LABELS)):
        assert function.dtype == torch.float32
    exact = mimic_kd_loss(student.double(), teacher.double(), LABELS)
    assert mimic_kd_loss(student, teacher, LABELS).item() == pytest.approx(exact.item(), rel=1e-5)
    assert sequence_logps(student, LABELS).dtype == torch.float32


def test_no_answer_gives_nan():
    none = torch.full_like(LABELS, -100)
    assert mimic_kd_loss(logits(), logits(seed=1), none) == 0 and next_token_ce(logits(), none) == 0
    assert sequence_logps(logits(), none).tolist() == [0.0, 0.0]


def test_label_loss_and_answer_probabilities_differ_from_a_loop():
    student = logits()
    log_p = [[student[b, t].log_softmax(0)[LABELS[b, t + 1]].item() if LABELS[b, t + 1] >= 0 else None
              for t in range(T - 1)] for b in range(B)]  # fmt: skip
    sums = [sum(x for x in row if x is not None) for row in log_p]
    assert sequence_logps(student, LABELS).tolist() == pytest.approx(sums, rel=1e-12)
    assert next_token_ce(student, LABELS).item() == pytest.approx(-sum(sums) / 6, rel=1e-12)


def test_terms_are_added_otherwise_than_the_loss_type_says():
    kd, lm, aux = (torch.tensor(x) for x in (1.0, 10.0, 100.0))
    assert mimic_objective(kd, lm, aux) == 101 and mimic_objective(kd, lm, aux, "kd_lm") == 111
    assert mimic_objective(kd, lm, torch.tensor(0.0)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mask_alignment="shifted"), "mask_alignment must be one of next_token, official"),
        (dict(distill_tokens="prompt"), "distill_tokens must be one of"),
        (dict(form="js"), "form must be one of"),
        (dict(common_vocab=V + 1), "student has 7 entries and the teacher 7, so choose 1 to 7"),
        (dict(common_vocab=0), "choose 1 to 7"),
        (dict(common_vocab=5), r"label 5 at \[1, 4\] of a batch lies beyond the 5 entries"),
    ],
)
def test_bad_input_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        mimic_kd_loss(logits(), logits(seed=1), LABELS, **arguments)
    with pytest.raises(ValueError, match="loss_type must be one of"):
        mimic_objective(torch.tensor(1.0), torch.tensor(1.0), 0.0, "kd")


def test_entries_beyond_the_cut_move_the_value_or_get_a_gradient():
    student, teacher = logits().flatten(0, 1).requires_grad_(), logits(seed=1).flatten(0, 1)
    cut = FirstEntries(5)
    value = cut.value(Tile(student.detach(), teacher))
    expected = (teacher[:, :5].softmax(-1) * (teacher[:, :5].log_softmax(-1) - student[:, :5].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(value, expected.detach())
    out, weight = torch.zeros_like(teacher), torch.linspace(0.5, 1.5, len(teacher), dtype=torch.float64)
    cut.add_grad(Tile(student.detach(), teacher), value, weight, out)
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, student.grad)
    assert not out[:, 5:].any() and math.isfinite(out.sum())
