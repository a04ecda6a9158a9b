"""Logit distillation: Hinton's loss, the family of divergences, schedules, and labels alone."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.flop_counter import FlopCounterMode
from trl import SFTConfig, SFTTrainer

from hf_distill import FrozenTeacher, HeadLogits, Signals
from hf_distill.losses import DIVERGENCES, run_terms
from hf_distill.methods import logit_kd
from hf_distill.methods.logit_kd import LogitKDConfig, build_objective
from hf_distill.signals import Rows
from tests.helpers import SGD, relative_difference, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

ROWS = 8
STEP = SGD | {"learning_rate": 1.0}  # a step is the gradient


def trained(folder, config: LogitKDConfig, **settings):
    """A trainer after its steps of plain SGD over all rows, and the weights it started from."""
    student, data = tiny_llama(), text_dataset(ROWS)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    args = sft_arguments(folder, **STEP | dict(per_device_train_batch_size=ROWS, max_steps=1) | settings)
    teacher = FrozenTeacher(tiny_llama(32, 3, seed=1), tiny_tokenizer())
    trainer = logit_kd.build_trainer(student, teacher, data, config, args, processing_class=tiny_tokenizer())
    trainer.train()
    return trainer, before


def moves(model, before) -> dict[str, torch.Tensor]:
    return {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}


def by_hand(loss_of_rows) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and one step of SGD on it, from full logits, one text at a time."""
    student, teacher, tokenizer = tiny_llama(), tiny_llama(32, 3, seed=1), tiny_tokenizer()
    rows = []
    for text in text_dataset(ROWS)["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            theirs = teacher(ids).logits[0, :-1]
        rows.append((student(ids).logits[0, :-1], theirs, ids[0, 1:]))
    loss = loss_of_rows(rows)
    loss.backward()
    return loss.item(), {name: -p.grad for name, p in student.named_parameters()}


def logged(trainer, name: str = "loss") -> float:
    return trainer.state.log_history[0][name]


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_hintons_setting_is_not_his_loss(tmp_path):
    config = LogitKDConfig(temperature=4.0, t_squared=True, label_weight=0.1, kd_weight=0.9)

    def hinton(rows):
        ours, theirs, labels = (torch.cat(x) for x in zip(*rows, strict=True))
        kl = kl_div((ours / 4).log_softmax(-1), (theirs / 4).softmax(-1), reduction="batchmean")
        return 0.9 * 16 * kl + 0.1 * cross_entropy(ours, labels)

    loss, step = by_hand(hinton)
    trainer, before = trained(tmp_path, config)
    assert logged(trainer) == pytest.approx(loss, rel=1e-5)
    assert relative_difference(moves(trainer.model, before), step) < 1e-4


def test_a_mean_over_samples_is_one_over_tokens(tmp_path):
    def per_sample(rows):
        kl = [kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean") for a, b, _ in rows]
        return torch.stack(kl).mean()

    loss, step = by_hand(per_sample)
    trainer, before = trained(tmp_path / "sample", LogitKDConfig(per="sample"))
    assert logged(trainer) == pytest.approx(loss, rel=1e-5)
    assert relative_difference(moves(trainer.model, before), step) < 1e-4
    by_token, _ = trained(tmp_path / "token", LogitKDConfig())
    assert abs(logged(by_token) - loss) > 1e-3 * loss


def test_labels_alone_train_another_model_than_trls_trainer(tmp_path):
    plain = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)
    settings = STEP | dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    student = tiny_llama()
    args = SFTConfig(str(tmp_path / "trl"), max_length=16, loss_type="nll", **plain | settings)
    reference = SFTTrainer(student, args=args, train_dataset=text_dataset(ROWS), processing_class=tiny_tokenizer())
    reference.train()
    trainer, before = trained(tmp_path / "ours", LogitKDConfig(label_weight=1.0, kd_weight=0.0), **settings)
    assert logged(trainer) == pytest.approx(logged(reference), rel=1e-5)
    assert relative_difference(moves(trainer.model, before), moves(student, before)) < 1e-4


def test_a_divergence_weighs_zero_but_pulls(tmp_path):
    loss, step = by_hand(lambda rows: cross_entropy(torch.cat([r[0] for r in rows]), torch.cat([r[2] for r in rows])))
    trainer, before = trained(tmp_path, LogitKDConfig(label_weight=1.0, kd_weight=0.0))
    assert logged(trainer) == pytest.approx(loss, rel=1e-5)
    assert relative_difference(moves(trainer.model, before), step) < 1e-4
    assert logged(trainer, "loss/kd") > 0.1  # still measured


# ---- the family ------------------------------------------------------------------------------------------------------
OTHERS = {
    "generalized_jsd": ({"jsd_beta": 0.2}, {"beta": 0.2}),
    "skew_forward_kl": ({"skew_lam": 0.3}, {"lam": 0.3}),
    "skew_reverse_kl": ({"skew_lam": 0.3}, {"lam": 0.3}),
    "adaptive_kl": ({"adaptive_mu": 0.8}, {"mu": 0.8}),
    "alpha_beta": ({"ab_alpha": 0.2, "ab_beta": 0.7}, {"alpha": 0.2, "beta": 0.7}),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_trains_for_something_else(name, tmp_path):
    settings, options = OTHERS.get(name, ({}, {}))
    divergence = DIVERGENCES[name](temperature=2.0, **options)

    def direct(rows):
        ours, theirs, _ = (torch.cat(x) for x in zip(*rows, strict=True))
        return run_terms(ours, theirs, {"kd": (divergence, 1.0)})["kd"]

    loss, step = by_hand(direct)
    trainer, before = trained(tmp_path, LogitKDConfig(divergence=name, temperature=2.0, **settings))
    assert logged(trainer) == pytest.approx(loss, rel=1e-4)
    assert relative_difference(moves(trainer.model, before), step) < 1e-3
    if settings:  # its own numbers reach it
        assert build_objective(LogitKDConfig(divergence=name)).logit_terms(0.0)["kd"] != divergence


# ---- schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "schedule, quarter, half, end",
    [("linear", 2.5, 4.0, 7.0), ("cosine", 1 + 6 * 0.1464466, 4.0, 7.0), ("constant", 1.0, 1.0, 1.0)],
)
def test_a_schedule_moves_otherwise_than_documented(schedule, quarter, half, end):
    weight = build_objective(
        LogitKDConfig(kd_weight=1.0, kd_weight_end=7.0, weight_schedule=schedule, label_weight=0.5)
    )
    heat = build_objective(LogitKDConfig(temperature=1.0, temperature_end=7.0, temperature_schedule=schedule))
    for progress, expected in ((0.0, 1.0), (0.25, quarter), (0.5, half), (1.0, end)):
        assert weight.weights(progress) == {"label": 0.5, "kd": pytest.approx(expected)}
        assert heat.logit_terms(progress)["kd"].temperature == pytest.approx(expected)
        assert heat.weights(progress)["kd"] == 1.0


def test_t_squared_keeps_the_first_temperature():
    objective = build_objective(LogitKDConfig(temperature=2.0, temperature_end=4.0, t_squared=True, kd_weight=0.5))
    assert [objective.weights(x)["kd"] for x in (0.0, 0.5, 1.0)] == [2.0, 4.5, 8.0]


def test_no_end_means_another_value():
    objective = build_objective(LogitKDConfig(temperature=3.0, kd_weight=0.7))
    assert objective.logit_terms(0.9)["kd"].temperature == 3.0 and objective.weights(0.9)["kd"] == 0.7


def test_a_schedule_stands_still_in_training(tmp_path):
    config = LogitKDConfig(kd_weight=1.0, kd_weight_end=0.0)
    trainer, _ = trained(tmp_path, config, max_steps=4, learning_rate=1e-9)
    shares = [log["loss"] / log["loss/kd"] for log in trainer.state.log_history if "loss" in log]
    assert shares == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-3)


