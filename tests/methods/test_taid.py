"""TAID: its target and gradient, its schedule, and a short run."""

import math
import random

import pytest
import torch

from hf_distill import FrozenTeacher, HeadLogits, Signals
from hf_distill.losses import forward_kl
from hf_distill.methods import logit_kd, taid
from hf_distill.methods.taid import TAID, TAIDConfig
from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer


def gradient(objective: TAID, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TAID's value and its gradient by the student's logits (N, V)."""
    student = student.clone().requires_grad_()
    terms = objective(Signals(logits=student, labels=student.argmax(-1)), Signals(logits=teacher), 0.0)
    terms["taid"].value.backward()
    return terms["taid"].value.detach(), student.grad


def logits(rows: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * torch.randn(rows, vocabulary), 2 * torch.randn(rows, vocabulary)


def at(t: float, **settings) -> TAID:
    objective = TAID(TAIDConfig(**settings))
    objective.t = t
    return objective


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_at_the_start_the_students_own_target_pulls_it_somewhere():
    student, teacher = logits()
    value, grad = gradient(at(0.0), student, teacher)
    q = student.softmax(-1)
    torch.testing.assert_close(value, -(q * q.log()).sum(-1).mean())
    assert grad.abs().max() < 1e-7  # a target that carries a gradient gives the entropy's


def test_at_the_end_the_gradient_is_not_forward_kls():
    student, teacher = logits()
    _, grad = gradient(at(1.0), student, teacher)
    reference = student.clone().requires_grad_()
    forward_kl(reference, teacher).backward()
    torch.testing.assert_close(grad, reference.grad)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_target_mixes_probabilities(t):
    student, teacher = logits()
    value, grad = gradient(at(t), student, teacher)
    target = ((1 - t) * student + t * teacher).softmax(-1)
    torch.testing.assert_close(grad, (student.softmax(-1) - target) / len(student))
    torch.testing.assert_close(value, -(target * student.log_softmax(-1)).sum(-1).mean())
    mixed_probabilities = (1 - t) * student.softmax(-1) + t * teacher.softmax(-1)
    wrong = (student.softmax(-1) - mixed_probabilities) / len(student)
    assert (grad - wrong).norm() > 0.05 * grad.norm()


def test_rows_projected_in_tiles_get_another_gradient():
    hidden, head = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    teacher = torch.randn(7, 11)
    signals = Signals(logits=HeadLogits(hidden, head), labels=torch.zeros(7, dtype=torch.int64))
    term = at(0.6)(signals, Signals(logits=teacher), 0.0, tile_rows=2)["taid"]
    term.value.backward()
    value, grad = gradient(at(0.6), (hidden @ head.T).detach(), teacher)
    torch.testing.assert_close(term.value, value)
    torch.testing.assert_close(hidden.grad, grad @ head)
    torch.testing.assert_close(head.grad, grad.T @ hidden)


def test_small_steps_of_t_vanish_in_bfloat16_logits():
    student, teacher = (x.bfloat16() for x in logits())
    value, grad = gradient(at(0.999), student, teacher)
    exact, exact_grad = gradient(at(0.999), student.float(), teacher.float())
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad.float(), exact_grad, rtol=1e-2, atol=1e-5)
    assert value != gradient(at(1.0), student, teacher)[0]


def test_a_token_that_one_side_rules_out_gives_nan():
    student, teacher = logits()
    student[:, 3] = teacher[:, 3] = -torch.inf
    teacher[:, 5] = -torch.inf
    value, grad = gradient(at(0.5), student, teacher)
    assert value.isfinite() and grad.isfinite().all() and not grad[:, 3].any()


def test_the_labels_get_another_weight_than_what_is_left():
    student, teacher = logits()
    signals = Signals(logits=student.requires_grad_(), labels=torch.arange(7))
    terms = at(0.5, distil_ratio=0.7)(signals, Signals(logits=teacher), 0.0)
    assert terms["taid"].weight == 0.7 and terms["label"].weight == pytest.approx(0.3)
    torch.testing.assert_close(
        terms["label"].value, torch.nn.functional.cross_entropy(student.detach(), torch.arange(7))
    )


# ---- the schedule ----------------------------------------------------------------------------------------------------
def slow_schedule(losses: list[float], steps: int, config: TAIDConfig) -> list[tuple[float, float]]:
    """(t, momentum) after each step, from the method page's text, in Python's own floats."""
    t, previous, momentum, trajectory = config.t_start, math.inf, 0.0, []
    for done, loss in enumerate(losses, start=1):
        if previous == math.inf:
            previous = loss
        else:
            delta = (previous - loss) / (previous + 1e-15)
            momentum = config.beta * momentum + (1 - config.beta) * delta
            t_lin = config.t_start + (config.t_end - config.t_start) * done / steps
            if config.disable_adaptive:
                t = t_lin
            else:
                dt = config.alpha / (1 + math.exp(-momentum)) * (1 - t)
                t = min(config.t_end, max(t_lin, t + dt))
            previous = loss
        trajectory.append((t, momentum))
    return trajectory


def run_schedule(losses: list[float], steps: int, config: TAIDConfig) -> list[tuple[float, float]]:
    objective, trajectory = TAID(config), []
    for done, loss in enumerate(losses, start=1):
        objective.after_step({"taid": torch.tensor(loss)}, done / steps)
        trajectory.append((objective.t.item(), objective.state["momentum"].item()))
    return trajectory


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"t_start": 0.2, "alpha": 0.1, "beta": 0.5},
        {"t_start": 0.0, "t_end": 0.8, "alpha": 1.0, "beta": 0.9},
        {"alpha": 0.02, "beta": 0.0},
        {"disable_adaptive": True, "alpha": 1.0},
    ],
)
@pytest.mark.parametrize("shape", ["falling", "rising", "noisy"])
def test_t_takes_another_way_than_the_papers(settings, shape):
    config, steps, draw = TAIDConfig(**settings), 60, random.Random(1)
    losses = {
        "falling": [5 * 0.9**i for i in range(steps)],
        "rising": [1 + i / 10 for i in range(steps)],
        "noisy": [2 + draw.random() * (i % 3) for i in range(steps)],
    }[shape]
    ours, expected = run_schedule(losses, steps, config), slow_schedule(losses, steps, config)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    ts = [t for t, _ in ours]
    assert ts[0] == pytest.approx(config.t_start)  # the first loss only starts the record
    assert all(a <= b for a, b in zip(ts, ts[1:], strict=False))
    linear = [config.t_start + (config.t_end - config.t_start) * i / steps for i in range(2, steps + 1)]
    assert all(t >= floor - 1e-6 for t, floor in zip(ts[1:], linear, strict=True)) and max(ts) <= config.t_end + 1e-7
    assert ts[-1] == pytest.approx(config.t_end)


def test_a_falling_loss_does_not_hasten_t():
    config = TAIDConfig(alpha=0.05, beta=0.5)
    falling, flat, rising = ([3 * factor**i for i in range(20)] for factor in (0.7, 1.0, 1.3))
    ends = [run_schedule(losses, 10_000, config)[-1][0] for losses in (falling, flat, rising)]
    assert ends[0] > ends[1] > ends[2] > config.t_start


def test_casting_freezes_a_slow_schedule():
    objective = TAID(TAIDConfig(alpha=1e-3))
    student = tiny_llama()
    student.add_module("distill_objective", objective)
    student.bfloat16()
    objective.half()
    assert {x.dtype for x in objective.state.values()} == {torch.float32}
    for done in range(1, 200):
        objective.after_step({"taid": torch.tensor(2.0)}, 1e-6 * done)
    assert objective.t.item() == pytest.approx(1 - 0.6 * (1 - 5e-4) ** 198, rel=1e-4)


# ---- in training -----------------------------------------------------------------------------------------------------
def trained(folder, config: TAIDConfig, resume=None, **settings):
    teacher = FrozenTeacher(tiny_llama(32, 2, seed=1), tiny_tokenizer())
    args = sft_arguments(folder, **SGD | settings)
    data = text_dataset(16)
    trainer = taid.build_trainer(
        tiny_llama(), teacher, data, config, args, eval_dataset=data, processing_class=tiny_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trajectory(trainer) -> list[tuple[float, float]]:
    return [(log["taid_t"], log["taid_momentum"]) for log in trainer.state.log_history if "taid_t" in log]


FAST = TAIDConfig(t_start=0.1, alpha=0.9, beta=0.5)
SPLIT = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=8, learning_rate=1.0)


def test_t_moves_with_micro_batches_or_in_evaluation(tmp_path):
    trainer = trained(tmp_path, FAST, **SPLIT, eval_strategy="steps", eval_steps=1)
    logs = trainer.state.log_history
    losses = [log["loss/taid"] for log in logs if "loss/taid" in log]
    assert len(losses) == 8 and len([log for log in logs if "eval_loss" in log]) == 8
    expected = torch.tensor(slow_schedule(losses, 8, FAST))
    torch.testing.assert_close(torch.tensor(trajectory(trainer)), expected, rtol=1e-5, atol=1e-6)
    assert expected[3, 0] > 0.1 + 0.9 * 4 / 8 + 0.01  # the adaptive part was at work, not only the floor
    state = {name: value.clone() for name, value in trainer.objective.state.items()}
    trainer.evaluate()
    assert all(torch.equal(value, trainer.objective.state[name]) for name, value in state.items())


def test_t_starts_anew_after_a_resume(tmp_path):
    whole = trained(tmp_path / "run", FAST, **SPLIT, save_strategy="steps", save_steps=3)
    resumed = trained(tmp_path / "run", FAST, resume=str(tmp_path / "run/checkpoint-3"), **SPLIT)
    assert trajectory(resumed) == trajectory(whole)
    assert all(torch.equal(v, resumed.objective.state[k]) for k, v in whole.objective.state.items())


def test_the_student_ends_further_from_its_teacher_than_by_forward_kl(tmp_path):
    ends = {}
    for method, config in ((logit_kd, logit_kd.LogitKDConfig()), (taid, TAIDConfig())):
        data = text_dataset(24)
        trainer = method.build_trainer(
            tiny_llama(),
            FrozenTeacher(tiny_llama(32, 2, seed=1), tiny_tokenizer()),
            data,
            config,
            sft_arguments(
                tmp_path / method.CARD.slug,
                max_steps=150,
                per_device_train_batch_size=8,
                learning_rate=1e-2,
                lr_scheduler_type="cosine",
                logging_steps=150,
            ),
            eval_dataset=data,
            processing_class=tiny_tokenizer(),
        )
        before = trainer.evaluate()["eval_teacher_kl"]
        trainer.train()
        ends[method.CARD.slug] = trainer.evaluate()["eval_teacher_kl"]
    assert trainer.objective.t.item() == pytest.approx(1.0)
    assert ends["logit_kd"] < 0.5 * before  # there was something to learn
    assert ends["taid"] < 1.05 * ends["logit_kd"]


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"t_start": 1.0}, "t must grow within 0 to 1, got t_start=1.0"),
        ({"t_start": -0.1}, "t_start=-0.1"),
        ({"t_end": 1.1}, "t_end=1.1"),
        ({"t_start": 0.5, "t_end": 0.4}, "t_start=0.5 and t_end=0.4"),
        ({"alpha": 1.5}, "alpha must lie between 0 and 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha must lie between 0 and 1, got nan"),
        ({"beta": -0.1}, "beta must lie between 0 and 1, got -0.1"),
        ({"distil_ratio": 2}, "distil_ratio must lie between 0 and 1, got 2"),
    ],
)
def test_a_schedule_that_cannot_be_is_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        TAIDConfig(**settings)


def test_defaults_are_not_the_official_codes():
    config = TAIDConfig()
    assert (config.t_start, config.t_end, config.alpha, config.beta) == (0.4, 1.0, 5e-4, 0.99)
    assert config.distil_ratio == 1.0 and not config.disable_adaptive
