"""Preference distillation: the teacher, of any width, is the reference."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, TrainerCallback

from hf_distill import AdapterOffTeacher, DistillDPOConfig, DistillDPOTrainer, FrozenTeacher
from tests.helpers import tiny_llama, tiny_tokenizer

PAIRS = [("w1 w2", " w3 w4", " w5"), ("w6", " w7 w8 w9", " w1 w2"), ("w4 w5 w6", " w2", " w8"), ("w9", " w9", " w8 w7")]


def make_trainer(folder, teacher=None, *, student=None, callbacks=None, **settings):
    peft = settings.pop("peft_config", None)
    plain = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)
    batch = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, beta=0.2, gradient_checkpointing=False)
    return DistillDPOTrainer(
        tiny_llama() if student is None else student,
        teacher=teacher,
        args=DistillDPOConfig(output_dir=str(folder), **plain | batch | settings),
        train_dataset=Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft,
    )


def log_probability(model, prompt: str, answer: str) -> torch.Tensor:
    tokenizer = tiny_tokenizer()
    start, ids = (tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (prompt, prompt + answer + "<eos>"))
    ids = ids if ids[-1] == 1 else torch.cat([ids, torch.tensor([1])])
    with torch.no_grad():
        log_probs = model.eval()(ids[None]).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[1:, None])[len(start) - 1 :].sum()


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_teacher_equal_to_the_student_starts_elsewhere_than_at_log_2(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama())
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first


@pytest.mark.parametrize("lora", [False, True])
def test_a_teacher_of_another_width_is_not_the_reference(tmp_path, lora):
    model = tiny_llama(32, 3, vocabulary=72, seed=1)  # and with a padded vocabulary
    before = {k: v.clone() for k, v in model.state_dict().items()}
    peft = LoraConfig(r=2, target_modules="all-linear") if lora else None
    trainer = make_trainer(tmp_path, FrozenTeacher(model, tiny_tokenizer()), peft_config=peft)
    student, margins = tiny_llama(), []
    for prompt, chosen, rejected in PAIRS:
        ours, theirs = (
            log_probability(m, prompt, chosen) - log_probability(m, prompt, rejected) for m in (student, model)
        )
        margins.append(0.2 * (ours - theirs))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(-logsigmoid(torch.stack(margins)).mean().item(), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert trainer.teacher.model is model


def test_a_preference_run_without_a_teacher_starts(tmp_path):
    for given in (None, AdapterOffTeacher()):
        with pytest.raises(
            ValueError, match="preference distillation needs a teacher model as its reference: .*--teacher"
        ):
            make_trainer(tmp_path, given)
    with pytest.raises(ValueError, match="measure_teacher_fidelity does not read preference pairs"):
        make_trainer(tmp_path, tiny_llama(seed=1), measure_teacher_fidelity=1)
    with pytest.raises(ValueError, match="tokenizers differ: id 64"):
        other = tiny_tokenizer()
        other.add_tokens(["extra"])
        make_trainer(tmp_path, FrozenTeacher(tiny_llama(vocabulary=72, seed=1), other))


def test_it_leaves_traces_or_does_not_resume(tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4)
    trainer = make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving)
    trainer.train()
    trainer.save_model()
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with pytest.raises(ValueError, match="holds another run"):
        make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving).train()
    again = make_trainer(tmp_path / "a", tiny_llama(32, seed=1), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = again.student().state_dict(), trainer.student().state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_an_infinite_preference_loss_is_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.lm_head.weight.data.fill_(float("nan"))

    saving = dict(save_strategy="steps", save_steps=1, max_steps=3, logging_steps=100)
    trainer = make_trainer(tmp_path, tiny_llama(32, seed=1), callbacks=[Break()], **saving)
    with pytest.raises(FloatingPointError, match="loss became NaN or infinite by step 2; nothing was saved"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
