"""Frozen teachers: what they load, the dtype they speak in, and that nothing ever changes them."""

import copy
import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from datasets import Dataset
from transformers import BitsAndBytesConfig, DataCollatorWithPadding, LlamaForCausalLM

from hf_distill import DataCollatorForDistillation, DistillSFTTrainer, FeatureKD, FrozenTeacher, LogitKD, Teacher
from hf_distill.losses import forward_kl
from hf_distill.signals import HeadLogits
from hf_distill.teachers import load_teacher
from hf_distill.training.fidelity import teacher_fidelity
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

NEEDS = frozenset({"logits", "hidden_states"})


def make_trainer(folder, teacher=None, *, rows=8, student=None, objective=None, callbacks=None, **settings):
    given = {k: settings.pop(k) for k in ("peft_config", "quantization_config") if k in settings}
    settings = dict(max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2) | settings
    return DistillSFTTrainer(
        tiny_llama() if student is None else student,
        teacher=teacher,
        objective=objective or LogitKD(label_weight=0.5),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(rows),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **given,
    )


def batch_of(texts=("w1 w2 w3 w4", "w5 w6 w7 w8 w9 w1")) -> dict:
    tokenizer = tiny_tokenizer()
    pad = DataCollatorWithPadding(tokenizer)

    def collate(features):
        batch = pad(features)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return DataCollatorForDistillation(collate)([tokenizer(text, return_token_type_ids=False) for text in texts])


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(64, 2, seed=1, initializer_range=0.1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# ---- loading ---------------------------------------------------------------------------------------------------------
def test_path_model_and_teacher_are_three_different_teachers(teacher_folder):
    batch = batch_of()
    model = LlamaForCausalLM.from_pretrained(teacher_folder)
    expected = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected.flatten(0, 1)[batch["loss_rows"]].detach()
    own = FrozenTeacher(model)
    assert load_teacher(own) is own
    for teacher in (load_teacher(teacher_folder), load_teacher(model), own):
        assert isinstance(teacher, FrozenTeacher) and not teacher.model.training
        assert not any(p.requires_grad for p in teacher.model.parameters())
        signals = teacher(batch, NEEDS)
        assert isinstance(signals.logits, HeadLogits) and len(signals.hidden_states) == 3
        torch.testing.assert_close(signals.logits.dense(), expected)
    assert load_teacher(model).tokenizer.get_vocab() == load_teacher(teacher_folder).tokenizer.get_vocab()
    with pytest.raises(TypeError, match="a folder, a model or a Teacher, got dict"):
        load_teacher({})


class Doubled(Teacher):
    """Another teacher's logits, doubled: all that a teacher of one's own must give."""

    gives = frozenset({"logits"})

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, batch, needs=frozenset({"logits"})):
        signals = self.inner(batch, needs)
        return dataclasses.replace(signals, logits=2 * signals.logits.dense())


def test_a_teacher_of_one_s_own_cannot_be_written(tmp_path):
    teacher = Doubled(FrozenTeacher(tiny_llama(seed=1)))
    trainer = make_trainer(tmp_path, teacher)
    assert trainer.evaluate(trainer.train_dataset)["eval_teacher_kl"] > 0
    trainer.train()
    with pytest.raises(ValueError, match="FeatureKD needs hidden_states of its teacher, Doubled gives only logits"):
        make_trainer(tmp_path, teacher, objective=FeatureKD())


# ---- its own dtype, never changed ------------------------------------------------------------------------------------
class Record:
    """What a teacher says during training."""

    def __init__(self):
        self.said = []

    def wrap(self, teacher):
        original = type(teacher).__call__

        class Recorded(type(teacher)):
            def __call__(inner, batch, needs=frozenset({"logits"})):
                signals = original(inner, batch, needs)
                again = original(inner, {k: v for k, v in batch.items()}, needs)
                self.said.append((dict(batch), signals.logits, again.logits, torch.is_autocast_enabled("cpu")))
                return signals

        teacher.__class__ = Recorded
        return teacher


