"""TRG: its three relations, the drawn places, and short runs."""

import math
import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_distill.methods.trg import (
    TRG,
    TRGConfig,
    draw_places,
    trg_adjacency,
    trg_global_loss,
    trg_inner_loss,
    trg_local_loss,
)
from hf_distill.signals import Signals
from tests.baselines.models import FAMILIES, bert, resnet, trainer, vit

D64 = torch.float64


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=D64))[0]


def loop_adjacency(x, k, sigma, normalise=True):
    x = x / x.norm(dim=1, keepdim=True) if normalise else x
    m = len(x)
    a = torch.zeros(m, m, dtype=x.dtype)
    for j in range(m):
        others = sorted((i for i in range(m) if i != j), key=lambda i: (x[i] - x[j]).square().sum().item())
        for i in others[:k]:
            a[i, j] = math.exp(-(x[i] - x[j]).square().sum().item() / (2 * sigma))
    return a


# ---- the losses ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k, sigma, normalise", [(3, 1.0, True), (2, 0.3, False), (20, 1.0, True)])
def test_the_graph_is_not_that_of_a_loop(k, sigma, normalise):
    x = torch.randn(9, 4, dtype=D64)
    a = trg_adjacency(x, k, sigma, normalise)
    torch.testing.assert_close(a, loop_adjacency(x, k, sigma, normalise))
    assert ((a > 0).sum(0) == min(k, 8)).all(), "each column has its k neighbours"
    assert (a.diagonal() == 0).all()


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_the_local_loss_is_not_that_of_a_loop(direction):
    s, t = torch.randn(8, 3, dtype=D64), torch.randn(8, 5, dtype=D64)
    q, p = (loop_adjacency(x, 3, 1.0).softmax(-1) for x in (s, t))
    if direction == "student_teacher":
        p, q = q, p
    expected = sum((p[i] * (p[i] / q[i]).log()).sum() for i in range(8)) / 8
    torch.testing.assert_close(trg_local_loss(s, t, k=3, direction=direction), expected)


def test_the_global_loss_is_not_that_of_a_loop():
    s, t = torch.randn(6, 4, dtype=D64), torch.randn(6, 4, dtype=D64)
    expected = 0.0
    for i in range(6):
        scores = torch.stack([torch.cosine_similarity(s[i], t[j], dim=0) / 0.2 for j in range(6)])
        expected -= (scores[i].exp() / scores.exp().sum()).log() / 6
    torch.testing.assert_close(trg_global_loss(s, t, 0.2), expected)


def test_the_inner_loss_is_not_that_of_a_loop():
    s, t = torch.randn(2, 5, 3, dtype=D64), torch.randn(2, 5, 4, dtype=D64)
    expected = 0.0
    for b in range(2):
        q = (s[b] @ s[b].T / math.sqrt(3)).softmax(-1)
        p = (t[b] @ t[b].T / math.sqrt(4)).softmax(-1)
        expected += (p - q).square().mean() / 2
    torch.testing.assert_close(trg_inner_loss(s, t), expected)


def test_padding_counts_in_the_inner_loss():
    s, t = torch.randn(2, 6, 3, dtype=D64), torch.randn(2, 6, 4, dtype=D64)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    expected = (trg_inner_loss(s[:1], t[:1]) + trg_inner_loss(s[1:, :4], t[1:, :4])) / 2
    torch.testing.assert_close(trg_inner_loss(s, t, mask), expected)
    assert trg_inner_loss(s, t, torch.zeros(2, 6)) == 0


def test_equal_tokens_give_a_loss_or_a_gradient():
    x = torch.randn(10, 4, dtype=D64)
    for loss, tokens in ((lambda s: trg_local_loss(s, x, 3), x), (lambda s: trg_inner_loss(s[None], x[None]), x)):
        s = tokens.clone().requires_grad_()
        value = loss(s)
        value.backward()
        assert value.abs() < 1e-12 and s.grad.abs().max() < 1e-12


def test_a_rotation_changes_the_relations_or_not_the_global_term():
    s, t, turn = torch.randn(10, 4, dtype=D64), torch.randn(10, 4, dtype=D64), rotation(4)
    torch.testing.assert_close(trg_local_loss(s @ turn, t, 3), trg_local_loss(s, t, 3))
    torch.testing.assert_close(trg_inner_loss((s @ turn)[None], t[None]), trg_inner_loss(s[None], t[None]))
    assert (trg_global_loss(s @ turn, t, 0.1) - trg_global_loss(s, t, 0.1)).abs() > 1e-2


