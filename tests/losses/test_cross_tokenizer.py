from types import SimpleNamespace

import pytest
import torch

from hf_distill.losses import align_bytes, uld_loss

VS, VT = 7, 9


def test_groups_close_where_both_tokenizations_reach_the_same_byte():
    student = [[0, 2], [2, 3], [3, 6], [6, 8]]
    teacher = [[0, 1], [1, 3], [3, 4], [4, 6], [6, 7], [7, 8]]
    assert align_bytes(student, teacher) == ([[0, 1], [2], [3]], [[0, 1], [2, 3], [4, 5]])
    assert align_bytes([[0, 2], [2, 4]], [[0, 2], [2, 3]]) == ([[0], [1]], [[0], [1]])
    assert align_bytes([[0, 2]], [[0, 2], [2, 3]]) == ([[0], []], [[0], [1]])
    assert align_bytes([], [[0, 1]]) == ([[]], [[0]])
    assert align_bytes([], []) == ([], [])


def batch(seed=0, first_answer=2):
    """Two samples of 6 student and 8 teacher positions; the text "abcd" + EOS is cut differently by both."""
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, 6, VS, dtype=torch.float64), torch.randn(2, 8, VT, dtype=torch.float64)
    student_ids, teacher_ids = torch.randint(0, VS, (2, 6)), torch.randint(0, VT, (2, 8))
    student_labels, teacher_labels = student_ids.clone(), teacher_ids.clone()
    student_labels[:, :first_answer] = -100
    teacher_labels[:, :3] = -100
    student_labels[1, 5:] = -100
    student_offsets = torch.tensor([[[0, 0], [0, 0], [0, 1], [1, 3], [3, 4], [4, 4]]] * 2)
    teacher_offsets = torch.tensor([[[0, 0]] * 3 + [[0, 1], [1, 2], [2, 3], [3, 4], [4, 4]]] * 2)
    inputs = (student.requires_grad_(), teacher, student_labels, teacher_labels, student_ids, teacher_ids)
    return inputs, dict(student_offsets=student_offsets, teacher_offsets=teacher_offsets)


VOCABULARIES = dict(
    student_vocab={f"s{i}": i for i in range(4)} | {"x": 4, "y": 5, "z": 6},
    teacher_vocab={f"t{i}": i for i in range(6)} | {"y": 6, "x": 7, "t8": 8},
)


def sorted_distance(q, p):
    q, p = sorted(q.tolist(), reverse=True), sorted(p.tolist(), reverse=True)
    width = max(len(q), len(p))
    return sum(abs(a - b) for a, b in zip(q + [0] * (width - len(q)), p + [0] * (width - len(p)), strict=True))


def test_base_loss_against_a_loop():
    (s, t, *rest), _ = batch()
    q, p = (s / 2).softmax(-1), (t / 3).softmax(-1)
    first = [sorted_distance(q[0, 1 + k], p[0, 2 + k]) for k in range(3)]  # answers of 3 and 4 tokens without EOS
    second = [sorted_distance(q[1, 1 + k], p[1, 2 + k]) for k in range(2)]
    expected = (sum(first) / 3 + sum(second) / 2) / 2
    assert uld_loss(s, t, *rest, student_temperature=2.0, teacher_temperature=3.0).item() == pytest.approx(expected)
    first.append(sorted_distance(q[0, 4], p[0, 5]))
    second.append(sorted_distance(q[1, 3], p[1, 4]))
    expected = (sum(first) / 4 + sum(second) / 3) / 2
    value = uld_loss(s, t, *rest, student_temperature=2.0, teacher_temperature=3.0, skip_eos=False)
    assert value.item() == pytest.approx(expected)


