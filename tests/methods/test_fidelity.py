"""The study's losses, a blurred teacher, the report and the callback."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset

from hf_distill import DistillSFTTrainer
from hf_distill.losses import HeadLogits
from hf_distill.methods.fidelity import (
    FidelityCallback,
    FidelityConfig,
    build_objective,
    build_trainer,
    evaluate,
    fidelity_report,
    gkd_loss,
    markdown_table,
    seq_kd_loss,
)
from hf_distill.signals import Signals
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.noisy import NoisyTeacher
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer


# ---- losses ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_seq_kd_is_not_the_mean_of_each_sequences_mean(divergence):
    s, t = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 9, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = 0.0
    for b, count in ((0, 4), (1, 1)):
        for i in range(5):
            q, p = (s[b, i] / 2).softmax(0), (t[b, i, :7] / 2).softmax(0)
            first, second = (p, q) if divergence == "forward_kl" else (q, p)
            value = sum((first[v] + 1e-9) * (first[v] / second[v]).log() for v in range(7))
            expected += mask[b, i] * value / count / 2
    found = seq_kd_loss(s, t, mask, divergence, temperature=2.0, t_squared=False)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(seq_kd_loss(s, t, mask, divergence, temperature=2.0), 4 * found)
    s[2], t[0, 4] = 1e3, 1e3  # nothing there counts
    torch.testing.assert_close(seq_kd_loss(s, t, mask, divergence, temperature=2.0), 4 * found)


def test_gkd_is_a_mean_over_sequences_or_weighs_the_wrong_side():
    s, t = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, -100], [-100, -100, 5, -100]])
    rows = []
    for b, i in (labels != -100).nonzero().tolist():
        q, p = s[b, i].softmax(0), t[b, i].softmax(0)
        m = 0.3 * p + 0.7 * q
        rows.append(0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum())
    torch.testing.assert_close(gkd_loss(s, t, labels, beta=0.3), torch.stack(rows).mean())
    assert gkd_loss(t, t, labels).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_dtype_is_refused_or_the_teacher_learns(dtype):
    s, t = (torch.randn(2, 3, 5).to(dtype).requires_grad_() for _ in range(2))
    mask = torch.ones(2, 3, dtype=torch.bool)
    (seq_kd_loss(s, t, mask) + seq_kd_loss(s, t, mask, "reverse_kl") + gkd_loss(s, t, mask.long())).backward()
    assert t.grad is None and s.grad.abs().sum() > 0 and s.grad.dtype == dtype


def test_a_wrong_setting_of_the_losses_is_taken():
    z, mask = torch.randn(1, 2, 3), torch.ones(1, 2)
    with pytest.raises(ValueError, match="divergence must be forward_kl or reverse_kl, got 'jsd'"):
        seq_kd_loss(z, z, mask, "jsd")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        seq_kd_loss(z, z, mask, temperature=0)
    assert seq_kd_loss(z, z + 1, torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fidelity_loss": "jsd"}, "fidelity_loss must be one of forward_kl"),
        ({"kd_weight": math.nan}, "kd_weight must lie between 0 and 1, got nan"),
        ({"temperature": math.inf}, "temperature must be positive, got inf"),
        ({"teacher_logit_noise_std": -1.0}, "teacher_logit_noise_std must be 0 or positive"),
        ({"fidelity_loss": "gkd", "temperature": 2.0}, "gkd has no temperature"),
        ({"topk": []}, "topk must hold numbers"),
        ({"answer_extractor": "digits"}, "answer_extractor must be"),
    ],
)
def test_a_wrong_config_is_taken(settings, said):
    with pytest.raises(ValueError, match=said):
        FidelityConfig(**settings)


def test_a_hot_temperature_is_taken_in_silence(caplog):
    with caplog.at_level(logging.WARNING, "hf_distill"):
        FidelityConfig(temperature=2.0)
        assert not caplog.text
        FidelityConfig(temperature=5.0)
    assert "temperature 5: at 5 the study's 0.5B student fell" in caplog.text


def test_the_objective_averages_or_weighs_otherwise_than_the_study():
    hot = build_objective(FidelityConfig(fidelity_loss="forward_kl", temperature=2.0, kd_weight=0.75))
    assert hot.weights(0.0) == {"label": 0.25, "kd": 3.0} and hot.per == "sample"
    assert build_objective(FidelityConfig(fidelity_loss="gkd")).per == "token"
    assert not build_objective(FidelityConfig(fidelity_loss="labels")).uses_teacher


# ---- a blurred teacher ----------------------------------------------------------------------------------------------
class Says(Teacher):
    """The same logits whatever it is shown."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, batch, needs=frozenset({"logits"})):
        return Signals(logits=self.logits)


def test_noise_has_another_size_or_is_there_without_being_asked_for():
    head = HeadLogits(torch.randn(50, 4), torch.randn(400, 4))
    assert NoisyTeacher(Says(head), 0.0)({}).logits is head
    noisy = NoisyTeacher(Says(head), 2.0)
    with torch.no_grad():
        assert noisy({}).logits is head  # evaluation
    noise = noisy({}).logits - head.dense()
    assert noise.std().item() == pytest.approx(2, rel=0.02) and noise.mean().item() == pytest.approx(0, abs=0.05)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="std must be 0 or positive and finite"):
            NoisyTeacher(Says(head), std)


