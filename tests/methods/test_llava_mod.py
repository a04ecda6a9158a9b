"""LLaVA-MoD's losses in a trainer are those of its functions, and they help."""

from __future__ import annotations

import pytest
import torch

from hf_distill import BalanceLoss, upcycle_to_moe
from hf_distill.methods.llava_mod import (
    LlavaModConfig,
    Mimic,
    balance_loss,
    mimic_kd_loss,
    next_token_ce,
    objective_for,
)
from tests.helpers import SGD
from tests.methods.llava_mod_models import SETUP, named, trainer

MODES = [(tokens, alignment) for tokens in ("response", "all") for alignment in ("next_token", "official")]


# ---- the loss -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "alignment"), MODES)
def test_a_stage_trains_another_loss_than_the_functions(tokens, alignment, tmp_path):
    """One step over 6 rows, whole and as 2 x 3: the means over KD's rows and over labels are those of the whole."""
    config = LlavaModConfig(distill_tokens=tokens, mask_alignment=alignment, aux_loss_coef=0, common_vocab=63)
    seen = []
    for i, (batch_size, accumulation) in enumerate(((6, 1), (2, 3), (4, 2))):
        settings = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1)
        run = trainer(tmp_path / str(i), config=config, rows=6, **SGD | settings)
        before = named(run.model)
        collated = run.data_collator([run.train_dataset[i] for i in range(6)])
        run.train()
        seen.append((run.state.log_history[0], {n: v - before[n] for n, v in named(run.model).items()}))
    batch = {k: collated[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    student = upcycle_to_moe(SETUP.dense(), router_std=0.02)
    with torch.no_grad():
        ours, theirs = student(**batch).logits, SETUP.teacher().eval()(**batch).logits
    kd = mimic_kd_loss(ours, theirs, collated["labels"], alignment, tokens, 63, attention_mask=batch["attention_mask"])
    lm = next_token_ce(ours, collated["labels"])
    for logged, moved in seen:
        assert logged["loss/kd"] == pytest.approx(kd.item(), rel=1e-5)
        assert logged["loss/lm"] == pytest.approx(lm.item(), rel=1e-5)
        assert logged["loss"] == pytest.approx((kd + lm).item(), rel=1e-4)
        for name, change in moved.items():
            torch.testing.assert_close(change, seen[0][1][name], rtol=1e-4, atol=1e-6)


def test_evaluation_gives_other_means_than_training(tmp_path):
    config = LlavaModConfig(distill_tokens="all", mask_alignment="official", aux_loss_coef=0)
    numbers = []
    for size in (7, 2):
        run = trainer(tmp_path / str(size), config=config, rows=7, per_device_eval_batch_size=size)
        numbers.append({k: v for k, v in run.evaluate(run.train_dataset).items() if k in ("eval_kd", "eval_lm")})
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and len(numbers[0]) == 2


def test_balance_is_left_out_or_weighs_something_else(tmp_path):
    config = LlavaModConfig(router_std=0.5, aux_loss_coef=0.25)
    run = trainer(tmp_path, config=config, per_device_train_batch_size=8, max_steps=1, **SGD)
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    logged = run.state.log_history[0]
    kd, lm, aux = (logged[f"loss/{name}"] for name in ("mimic/kd", "mimic/lm", "balanceloss/balance"))
    assert logged["loss"] == pytest.approx(kd + lm + 0.25 * aux, rel=1e-4)
    student = SETUP.student()
    student.load_state_dict({name: value for name, value in start.items() if name in student.state_dict()})
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    from hf_distill import attach_router_outputs

    attach_router_outputs(student)
    logits = student.model(**inputs, output_router_logits=True).router_logits
    assert aux == pytest.approx(balance_loss(logits, attention_mask=inputs["attention_mask"]).item(), rel=1e-5)
    assert "expert_load/0" in logged


def test_stages_have_another_objective_than_the_papers():
    dense, sparse, config = SETUP.dense(), SETUP.student(), LlavaModConfig()
    assert objective_for(dense, config, "only_kd").weights(0.0) == {"kd": 1.0, "lm": 0.0}
    assert objective_for(dense, config, "kd_lm").weights(0.0) == {"kd": 1.0, "lm": 1.0}
    for loss_type in ("only_kd", "kd_lm"):  # a student that is sparse already is balanced in stage 1 too, once
        leaves = objective_for(sparse, config, loss_type).leaves()
        assert [(type(leaf), factor) for _, factor, leaf in leaves] == [(Mimic, 1.0), (BalanceLoss, 0.01)]
    assert isinstance(objective_for(sparse, LlavaModConfig(aux_loss_coef=0), "kd_lm"), Mimic)


# ---- does it help ---------------------------------------------------------------------------------------------------
def test_kd_teaches_no_more_of_the_teacher_than_labels(tmp_path):
    held_out, kl = SETUP.dataset(48).select(range(32, 48)), {}
    settings = dict(max_steps=50, per_device_train_batch_size=4, learning_rate=3e-3, optim="adamw_torch")
    settings |= dict(per_device_eval_batch_size=16)
    for name in ("kd", "labels"):
        run = trainer(tmp_path / name, "dense", rows=32, logging_steps=50, **settings)
        if name == "labels":
            run.objective.weights = lambda progress: {"kd": 0.0, "lm": 1.0}
        before = run.evaluate(held_out)["eval_kd"]
        run.train()
        kl[name] = run.evaluate(held_out)["eval_kd"]
    assert kl["kd"] < 0.8 * before and kl["kd"] < 0.8 * kl["labels"], (before, kl)