# ---- one projection --------------------------------------------------------------------------------------------------
def test_the_two_terms_are_projected_twice():
    rows = Rows(torch.arange(6), torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64), torch.zeros(1))
    sides = [
        Signals(logits=HeadLogits(torch.randn(6, width), torch.randn(9, width)), labels=rows.labels, rows=rows)
        for width in (4, 5)
    ]
    with FlopCounterMode(display=False) as flops:
        build_objective(LogitKDConfig(label_weight=0.5))(*sides, 0.0)
    assert flops.get_total_flops() == 2 * 6 * 9 * (4 + 5)


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": "foward_kl"}, "unknown divergence 'foward_kl'; choose one of forward_kl, reverse_kl, jeffreys"),
        ({"weight_schedule": "exp"}, "unknown weight_schedule 'exp'; choose one of constant, linear, cosine"),
        ({"temperature_schedule": "exp"}, "unknown temperature_schedule 'exp'; choose one of constant, linear, cosine"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature_end": -1.0}, "temperature_end must be positive, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"kd_weight": -1.0}, "kd_weight must not be negative, got -1.0"),
        ({"kd_weight_end": -1.0}, "kd_weight_end must not be negative, got -1.0"),
        ({"label_weight": float("nan")}, "label_weight must not be negative, got nan"),
        ({"kd_weight": 0.0}, "all weights are zero"),
        ({"per": "batch"}, 'per must be "token" or "sample", got \'batch\''),
        ({"divergence": "generalized_jsd", "jsd_beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"divergence": "skew_forward_kl", "skew_lam": 1.0}, r"lam must lie in \[0, 1\), got 1.0"),
        ({"divergence": "adaptive_kl", "adaptive_mu": -0.1}, r"mu must lie in \[0, 1\], got -0.1"),
    ],
)
def test_a_wrong_setting_is_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitKDConfig(**settings)


def test_a_setting_that_is_not_used_may_be_nan():
    with pytest.raises(ValueError, match="skew_lam must be a finite number, got nan"):
        LogitKDConfig(divergence="forward_kl", skew_lam=float("nan"))
