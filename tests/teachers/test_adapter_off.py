"""The student's own base as the teacher: one set of weights, and nothing of the student's state is disturbed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_distill import AdapterOffTeacher, DistillSFTTrainer, FeatureKD, LogitKD
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.teachers.test_frozen import NEEDS, batch_of


def make_trainer(folder, teacher=None, *, base=None, objective=None, lora=None, seed=0, **settings):
    settings = dict(max_steps=3, per_device_train_batch_size=2, learning_rate=3e-2) | settings
    return DistillSFTTrainer(
        tiny_llama() if base is None else base,
        teacher=teacher,
        objective=objective or LogitKD(label_weight=1.0),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(8),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**dict(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]) | (lora or {})),
    )


def disturbed(**lora):
    """A LoRA student whose adapter says something, in train mode with dropout."""
    settings = dict(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]) | lora
    student = get_peft_model(tiny_llama(attention_dropout=0.5), LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    return student.train()


def base_logits(batch) -> torch.Tensor:
    out = tiny_llama().eval()(batch["input_ids"], attention_mask=batch["attention_mask"])
    return out.logits.flatten(0, 1)[batch["loss_rows"]].detach()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_the_teacher_hears_the_adapter_or_leaves_traces(lora, dense):
    student, batch = disturbed(**lora), batch_of()
    expected = base_logits(batch)
    student.base_model.model.model.norm.eval()  # a module with a mode of its own
    frozen = next(p for n, p in student.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    teacher = AdapterOffTeacher(dense_logits=dense)
    teacher.attach(student)
    modes = {name: module.training for name, module in student.named_modules()}
    learn = {name: p.requires_grad for name, p in student.named_parameters()}
    drawn = torch.random.get_rng_state()
    signals = teacher(batch, NEEDS)
    said = signals.logits if dense else signals.logits.dense()
    torch.testing.assert_close(said, expected)
    assert not said.requires_grad and len(signals.hidden_states) == 3
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert {name: p.requires_grad for name, p in student.named_parameters()} == learn
    assert torch.equal(torch.random.get_rng_state(), drawn)
    own = student.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    assert (own[batch["loss_rows"]] - said).abs().max() > 0.1  # the student still has its adapter


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_training_moves_the_base_or_copies_it(tmp_path, lora):
    trainer = make_trainer(
        tmp_path, lora=lora, teacher_adapter_off=True, objective=LogitKD(label_weight=1.0) + FeatureKD()
    )
    assert isinstance(trainer.teacher, AdapterOffTeacher)
    assert trainer.teacher.student is trainer.model  # one set of weights
    first = trainer.evaluate(trainer.train_dataset)
    # a new adapter adds nothing
    assert abs(first["eval_teacher_kl"]) < 1e-6 and first["eval_agreement"] == pytest.approx(1.0)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_teacher_kl"] > 1e-3
    torch.testing.assert_close(trainer.teacher(batch_of()).logits.dense(), base_logits(batch_of()))


def test_checkpointing_changes_what_is_learned(tmp_path):
    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / str(checkpointing), AdapterOffTeacher(), lora={"lora_dropout": 0.2},
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 8
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-6) for n in weights[0])


def test_a_teacher_that_cannot_be_is_taken(tmp_path):
    with pytest.raises(ValueError, match="teacher_adapter_off .* give no other teacher"):
        make_trainer(tmp_path, tiny_llama(seed=1), teacher_adapter_off=True)
    with pytest.raises(ValueError, match="teacher_adapter_off .* give no other teacher"):
        make_trainer(tmp_path, teacher_adapter_off=True, teacher_model_name_or_path="some/teacher")
    with pytest.raises(ValueError, match="needs a PEFT student .* peft_config"):
        DistillSFTTrainer(
            tiny_llama(),
            args=sft_arguments(tmp_path, teacher_adapter_off=True),
            train_dataset=text_dataset(4),
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(ValueError, match="adapter-off teacher has no student"):
        AdapterOffTeacher()(batch_of())
