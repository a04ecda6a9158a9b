"""Callbacks that see signals, terms and text, and two that users get."""

import json

import pytest
import torch
from torch.nn.functional import kl_div
from torch.utils.flop_counter import FlopCounterMode

from hf_distill import (
    DistillCallback,
    DistillSFTTrainer,
    FeatureKD,
    FrozenTeacher,
    LogitKD,
    SampleCompletionsCallback,
    TeacherAgreementCallback,
)
from hf_distill.objectives import Objective
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer


class Recorder(DistillCallback):
    def __init__(self):
        self.events, self.steps, self.logits, self.texts = [], [], [], []

    def on_teacher_forward(self, args, state, control, *, teacher, batch, **kwargs):
        self.events.append("teacher")
        assert teacher.logits is not None and "input_ids" in batch

    def on_distill_loss(self, args, state, control, *, student, teacher, terms, **kwargs):
        self.events.append("loss")
        self.steps.append(state.global_step)
        self.logits.append((student.logits.dense().detach(), teacher.logits.dense()))
        assert terms["logitkd/kd"].per in ("token", "sample") and terms["logitkd/kd"].value.requires_grad

    def on_distill_step(self, args, state, control, *, terms, objective, **kwargs):
        self.events.append("step")
        assert isinstance(objective, Objective) and {"logitkd/kd", "featurekd/feature"} < terms.keys()
        assert not any(v.requires_grad for v in terms.values())

    def on_distill_log(self, args, state, control, *, logs, accelerator, **kwargs):
        self.events.append("log")
        logs["mine"] = accelerator.num_processes

    def on_generate(self, args, state, control, *, prompts, completions, **kwargs):
        self.events.append("text")
        self.texts.append((state.global_step, prompts, completions))


def objective(per="token"):
    return LogitKD(label_weight=0.5, per=per) + FeatureKD()


def make_trainer(folder, callbacks, objective=None, **settings):
    settings = dict(max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2) | settings
    return DistillSFTTrainer(
        tiny_llama(),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=1), tiny_tokenizer()),
        objective=objective or LogitKD(label_weight=0.5) + FeatureKD(),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(16),
        eval_dataset={"a": text_dataset(3, seed=1), "b": text_dataset(2, seed=2)},
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def test_an_event_is_missed(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], logging_steps=2)
    trainer.train()
    step = ["teacher", "loss", "teacher", "loss", "step"]
    assert recorder.events == [*step, *step, "log"] * 2
    assert [log["mine"] for log in trainer.state.log_history if "loss" in log] == [1, 1]
    recorder.events.clear()
    trainer.evaluate()
    assert recorder.events == ["teacher", "teacher"]


@pytest.mark.parametrize("per", ["token", "sample"])
def test_agreement_is_not_what_one_computes_by_hand(tmp_path, per):
    recorder = Recorder()
    callbacks = [recorder, TeacherAgreementCallback()]
    trainer = make_trainer(tmp_path, callbacks, logging_steps=2, learning_rate=3e-2, objective=objective(per))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "agreement" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log, steps in zip(logs, ({0, 1}, {2, 3}), strict=True):
        means = []
        for step in steps:
            taken = [pair for at, pair in zip(recorder.steps, recorder.logits, strict=True) if at == step]
            ours, theirs = (torch.cat(side) for side in zip(*taken, strict=True))
            agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
            kl = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean").item()
            means.append((agreement, kl))
        agreement, divergence = (sum(values) / 2 for values in zip(*means, strict=True))
        assert log["agreement"] == pytest.approx(agreement) and log["teacher_kl"] == pytest.approx(divergence, rel=1e-4)
    assert logs[0]["teacher_kl"] != logs[1]["teacher_kl"]


def test_agreement_costs_a_projection_or_moves_the_student(tmp_path):
    def run(callbacks):
        trainer = make_trainer(tmp_path, callbacks)
        with FlopCounterMode(display=False) as flops:
            trainer.train()
        return flops.get_total_flops(), torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    (plain, without), (measured, student) = run([]), run([TeacherAgreementCallback()])
    assert measured == plain and torch.equal(student, without)


def test_samples_are_not_written_or_not_announced(tmp_path):
    recorder, prompts = Recorder(), ["w1 w2 w3", "w4"]
    reference = tiny_llama(32, 3, seed=1)
    samples = SampleCompletionsCallback(prompts, max_new_tokens=3, reference=reference)
    trainer = make_trainer(tmp_path, [samples, recorder], eval_strategy="steps", eval_steps=2)
    draws = []
    original = samples.complete

    def complete(model, processing_class):
        state, mode = torch.random.get_rng_state(), model.training
        texts = original(model, processing_class)
        draws.append(torch.equal(state, torch.random.get_rng_state()) and model.training == mode)
        return texts

    samples.complete = complete
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (s, p) for s in (2, 4) for p in prompts
    ]  # once a step
    assert [step for step, *_ in recorder.texts] == [2, 4] and recorder.texts[0][1] == prompts
    assert [line["student"] for line in lines] == [text for *_, texts in recorder.texts for text in texts]
    assert all(draws) and len(draws) == 3  # the student twice, the reference once

    tokenizer = tiny_tokenizer()
    for model, key in ((trainer.model, "student"), (reference, "teacher")):
        ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            for _ in range(3):
                ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == 1:
                    break
        assert lines[2][key] == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="at least one prompt"):
        SampleCompletionsCallback([])