def test_noise_is_the_same_at_every_step_or_forgotten_by_a_resumed_run():
    logits = torch.zeros(3, 5)
    noisy, resumed = (NoisyTeacher(Says(logits), 1.0, seed=4) for _ in range(2))
    first, second = noisy({}).logits, noisy({}).logits
    noisy.after_step(1)
    third = noisy({}).logits
    assert not first.equal(second) and not first.equal(third) and not second.equal(third)
    noisy.after_step(7)
    resumed.load_state_tensors({name: value.clone() for name, value in noisy.state_tensors().items()})
    assert resumed({}).logits.equal(noisy({}).logits)
    assert not NoisyTeacher(Says(logits), 1.0, seed=5)({}).logits.equal(first)
    with pytest.raises(ValueError, match="no state of .* noise"):
        resumed.load_state_tensors({})


def losses(tmp_path, std: float) -> float:
    """KL to the teacher as it is, after a few steps."""
    config = FidelityConfig(fidelity_loss="forward_kl", teacher_logit_noise_std=std)
    settings = dict(per_device_train_batch_size=8, max_steps=30, learning_rate=2e-2, logging_steps=100)
    trainer = build_trainer(
        tiny_llama(seed=1), FrozenTeacher(tiny_llama(32, seed=2)), text_dataset(16), config,
        sft_arguments(tmp_path / str(std), **settings),
        eval_dataset=text_dataset(16), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate()["eval_teacher_kl"]


def test_more_noise_teaches_as_much(tmp_path):
    clean, little, much = (losses(tmp_path, std) for std in (0.0, 1.0, 5.0))
    assert clean < little < much


# ---- the report -----------------------------------------------------------------------------------------------------
def questions(n: int) -> Dataset:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{2 * i % 60} w3"} for i in range(n)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    student, teacher = tiny_llama(seed=1), tiny_llama(32, seed=2)
    args = sft_arguments(folder, per_device_eval_batch_size=3)
    config = FidelityConfig(generate=True, answer_tokens=4)
    before = student.state_dict().keys()
    found = evaluate(student, teacher, questions(7), config, args, control=teacher, processing_class=tiny_tokenizer())
    assert student.state_dict().keys() == before  # clean
    return found, folder


def test_a_report_misses_a_measure_or_is_not_written(report):
    found, folder = report
    names = {"token_top1_agreement", "kl_teacher_student", "kl_student_teacher", "tvd", "student_entropy"}
    names |= {"teacher_entropy", "top5_overlap", "student_accuracy", "teacher_accuracy", "agreement", "rationale_bleu"}
    assert names <= found["student"].keys() and names <= found["control"].keys()
    assert json.loads((folder / "fidelity.json").read_text()) == found
    table = (folder / "fidelity.md").read_text()
    assert table.startswith("| measure | student | control |\n|---|---|---|\n")
    assert "Improvement over the control: " in table and "(paired over 7 examples)" in table


def test_a_control_that_is_the_teacher_differs_from_it(report):
    control = report[0]["control"]
    assert control["agreement"] == control["token_top1_agreement"] == control["rationale_bleu"] == 1
    assert control["kl_teacher_student"] == 0 and report[0]["student"]["kl_teacher_student"] > 0.1


def test_a_weak_teacher_is_not_warned_of(caplog, monkeypatch):
    texts = {"student": "w1", "teacher": "w2"}
    student, teacher = tiny_llama(seed=1), tiny_llama(32, seed=2)
    said = lambda model, *_, **__: [texts["teacher" if model is teacher else "student"]] * 4  # noqa: E731
    monkeypatch.setattr("hf_distill.methods.fidelity.greedy_texts", said)
    rows = Dataset.from_list([{"prompt": "w5", "completion": " w1"}] * 4)
    config, own = FidelityConfig(generate=True), {"processing_class": tiny_tokenizer()}
    with caplog.at_level(logging.WARNING, "hf_distill"):
        found = fidelity_report(student, teacher, rows, tiny_llama(seed=3), config=config, **own)
    assert found["improvement"] == 0 and found["student"]["teacher_accuracy"] == 0
    assert "the teacher's accuracy 0.000 is below the 1.000" in caplog.text
    assert "**Warning.** The teacher's accuracy" in markdown_table(found)


def test_no_questions_or_no_rows_are_found_late():
    models = tiny_llama(seed=1), tiny_llama(32, seed=2)
    with pytest.raises(ValueError, match="need the columns prompt and completion, or messages, got text"):
        fidelity_report(*models, text_dataset(3), config=FidelityConfig(generate=True))
    with pytest.raises(ValueError, match="the evaluation dataset is empty"):
        fidelity_report(*models, text_dataset(3).select([]))


# ---- the callback ---------------------------------------------------------------------------------------------------
def test_the_callback_logs_nothing_or_other_numbers_than_the_report(tmp_path, report):
    student, teacher = tiny_llama(seed=1), tiny_llama(32, seed=2)
    callback = FidelityCallback(teacher, questions(7), generate=True, answer_tokens=4, batch_size=2)
    trainer = DistillSFTTrainer(
        student, teacher=teacher, args=sft_arguments(tmp_path), train_dataset=questions(7),
        eval_dataset=questions(7), processing_class=tiny_tokenizer(), callbacks=[callback],
    )  # fmt: skip
    found = trainer.evaluate()
    expected = {f"eval_fidelity/{k}": v for k, v in report[0]["student"].items() if k not in ("cross_entropy", "ece")}
    assert {k: v for k, v in found.items() if "fidelity/" in k} == pytest.approx(expected, abs=1e-6)
    assert trainer.state.log_history[-1]["eval_fidelity/agreement"] == found["eval_fidelity/agreement"]
    with pytest.raises(ValueError, match="give FidelityCallback a teacher and eval_dataset"):
        FidelityCallback(generate=True)