def test_shuffled_places_cost_nothing_and_a_random_student_is_not_at_log_m():
    t = torch.randn(50, 16)
    assert trg_global_loss(t[torch.randperm(50)], t, 0.2) > trg_global_loss(t, t, 0.2) + 1.0
    assert trg_global_loss(torch.randn(50, 16), t, 100.0).item() == pytest.approx(math.log(50), abs=1e-2)


def test_images_of_equal_means_have_equal_token_relations():
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.3, 1.0], [-0.3, -1.1]])
    student = torch.tensor([[0.2, 0.9], [-0.2, -0.8], [0.5, 0.1], [-0.5, -0.2]])
    assert torch.allclose(teacher.view(2, 2, 2).mean(1) - student.view(2, 2, 2).mean(1), torch.zeros(2, 2), atol=1e-6)
    assert trg_local_loss(student, teacher, k=1) > 1e-3


@pytest.mark.parametrize("normalise", [True, False])
def test_a_gradient_is_wrong_or_reaches_the_teacher(normalise):
    s, t = torch.randn(7, 3, dtype=D64, requires_grad=True), torch.randn(7, 3, dtype=D64, requires_grad=True)
    for loss in (
        lambda s: trg_local_loss(s, t, 3, normalize_tokens=normalise),
        lambda s: trg_local_loss(s, t, 3, direction="student_teacher"),
        lambda s: trg_global_loss(s, t, 0.3),
        lambda s: trg_inner_loss(s[None], t[None]),
    ):
        assert torch.autograd.gradcheck(loss, s)
        loss(s).backward()
    assert t.grad is None


def test_equal_tokens_among_the_others_give_nan():
    s = torch.ones(6, 3, requires_grad=True)
    trg_local_loss(s, torch.zeros(6, 3), 2).backward()
    assert s.grad.isfinite().all()
    assert trg_local_loss(torch.ones(1, 3), torch.ones(1, 3)) == 0


