"""Preference losses that TRL lacks, a sparse student's balance in both halves, and exact evaluation."""

import logging
import re

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_distill import DistillDPOTrainer, FrozenTeacher
from hf_distill.losses import balance_loss, preference_loss
from hf_distill.students import upcycle_to_moe
from tests.helpers import SGD, dpo_arguments, tiny_llama, tiny_tokenizer
from tests.students.moe_models import SHAPE
from tests.training.test_dpo import HELD_OUT, PAIRS, log_probability, losses, make_trainer, pairs
from tests.training.test_inputs import llava_processor, tiny_llava


def logps(model) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[log_probability(model, prompt, text) for text in (c, r)] for prompt, c, r in PAIRS]
    return tuple(torch.tensor(rows).T)


@pytest.mark.parametrize(
    "settings",
    [
        dict(loss_type="kto_pair"),
        dict(loss_type="sigmoid", label_smoothing=0.2),
        dict(loss_type=["sigmoid", "kto_pair"], loss_weights=[0.5, 2.0]),
    ],
    ids=str,
)
def test_the_logged_loss_is_not_the_formula_s(tmp_path, settings):
    student, teacher = tiny_llama(), tiny_llama(32, 3, seed=1)
    ours, theirs = logps(student), logps(teacher)
    kinds = settings["loss_type"] if isinstance(settings["loss_type"], list) else [settings["loss_type"]]
    smoothing, weights = settings.get("label_smoothing", 0.0), settings.get("loss_weights", [1.0])
    expected = sum(
        weight * preference_loss(*ours, *theirs, 0.2, kind, smoothing)[0]
        for kind, weight in zip(kinds, weights, strict=True)
    )
    trainer = make_trainer(tmp_path, teacher, student=student, learning_rate=0.02, max_steps=3, **settings)
    trainer.train()
    first, *_, last = losses(trainer)
    assert first == pytest.approx(expected.item(), rel=1e-4) and last < first
    accuracy = (ours[0] - theirs[0] > ours[1] - theirs[1]).float().mean().item()
    assert trainer.state.log_history[0]["rewards/accuracies"] == pytest.approx(accuracy)


def test_kto_pair_from_a_teacher_that_is_the_student_starts_elsewhere_than_at_a_half(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), loss_type="kto_pair")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss_type="kto_pair", ld_alpha=0.5), "kto_pair goes without ld_alpha"),
        (dict(loss_type="kto_pair", use_weighting=True), "goes without use_weighting"),
        (dict(label_smoothing=0.1, f_divergence_type="js_divergence"), "sigmoid goes without f_divergence_type"),
        (dict(loss_type="kto_pair", label_smoothing=0.1), "kto_pair takes no label_smoothing"),
        (dict(aux_loss_coef=float("nan")), "aux_loss_coef must be 0 or positive"),
        (dict(aux_loss_form="switch"), "aux_loss_form must be one of gshard, hf"),
        (dict(router_aux_loss_coef=0.01), "use aux_loss_coef, which adds up both halves"),
    ],
)
def test_a_setting_that_would_be_ignored_is_taken(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_arguments(tmp_path, **settings)


# ---- balance --------------------------------------------------------------------------------------------------------
def sparse(kind: str):
    if kind == "llava":
        torch.manual_seed(0)
        dense = tiny_llava(16, 1)
        return upcycle_to_moe(dense, layers=[0], router_std=0.5)
    if kind == "qwen2":
        torch.manual_seed(0)
        return upcycle_to_moe(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), layers=[0, 2], router_std=0.5)
    return upcycle_to_moe(tiny_llama(layers=3), layers=[0, 2], router_std=0.5)


def pictures(n: int = 4) -> Dataset:
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (16, 16), (60 * i, 10, 200 - 50 * i))],
                "prompt": [{"role": "user", "content": "w1 w2"}],
                "chosen": [{"role": "assistant", "content": "w3 w4 w5" + " w7" * i}],
                "rejected": [{"role": "assistant", "content": "w6"}],
            }
            for i in range(n)
        ]
    )


def sparse_trainer(folder, kind: str, **settings):
    if kind == "llava":
        teacher = FrozenTeacher(tiny_llava(32, 2), llava_processor())
        more = dict(train_dataset=pictures(), processing_class=llava_processor(), max_length=None)
    else:
        teacher, more = tiny_llama(32, seed=2), {}
    still = dict(learning_rate=0.0, max_steps=1)
    return make_trainer(folder, teacher, student=sparse(kind), **SGD | still | more | settings)