def test_the_student_s_autocast_changes_what_the_teacher_says(tmp_path):
    record = Record()
    model = tiny_llama(32, 2, seed=1)
    trainer = make_trainer(tmp_path, record.wrap(FrozenTeacher(model, tiny_tokenizer())), bf16=True)
    trainer.train()
    assert len(record.said) == 2 and all(autocast for *_, autocast in record.said)
    for batch, said, _, _ in record.said:
        with torch.no_grad():
            plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert said.hidden.dtype == torch.float32
        torch.testing.assert_close(said.dense(), plain.flatten(0, 1)[batch["loss_rows"]])


def test_a_bfloat16_teacher_is_cast_or_casts_its_student(tmp_path):
    model = tiny_llama(32, 2, seed=1).bfloat16()
    trainer = make_trainer(tmp_path, FrozenTeacher(model, tiny_tokenizer()))
    trainer.train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_training_changes_its_teacher(tmp_path):
    model = tiny_llama(32, 2, seed=1, attention_dropout=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record = Record()
    trainer = make_trainer(
        tmp_path,
        record.wrap(FrozenTeacher(model, tiny_tokenizer())),
        objective=LogitKD() + FeatureKD(),
        weight_decay=0.5,
    )
    trainer.train()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    for _, said, again, _ in record.said:
        assert not said.hidden.requires_grad and torch.equal(said.hidden, again.hidden)  # no dropout
    theirs = {id(p) for p in model.parameters()}
    assert not theirs & {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}


# ---- quantised -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_is_cast_thawed_or_noisy(teacher_folder, tmp_path, caplog, bits):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path,
            teacher_model_name_or_path=teacher_folder,
            **{f"teacher_load_in_{bits}bit": True, "measure_teacher_fidelity": 2, "logging_steps": 2},
        )
        model = trainer.teacher.model
        kinds = {type(m).__name__ for m in model.modules()}
        before = trainer.teacher(
            batch_of()
        ).logits.dense()  # bitsandbytes' state_dict() itself changes a 4-bit CPU model
        trainer.train()
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds and type(model.lm_head) is torch.nn.Linear
    assert trainer.teacher.describe()["teacher_bits"] == bits
    assert not [r for r in caplog.records if r.name.startswith("bitsandbytes")]
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(trainer.teacher(batch_of()).logits.dense(), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32, {8: torch.int8, 4: torch.uint8}[bits]}

    fidelity, *rest = trainer.state.log_history
    assert not [log for log in rest if "teacher_fidelity/kl" in log]
    exact = LlamaForCausalLM.from_pretrained(teacher_folder).eval()
    divergence, agreement, rows = 0.0, 0, 0
    for first in (0, 2):
        batch = {k: v for k, v in trainer.data_collator([trainer.train_dataset[i] for i in (first, first + 1)]).items()}
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours, theirs = (m(**inputs).logits.flatten(0, 1)[batch["loss_rows"]] for m in (model, exact))
        divergence += forward_kl(ours, theirs, reduction="sum").item()
        agreement += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        rows += len(ours)
    assert fidelity["teacher_fidelity/kl"] == pytest.approx(divergence / rows, rel=1e-4) and divergence > 0
    assert fidelity["teacher_fidelity/agreement"] == pytest.approx(agreement / rows)


def test_measuring_a_teacher_changes_the_training_or_keeps_its_twin(teacher_folder, tmp_path):
    twins = []
    original = FrozenTeacher.full_precision

    class Watched(FrozenTeacher):
        def full_precision(self):
            twin = original(self)
            twins.append((weakref.ref(twin.model), getattr(twin.model, "is_quantized", False)))
            return twin

    runs = []
    for batches in (0, 3):
        teacher = Watched.from_pretrained(teacher_folder, load_in_8bit=True)
        student = tiny_llama(attention_dropout=0.3)
        trainer = make_trainer(tmp_path / str(batches), teacher, student=student, measure_teacher_fidelity=batches)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    gc.collect()
    assert [(ref(), quantised) for ref, quantised in twins] == [(None, False)]