def test_merged_tokens_follow_the_chain_rule():
    (s, t, *rest), offsets = batch()
    s_ids, t_ids = rest[2], rest[3]
    q, p = s.softmax(-1), t.softmax(-1)
    groups = [
        sorted_distance(q[0, 1], p[0, 2]),
        sorted_distance(q[0, 2], p[0, 4] * p[0, 3, t_ids[0, 4]]),
        sorted_distance(q[0, 3], p[0, 5]),
    ]
    single = [x[:1] for x in (s, t, *rest)]
    assert uld_loss(*single, **offsets).item() == pytest.approx(sum(groups) / 3)
    swapped = [single[k] for k in (1, 0, 3, 2, 5, 4)]
    both = dict(student_offsets=offsets["teacher_offsets"], teacher_offsets=offsets["student_offsets"])
    swapped[0] = swapped[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: uld_loss(z, *swapped[1:], **both), swapped[0])
    assert s_ids.shape == (2, 6)


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
@pytest.mark.parametrize("skip_eos", [True, False])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("hybrid", [None, "adaptive", "fixed"])
@pytest.mark.parametrize("first_answer", [2, 0])
def test_every_option_agrees_with_trl(strategy, skip_eos, extended, hybrid, first_answer):
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    (s, t, *rest), offsets = batch(first_answer=first_answer)
    if first_answer == 0:
        offsets["student_offsets"] = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 4], [4, 4], [4, 4]]] * 2)
    weights = (0.3, 0.8) if hybrid == "fixed" else (None, None)
    config = SimpleNamespace(
        uld_crossentropy_weight=0.2, uld_distillation_weight=0.7, uld_student_temperature=1.5,
        uld_teacher_temperature=0.8, uld_skip_student_eos=skip_eos, uld_skip_teacher_eos=skip_eos,
        use_extended_uld=extended, uld_token_merge_strategy=strategy, uld_use_hybrid_loss=hybrid is not None,
        uld_hybrid_matched_weight=weights[0], uld_hybrid_unmatched_weight=weights[1], beta=0.3,
    )  # fmt: skip
    tokenizers = [SimpleNamespace(get_vocab=lambda v=v: v) for v in VOCABULARIES.values()]
    trl = gold.ULDLoss(config, *tokenizers)(s, t, *rest, *offsets.values())
    ours = uld_loss(
        s, t, *rest, 1.5, 0.8, strategy, skip_eos, **(offsets if extended else {}), **(VOCABULARIES if hybrid else {}),
        matched_weight=weights[0], unmatched_weight=weights[1], beta=0.3, crossentropy_weight=0.2,
        distillation_weight=0.7,
    )  # fmt: skip
    torch.testing.assert_close(ours, trl)
    torch.testing.assert_close(torch.autograd.grad(ours, s)[0], torch.autograd.grad(trl, s)[0])


@pytest.mark.parametrize("strategy", ["bayesian", "observed"])
def test_the_same_model_twice_is_zero_and_an_order_of_the_teachers_tokens_does_not_matter(strategy):
    (s, t, s_labels, t_labels, s_ids, t_ids), _ = batch()
    assert uld_loss(s, s.detach(), s_labels, s_labels, s_ids, s_ids, strategy=strategy).item() == 0
    order = torch.randperm(VT)
    renamed = order.argsort()[t_ids]
    torch.testing.assert_close(
        uld_loss(s, t[..., order], s_labels, renamed.where(t_labels >= 0, -100), s_ids, renamed, strategy=strategy),
        uld_loss(s, t, s_labels, t_labels, s_ids, t_ids, strategy=strategy),
    )


def test_known_tokens_are_compared_by_name_only_in_the_hybrid_loss():
    (s, _, s_labels, _, s_ids, _), _ = batch()
    order = torch.randperm(VS)
    names = {f"n{i}": i for i in range(VS)}
    moved = {f"n{old}": new for new, old in enumerate(order.tolist())}
    given = (s, s.detach()[..., order], s_labels, s_labels, s_ids, s_ids)
    assert uld_loss(*given, student_vocab=names, teacher_vocab=moved).abs() < 1e-12
    assert uld_loss(*given, student_vocab=names, teacher_vocab=names) > 1e-3


def test_nothing_to_align_is_zero_with_a_graph():
    (s, t, s_labels, t_labels, s_ids, t_ids), _ = batch()
    value = uld_loss(s, t, torch.full_like(s_labels, -100), t_labels, s_ids, t_ids, crossentropy_weight=1.0)
    value.backward()
    assert value == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("wrong", [
    dict(strategy="first"), dict(student_temperature=0.0), dict(beta=1.5), dict(matched_weight=1.0),
    dict(student_vocab={"a": 0}), dict(teacher_offsets=torch.zeros(2, 8, 2)),
])  # fmt: skip
def test_arguments_out_of_range_are_named(wrong):
    inputs, _ = batch()
    with pytest.raises(ValueError, match="must|go together"):
        uld_loss(*inputs, **wrong)
