"""The student's own weights, averaged: against a loop in float64, and through the student's modules without a trace."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import EMATeacher, EMATeacherCallback
from hf_distill.training.saving import FILE, KEY
from tests.helpers import relative_difference, tiny_llama
from tests.teachers.test_frozen import NEEDS, batch_of
from tests.teachers.test_peer import make_trainer


class Weights(TrainerCallback):
    """The student's weights before training and after each step."""

    def __init__(self):
        self.seen: list[dict] = []

    def _keep(self, args, state, control, model=None, **kwargs):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters() if KEY not in n})

    on_train_begin = on_step_end = _keep


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_another_than_a_loop_in_float64_finds(tmp_path, warmup):
    seen, teacher = Weights(), EMATeacher(decay=0.6, warmup=warmup, dense_logits=False)
    trainer = make_trainer(tmp_path, teacher, callbacks=[seen], max_steps=12, gradient_accumulation_steps=2)
    trainer.train()
    expected = {n: w.double() for n, w in seen.seen[0].items()}
    for step, weights in enumerate(seen.seen[1:], start=1):
        decay = min(0.6, (1 + step) / (10 + step)) if warmup else 0.6
        for name, weight in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.double()
    assert len(seen.seen) == 13
    assert relative_difference({n: a.double() for n, a in teacher.averages.items()}, expected) < 1e-6
    assert relative_difference(seen.seen[-1], {n: e.float() for n, e in expected.items()}) > 1e-2


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_average_speaks_with_weights_of_the_student_or_disturbs_it(dense, tied):
    """Head, embeddings and norms included; a student in train mode, with dropout."""
    student, batch = tiny_llama(seed=1, attention_dropout=0.5, tie_word_embeddings=tied), batch_of()
    teacher = EMATeacher(dense_logits=dense)
    teacher.attach(student)
    reference = tiny_llama(seed=2, tie_word_embeddings=tied).eval()
    for name, average in teacher.averages.items():
        average.copy_(reference.get_parameter(name))
    student.train()
    student.model.norm.eval()  # a module with a mode of its own
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in student.named_parameters()}
    modes, drawn = {n: m.training for n, m in student.named_modules()}, torch.random.get_rng_state()
    signals = teacher(batch, NEEDS)
    said = signals.logits if dense else signals.logits.dense()
    own = reference(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(said, own.logits.flatten(0, 1)[batch["loss_rows"]].detach())
    torch.testing.assert_close(signals.hidden_states[1], own.hidden_states[1].detach())
    assert not said.requires_grad
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in student.named_parameters())
    assert {n: m.training for n, m in student.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_under_autocast_the_student_gets_the_averages_or_no_gradient():
    """Autocast keeps the low-precision copy of a weight that it has cast once."""
    student, teacher, batch = tiny_llama(seed=1).train(), EMATeacher(), batch_of()
    teacher.attach(student)
    for average in teacher.averages.values():
        average.mul_(1.5)
    results = []
    for first in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if first:
                assert teacher(batch).logits.hidden.dtype == torch.float32  # the final norm's
            loss = student(batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad.clone() for n, p in student.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = teacher(batch).logits.hidden
    assert not torch.equal(low, teacher(batch).logits.hidden), "the average is to run under the run's autocast"


def test_the_average_of_a_lora_student_is_of_its_adapter(tmp_path):
    teacher = EMATeacher(0.5)
    trainer = make_trainer(tmp_path, teacher, lora=True, save_strategy="steps", save_steps=2)
    assert len(teacher.averages) == 8 and all("lora_" in name for name in teacher.averages)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / FILE)
    assert {k for k in saved if k.startswith("teacher.")} == {f"teacher.{k}" for k in teacher.averages}
    assert all("lora_" in k for k in load_file(tmp_path / "checkpoint-4/adapter_model.safetensors"))
    trainer.student(merge=True)
    with pytest.raises(ValueError, match="adapter was merged"):
        teacher(batch_of())


def test_the_average_is_kept_in_the_low_precision_of_the_student():
    """bfloat16 cannot tell 1 from 1 + 0.001 · 0.1: an average in it would stand still."""
    student, teacher = tiny_llama(seed=1).bfloat16(), EMATeacher(0.999, warmup=False)
    teacher.attach(student)
    before = {n: a.clone() for n, a in teacher.averages.items()}
    for parameter in student.parameters():
        parameter.data.mul_(1.1)
    teacher.after_step(1)
    assert all(a.dtype == torch.float32 and not torch.equal(a, before[n]) for n, a in teacher.averages.items())
    assert teacher(batch_of()).logits.hidden.dtype == torch.bfloat16


class Pooled(nn.Module):
    """A student with BatchNorm, as `collect` reads one."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.config = nn.BatchNorm1d(4), nn.Linear(4, 3), SimpleNamespace()

    def get_output_embeddings(self):
        return None

    def forward(self, pixel_values, **kwargs):
        return SimpleNamespace(logits=self.head(self.norm(pixel_values)))


def test_batch_statistics_are_averaged_or_moved():
    student, teacher, x = Pooled(), EMATeacher(0.5, warmup=False), torch.randn(6, 4)
    teacher.attach(student)
    student(x)
    with torch.no_grad():
        student.head.weight.add_(1.0)
    teacher.after_step(1)
    statistics = {n: b.clone() for n, b in student.named_buffers()}
    said = teacher({"pixel_values": x}).logits
    assert all(torch.equal(b, statistics[n]) for n, b in student.named_buffers()) and student.training
    normal = (x - statistics["norm.running_mean"]) / (statistics["norm.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(said, normal @ (student.head.weight - 0.5).T + student.head.bias)


def test_the_average_can_be_saved_and_the_student_comes_back(tmp_path):
    teacher = EMATeacher(0.5)
    trainer = make_trainer(tmp_path / "run", teacher)
    trainer.train()
    own = {n: w.clone() for n, w in trainer.model.state_dict().items()}
    with teacher.averaged():
        trainer.save_model(tmp_path / "average")
        inside = trainer.evaluate()
    trainer.save_model(tmp_path / "student")
    average, student = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "student"))
    assert average.keys() == student.keys() == teacher.averages.keys()
    assert all(torch.equal(average[n], a) for n, a in teacher.averages.items())
    assert all(torch.equal(student[n], own[n]) for n in student)
    assert abs(inside["eval_teacher_kl"]) < 1e-6 < trainer.evaluate()["eval_teacher_kl"]


def test_the_callback_averages_otherwise_than_our_trainer_or_beside_it(tmp_path):
    ours = EMATeacher(decay=0.6)
    trainer = make_trainer(tmp_path, ours, callbacks=[], max_steps=3)
    with pytest.raises(ValueError, match="kept by its trainer already"):
        make_trainer(tmp_path, ours, callbacks=[EMATeacherCallback(ours)], max_steps=3).train()
    trainer.train()

    seen, kept = Weights(), EMATeacher(decay=0.6)
    model = tiny_llama()
    rows = [{"input_ids": [3 + i, 4, 5], "labels": [3 + i, 4, 5]} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=3, report_to="none", learning_rate=1e-2, disable_tqdm=True
    )
    Trainer(model, args, train_dataset=rows, callbacks=[seen, EMATeacherCallback(kept)]).train()
    name = "model.norm.weight"
    expected = seen.seen[0][name]
    for step, weights in enumerate(seen.seen[1:], start=1):
        decay = ours.decay_at(step)
        expected = decay * expected + (1 - decay) * weights[name]
    torch.testing.assert_close(kept.averages[name], expected)
    assert not torch.equal(expected, seen.seen[-1][name])