def test_fidelity_is_measured_against_nothing(teacher_folder, tmp_path):
    for given in (FrozenTeacher(tiny_llama(seed=1), tiny_tokenizer()), FrozenTeacher.from_pretrained(teacher_folder)):
        with pytest.raises(ValueError, match="measure_teacher_fidelity .* was not loaded quantised from a path"):
            make_trainer(tmp_path, given, measure_teacher_fidelity=1)
        with pytest.raises(ValueError, match="its full precision is not known"):
            teacher_fidelity(given, [], Accelerator(cpu=True))
    with pytest.raises(ValueError, match="counts batches, got -1"):
        sft_arguments(tmp_path, measure_teacher_fidelity=-1)


def test_the_student_s_quantisation_reaches_the_teacher(teacher_folder, tmp_path):
    from peft import LoraConfig

    trainer = make_trainer(
        tmp_path,
        teacher_folder,
        student=teacher_folder,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    assert trainer.model.get_base_model().is_quantized and not getattr(trainer.teacher.model, "is_quantized", False)


# ---- offloaded -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_teacher_says_something_else(tmp_path, tied):
    model = tiny_llama(32, 2, seed=1, tie_word_embeddings=tied)
    batch = batch_of()
    expected = FrozenTeacher(copy.deepcopy(model))(batch, NEEDS)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    teacher = FrozenTeacher(model, tiny_tokenizer())
    trainer = make_trainer(tmp_path / "offloaded", teacher)
    said = teacher(batch, NEEDS)
    assert torch.equal(said.logits.dense(), expected.logits.dense())
    assert all(torch.equal(a, b) for a, b in zip(said.hidden_states, expected.hidden_states, strict=True))
    trainer.train()
    reference = make_trainer(tmp_path / "plain", FrozenTeacher(tiny_llama(32, 2, seed=1, tie_word_embeddings=tied)))
    reference.train()
    ours, theirs = trainer.model.state_dict(), reference.model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_teacher_on_a_device_map_with_disk_offload_says_something_else(teacher_folder, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    trainer = make_trainer(
        tmp_path,
        teacher_model_name_or_path=teacher_folder,
        teacher_model_init_kwargs={"device_map": device_map, "offload_folder": str(tmp_path / "offload")},
    )
    assert trainer.teacher.model.lm_head.weight.is_meta
    trainer.train()
    batch = batch_of()
    expected = FrozenTeacher.from_pretrained(teacher_folder)(batch, NEEDS)
    said = trainer.teacher(batch, NEEDS).logits
    assert torch.equal(said.dense(), expected.logits.dense())
    assert trainer.teacher(batch, NEEDS).logits.weight is said.weight  # read from disk once, and kept


# ---- inputs of its own -----------------------------------------------------------------------------------------------
def test_a_teacher_with_inputs_of_its_own_sees_the_student_s(tmp_path):
    """It reads a longer prompt before the same answer: its rows lie elsewhere, its answers are the same tokens."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids

    def row(prompt, hint, answer):
        own, theirs = [ids(f"w{i}") for i in prompt], [ids(f"w{i}") for i in hint + prompt]
        said = [ids(f"w{i}") for i in answer] + [1]
        return {
            "input_ids": own + said,
            "labels": [-100] * len(own) + said,
            "teacher_input_ids": theirs + said,
            "teacher_labels": [-100] * len(theirs) + said,
        }

    data = Dataset.from_list([row([1, 2], [9, 8, 7], [3, 4, 5]), row([5], [6, 6], [7]), row([2, 3], [], [4, 4])] * 2)
    model = tiny_llama(32, 2, seed=1)
    trainer = DistillSFTTrainer(
        tiny_llama(),
        teacher=FrozenTeacher(model, tokenizer),
        objective=LogitKD(),
        args=sft_arguments(tmp_path, max_steps=2, per_device_train_batch_size=3, eval_strategy="no"),
        train_dataset=data,
        processing_class=tokenizer,
    )
    ours = tiny_llama().eval()
    losses, rows = 0.0, 0
    for example in data:
        student, teacher = (
            m.eval()(torch.tensor([example[p + "input_ids"]])).logits[0].detach()[
                [i - 1 for i, label in enumerate(example[p + "labels"]) if label != -100]
            ]
            for m, p in ((ours, ""), (model, "teacher_"))
        )  # fmt: skip
        losses += forward_kl(student, teacher, reduction="sum").item()
        rows += len(student)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(losses / rows, rel=1e-4)
    trainer.train()