def test_the_local_loss_does_not_bring_neighbours_together():
    """The sizes of the page's toy; overlap rises from about .3."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 8, generator=draw)
    student = torch.randn(64, 8, generator=draw).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.02)

    def overlap():
        ours, theirs = (trg_adjacency(x) > 0 for x in (student, teacher))
        return ((ours & theirs).sum() / theirs.sum()).item()

    assert overlap() < 0.4
    for _ in range(600):
        optimizer.zero_grad()
        trg_local_loss(student, teacher).backward()
        optimizer.step()
    assert overlap() > 0.7


@pytest.mark.parametrize(
    "wrong",
    [
        {"trg_alpha": float("nan")},
        {"trg_beta": -1.0},
        dict.fromkeys(("trg_alpha", "trg_beta", "trg_gamma", "kd_weight", "label_weight"), 0.0),
        {"kd_temperature": 0.0},
        {"trg_tau_max": 0.01},
        {"trg_sigma": float("inf")},
        {"trg_k": 0},
        {"trg_local_direction": "both"},
    ],
)
def test_a_bad_setting_is_taken(wrong):
    with pytest.raises(ValueError, match="trg_|kd_temperature|weights"):
        TRGConfig(**wrong)


# ---- drawing ---------------------------------------------------------------------------------------------------------
def test_places_do_not_depend_on_seed_step_and_row_alone():
    everything, step = torch.ones(6, 40, dtype=torch.bool), torch.tensor(3)
    drawn = draw_places(everything, 8, step, 0)
    state = torch.get_rng_state()
    assert torch.equal(draw_places(everything, 8, step, 0), drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw_places(everything[4:], 8, step, 0, first_row=4), drawn[4:])
    assert not torch.equal(draw_places(everything, 8, step + 1, 0), drawn)
    assert not torch.equal(draw_places(everything, 8, step, 1), drawn)
    assert all(len(set(row)) == 8 for row in drawn.tolist()), "without replacement"
    often = torch.stack([draw_places(everything, 8, torch.tensor(i), 0) for i in range(200)]).flatten().bincount()
    assert often.min() > 0.7 * often.float().mean() and often.max() < 1.3 * often.float().mean()


def test_padding_is_drawn():
    valid = torch.arange(12) < torch.tensor([12, 5, 2])[:, None]
    places = draw_places(valid, 4, torch.tensor(0), 0)
    assert valid.take_along_dim(places, 1).sum(1).tolist() == [4, 4, 2]


# ---- the objective ---------------------------------------------------------------------------------------------------
def objective(student, teacher, special=(), **settings) -> TRG:
    from hf_distill import FrozenTeacher

    made = TRG(TRGConfig(**settings), special)
    made.setup(student, FrozenTeacher(teacher))
    return made


def test_prefix_tokens_are_tokens_or_grids_of_two_sizes_do_not_meet():
    made = objective(vit(), resnet(hidden=4, layers=2), trg_teacher_layer="-1")
    grid = torch.arange(16.0).expand(1, 8, 16).mT
    ours = torch.cat([torch.full((1, 1, 8), 99.0), grid], 1)
    theirs = torch.randn(1, 8, 2, 2)
    student = Signals(features={made.pairs[0][0]: ours})
    teacher = Signals(features={made.pairs[0][1]: theirs})
    s, t = made.tokens(student, teacher)
    assert s.shape == (1, 4, 8) and torch.equal(t, theirs.flatten(2).mT)
    assert s[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_special_tokens_and_padding_are_related():
    made = objective(bert(), bert(12, 3, seed=2), special=(7,))
    ids = torch.tensor([[7, 3, 4, 7, 0, 0], [7, 3, 4, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert made._text_tokens(Signals(batch=batch)).tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    tokens = torch.arange(6.0).expand(2, 6).clone()[..., None]
    ours, theirs = made._drawn(tokens, 10 * tokens, made._text_tokens(Signals(batch=batch)))
    assert torch.equal(10 * ours, theirs), "the same places"
    assert sorted(ours.flatten().tolist()) == [1.0, 1.0, 2.0, 2.0, 3.0, 4.0]


def test_pooled_features_are_tokens():
    with pytest.raises(ValueError, match="before the pooling"):
        objective(vit(), vit(12, 3), trg_student_layer="embedding", trg_teacher_layer="embedding")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_does_not_train_or_draws_from_the_global_generator(family, tmp_path):
    made = TRG(TRGConfig(trg_tokens_per_image=3))
    done = trainer(tmp_path, family, made, n=7, max_steps=4, learning_rate=0.01)
    done.train()
    first, *_, last = [entry for entry in done.state.log_history if "loss" in entry]
    names = {"loss/label", "loss/kd", "loss/trg_inner", "loss/trg_local", "loss/trg_global", "loss/trg_knn_overlap"}
    assert names <= first.keys() and 0 < first["loss/trg_knn_overlap"] <= 1
    assert first["trg_tau"] == 0.5 > last["trg_tau"] > 0.07
    assert made.state["step"] == 4
    state, step = torch.get_rng_state(), made.state["step"].clone()
    metrics = done.evaluate()
    assert torch.equal(torch.get_rng_state(), state) and made.state["step"] == step
    made.state["step"] += 5
    assert done.evaluate()["eval_trg_global"] == metrics["eval_trg_global"], "evaluation draws the same at every step"
    done.save_model(tmp_path / "out")
    _, info = type(done.student()).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_same_step_draws_other_places_after_resuming(tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    made = [TRG(TRGConfig(trg_tokens_per_image=3)) for _ in range(2)]
    trainer(tmp_path / "a", "vit", made[0], **settings).train()
    trainer(tmp_path / "b", "vit", made[1], **settings).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
    )
    assert torch.equal(made[0].state["step"], made[1].state["step"])
    assert torch.equal(made[0].project.weight, made[1].project.weight)


def gathered_run(output: Path, ranks: int) -> None:
    """Three steps on texts of several lengths, so that ranks draw other numbers of tokens."""
    settings = dict(max_steps=3, train_sampling_strategy="sequential", learning_rate=0.02)
    run = trainer(
        output.parent / f"{output.name}-run",
        "bert",
        TRG(TRGConfig(trg_gather=ranks > 1, trg_tokens_per_image=6, trg_k=4, trg_local_sharpness=4.0)),
        student=bert(seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        n=24,
        per_device_train_batch_size=8 // ranks,
        **settings,
    )
    run.train()
    assert run.accelerator.num_processes == ranks, run.accelerator.num_processes
    if run.accelerator.is_main_process:
        values = {n: p.detach().clone() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
        for i, entry in enumerate(entry for entry in run.state.log_history if "loss" in entry):
            values |= {f"{k} {i}": torch.tensor(v) for k, v in entry.items() if k.startswith("loss/")}
        torch.save(values, output)


def forked(ranks: int, output: Path) -> dict:
    """`gathered_run` on processes that need not import anything again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1]:
            continue
        try:
            launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({k: str(v) for k, v in (launcher | {"MASTER_ADDR": "127.0.0.1"}).items()})
            os.environ["MASTER_PORT"] = str(port)
            AcceleratorState._reset_state(reset_partial_state=True)
            gathered_run(output, ranks)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert ends == [0] * ranks, ends
    return torch.load(output)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its ranks are forked processes")
def test_a_graph_over_two_ranks_is_not_that_of_one_process_with_all_examples(tmp_path):
    one, two = forked(1, tmp_path / "one"), forked(2, tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=2e-4, atol=1e-6, msg=name)