@pytest.mark.parametrize("form", ["gshard", "hf"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "llava"])
def test_the_halves_balance_is_that_of_one_batch_or_counts_padding(tmp_path, kind, form):
    """Against a forward of each half by itself; the loss grows by the coefficient times their sum."""
    plain = sparse_trainer(tmp_path / "a", kind)
    plain.train()
    trainer = sparse_trainer(tmp_path / "b", kind, aux_loss_coef=0.3, aux_loss_form=form)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    mask, expected, model = batch["attention_mask"], 0.0, trainer.model.eval()
    assert not mask.all()
    for rows in (slice(0, 4), slice(4, 8)):
        more = {"pixel_values": batch["pixel_values"][rows]} if kind == "llava" else {}
        heard = []
        stack = model.model.language_model if kind == "llava" else model.model
        hook = stack.register_forward_hook(lambda *given, heard=heard: heard.append(given[-1].router_logits))
        with torch.no_grad():
            model.model(
                input_ids=batch["input_ids"][rows], attention_mask=mask[rows], output_router_logits=True, **more
            )
        hook.remove()
        layers = [logits[mask[rows].flatten().bool()] for logits in heard[0]]
        expected += balance_loss(layers, 2, form).item()
    trainer.train()
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(expected, rel=1e-5)
    assert losses(trainer)[0] - losses(plain)[0] == pytest.approx(0.3 * expected, rel=1e-4)
    assert "aux_loss" not in plain.state.log_history[0]
    assert "eval_aux_loss" in trainer.evaluate(trainer.train_dataset if kind == "llava" else pairs(HELD_OUT))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_trains_no_router(tmp_path, checkpointing):
    """With a preference that weighs nothing, only the routers and what feeds them move, in both kinds of backward."""
    settings = dict(loss_weights=[0.0], aux_loss_coef=1.0, learning_rate=0.1, gradient_checkpointing=checkpointing)
    trainer = sparse_trainer(tmp_path / str(checkpointing), "llava", **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(re.search(r"gate\.weight$", name) for name in moved) and not any("lm_head" in name for name in moved)


def test_a_dense_student_is_balanced_or_an_unbalanced_one_is_not_announced(tmp_path, caplog):
    with pytest.raises(ValueError, match="has no routed layers"):
        make_trainer(tmp_path, tiny_llama(seed=1), aux_loss_coef=0.01)
    student = sparse("qwen2")
    student.config.router_aux_loss_coef = 0.001  # as checkpoints of sparse models have it
    with caplog.at_level(logging.WARNING, "hf_distill"):
        trainer = make_trainer(tmp_path, tiny_llama(seed=1), student=student)
    trainer.train()
    assert "its experts are not balanced" in caplog.text


def test_a_sparse_student_does_not_resume(tmp_path):
    """Experts have other names in a checkpoint than in the model."""
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4, learning_rate=0.05, aux_loss_coef=0.1)
    whole = sparse_trainer(tmp_path, "qwen2", **saving)
    whole.train()
    again = sparse_trainer(tmp_path, "qwen2", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = again.student().state_dict(), whole.student().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert losses(again) == losses(whole)


# ---- evaluation -----------------------------------------------------------------------------------------------------
def test_a_last_and_shorter_batch_counts_as_much_as_a_whole_one(tmp_path):
    numbers = []
    for size in (2, 3):
        trainer = make_trainer(
            tmp_path, tiny_llama(32, seed=1), eval_dataset=pairs(HELD_OUT), per_device_eval_batch_size=size
        )
        cost = ("runtime", "per_second", "preparation_time")
        numbers.append({k: v for k, v in trainer.evaluate().items() if not k.endswith(cost)})
    assert numbers[0].keys() == numbers[1].keys() and len(numbers[0]) > 10
    for name, value in numbers[0].items():
        assert value == pytest.approx(numbers[1][name], rel=1e-5, abs=1e-7), name


def test_a_callback_sees_no_terms(tmp_path):
    from hf_distill import DistillCallback

    class Seen(DistillCallback):
        names = set()

        def on_distill_loss(self, args, state, control, *, student, teacher, terms, **kwargs):
            self.names.add(tuple(terms))

    seen = Seen()
    trainer = DistillDPOTrainer(
        sparse("llama"),
        teacher=tiny_llama(seed=1),
        args=dpo_arguments(tmp_path, max_steps=1, aux_loss_coef=0.1, loss_type=["hinge", "kto_pair"]),
        train_dataset=pairs(),
        processing_class=tiny_tokenizer(),
        callbacks=[seen],
    )
    trainer.train()
    assert seen.names == {("preference", "kto_pair", "balance")}


def test_a_resumed_run_logs_other_numbers(tmp_path):
    """A checkpoint between two logs: what was summed until then is in the next log."""
    saving = dict(save_strategy="steps", save_steps=2, max_steps=6, logging_steps=3, per_device_train_batch_size=2)
    logs = []
    for run in (make_trainer(tmp_path, tiny_llama(32, seed=1), **saving) for _ in range(2)):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if logs else None)
        logs.append(
            [{k: v for k, v in log.items() if "runtime" not in k} for log in run.state.log_history if "loss" in log]
        )
    assert len(logs[0]) == 2 and logs[0] == logs[1]
