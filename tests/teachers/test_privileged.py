"""Teachers with inputs of their own: the same answer, and what they say is what their model says of their inputs."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPImageProcessorPil,
    DataCollatorWithPadding,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from hf_distill import (
    AdapterOffTeacher,
    DataCollatorForDistillation,
    DistillCallback,
    DistillSFTTrainer,
    DistillTrainer,
    EMATeacher,
    FrozenTeacher,
    MutualKD,
    PeerTeacher,
    PrivilegedTeacher,
    TeacherInputs,
    add_teacher_inputs,
)
from hf_distill.losses import forward_kl
from hf_distill.training.saving import KEY
from tests.helpers import plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.training.test_inputs import llava_processor, tiny_llava

CHAT = (
    "{% for m in messages %}{{ 'w50' if m.role == 'user' else 'w51' if m.role == 'assistant' else 'w52' }} "
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
)


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def questions(conversational: bool, n: int = 6) -> Dataset:
    """Prompts and completions of different lengths, and a hint of one to four words."""
    rows = []
    for i, (prompt, answer) in enumerate(zip(text_dataset(n, 1)["text"], text_dataset(n, 2)["text"], strict=True)):
        hint = " ".join(f"w{i + j}" for j in range(1 + i % 4))
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            answer = [{"role": "assistant", "content": answer}]
        else:
            prompt += " "
        rows.append({"prompt": prompt, "completion": answer, "hint": hint})
    return Dataset.from_list(rows)


def hinted(row: dict) -> dict:
    if isinstance(row["prompt"], str):
        return row | {"prompt": f"{row['hint']} {row['prompt']}"}
    return row | {"prompt": [{"role": "system", "content": row["hint"]}, *row["prompt"]]}


class Batches(DistillCallback):
    """What the teacher got and said, in evaluation and training."""

    def __init__(self):
        self.seen = []

    def on_teacher_forward(self, args, state, control, *, teacher, batch, **kwargs):
        self.seen.append((teacher, batch))


def make_trainer(folder, teacher, data, *, student=None, objective=None, peft_config=None, callbacks=(), **settings):
    settings = dict(max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2) | settings
    return DistillSFTTrainer(
        student or tiny_llama(),
        teacher=teacher,
        objective=objective,
        args=sft_arguments(folder, **dict(max_length=64) | settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=chat_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


# ---- text ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["texts", "conversations", "messages"])
def test_the_helper_tokenises_other_than_the_trainer(form, tmp_path):
    """Without a view of its own, the teacher's columns are those of the student."""
    data = questions(form != "texts")
    plain = make_trainer(tmp_path, tiny_llama(32), data).train_dataset
    if form == "messages":
        data = data.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=data.column_names)
    added = add_teacher_inputs(data, chat_tokenizer())
    assert added["teacher_input_ids"] == plain["input_ids"]
    assert added["teacher_labels"] == plain["labels"]
    assert set(added.column_names) == {*data.column_names, "teacher_input_ids", "teacher_labels"}


@pytest.mark.parametrize("conversational", [False, True])
def test_the_teacher_misses_the_hint_or_its_rows_are_not_the_answer(conversational, tmp_path):
    data = add_teacher_inputs(questions(conversational), chat_tokenizer(), hinted)
    model, batches = tiny_llama(32, 2, seed=1), Batches()
    teacher = PrivilegedTeacher(model)
    trainer = make_trainer(tmp_path, teacher, data, callbacks=[batches], per_device_eval_batch_size=4)
    assert trainer.teacher is teacher and teacher.config is model.config and not teacher.learns
    metrics = trainer.evaluate()
    prepared, student = trainer.train_dataset, tiny_llama().eval()
    said = {}
    for i, example in enumerate(prepared):
        for who, m, p in (("student", student, ""), ("teacher", model, "teacher_")):
            ids, labels = example[p + "input_ids"], example[p + "labels"]
            rows = [s - 1 for s, label in enumerate(labels) if label != -100]
            said[who, i] = m(torch.tensor([ids])).logits[0, rows].detach()
        assert len(example["teacher_input_ids"]) > len(example["input_ids"])
    losses = [forward_kl(said["student", i], said["teacher", i], reduction="none") for i in range(len(prepared))]
    assert metrics["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    signals, batch = batches.seen[0]
    torch.testing.assert_close(signals.logits.dense(), torch.cat([said["teacher", i] for i in range(4)]))
    assert torch.equal(signals.labels, batch["row_labels"]) and len(signals.labels) > 8
    trainer.train()


def test_a_hint_makes_no_difference_to_a_student_that_has_none(tmp_path):
    """The student's own base and its own average, with the hint: they differ from the student without it."""
    data = add_teacher_inputs(questions(False), chat_tokenizer(), hinted)
    for inner, lora in ((AdapterOffTeacher(), LoraConfig(r=2, target_modules=["q_proj"])), (EMATeacher(0.5), None)):
        trainer = make_trainer(tmp_path, PrivilegedTeacher(inner), data, peft_config=lora)
        assert inner.learns == trainer.teacher.learns
        first = trainer.evaluate()
        assert first["eval_teacher_kl"] > 1e-2
        trainer.train()
        assert trainer.evaluate()["eval_teacher_kl"] != first["eval_teacher_kl"]


def test_an_average_behind_a_wrapper_stands_still_or_is_not_resumed(tmp_path):
    data, ends = add_teacher_inputs(questions(False), chat_tokenizer(), hinted), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        inner = EMATeacher(0.5)
        trainer = make_trainer(
            tmp_path, PrivilegedTeacher(inner), data, max_steps=4, save_strategy="steps", save_steps=2
        )
        before = {n: a.clone() for n, a in inner.averages.items()}
        trainer.train(resume_from_checkpoint=resume)
        ends.append(inner.averages)
        assert len(before) > 10 and not [n for n, a in inner.averages.items() if torch.equal(a, before[n])]
    assert all(torch.equal(a, ends[1][n]) for n, a in ends[0].items())


# ---- pictures --------------------------------------------------------------------------------------------------------
def tiny_vit(size: int, seed: int, hidden: int = 16) -> ViTForImageClassification:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=size,
        patch_size=8, num_labels=3, hidden_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(config)


def vit_processor(size: int, mean: float) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3, image_std=[0.25] * 3)


def photos(n: int = 6) -> list[dict]:
    colours = [(40 * i, 250 - 40 * i, 10 * i) for i in range(n)]
    images = [Image.new("RGB", (32, 32), colour) for colour in colours]
    return [{"image": image, "labels": i % 3, "caption": f"w{i} w7"} for i, image in enumerate(images)]


def student_pictures(rows: list[dict]) -> dict:
    pixels = vit_processor(16, 0.5)([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def image_trainer(folder, teacher, collator, objective=None, **settings):
    settings = dict(max_steps=2, per_device_train_batch_size=3, remove_unused_columns=False) | settings
    batches = Batches()
    trainer = DistillTrainer(
        tiny_vit(16, seed=0),
        teacher=teacher,
        objective=objective,
        args=plain_arguments(folder, **settings),
        data_collator=collator,
        train_dataset=photos(),
        eval_dataset=photos(),
        callbacks=[batches],
    )
    return trainer, batches.seen


def test_each_model_gets_the_other_ones_pixels(tmp_path):
    model = tiny_vit(24, seed=1)
    teacher = PrivilegedTeacher(model, inputs=("pixel_values",))
    trainer, seen = image_trainer(tmp_path, teacher, TeacherInputs(student_pictures, vit_processor(24, 0.1)))
    metrics = trainer.evaluate()
    signals, batch = seen[0]
    assert batch["pixel_values"].shape[-1] == 16 and batch["teacher_pixel_values"].shape[-1] == 24
    pixels = vit_processor(24, 0.1)([row["image"] for row in photos()], return_tensors="pt")
    theirs = model(**pixels).logits.detach()
    torch.testing.assert_close(signals.logits, theirs)
    ours = tiny_vit(16, seed=0).eval()(student_pictures(photos())["pixel_values"]).logits.detach()
    assert metrics["eval_loss"] == pytest.approx(forward_kl(ours, theirs).item(), rel=1e-5)
    trainer.train()


def tiny_bert(seed: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )  # fmt: skip
    )


def captions(rows: list[dict]) -> dict:
    tokenizer = tiny_tokenizer()
    return DataCollatorWithPadding(tokenizer)([tokenizer(r["caption"], return_token_type_ids=False) for r in rows])


def test_the_teacher_of_captions_sees_the_picture(tmp_path):
    model = tiny_bert()
    trainer, seen = image_trainer(tmp_path, PrivilegedTeacher(model), TeacherInputs(student_pictures, captions))
    trainer.evaluate()
    signals, batch = seen[0]
    torch.testing.assert_close(signals.logits, model(**captions(photos())).logits.detach())
    assert "pixel_values" not in trainer.teacher.own_batch(batch)
    # or tokenised in advance
    data = add_teacher_inputs(Dataset.from_list(photos()), tiny_tokenizer(), lambda row: {"text": row["caption"]})
    pad = DataCollatorWithPadding(tiny_tokenizer())
    again = TeacherInputs(student_pictures, pad)(list(data))
    assert torch.equal(again["teacher_input_ids"], batch["teacher_input_ids"])
    assert set(again) == {"pixel_values", "labels", "teacher_input_ids", "teacher_attention_mask"}
    student_sees = TeacherInputs(lambda rows: {"columns": set(rows[0])}, pad)(list(data))["columns"]
    assert student_sees == {"image", "labels", "caption"}


def test_a_peer_with_inputs_of_its_own_learns_no_more(tmp_path):
    model = tiny_bert()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer, _ = image_trainer(
        tmp_path, PrivilegedTeacher(PeerTeacher(model, learning_rate=0.02)), TeacherInputs(student_pictures, captions),
        MutualKD(), lr_scheduler_type="constant", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "key.bias" not in n)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.02, 5e-5}
    assert trainer.model.get_submodule(KEY).distill_peer is model


# ---- vision and language ---------------------------------------------------------------------------------------------
def picture_questions(n: int = 5) -> Dataset:
    rows = []
    for i, answer in enumerate(text_dataset(n, seed=3)["text"]):
        rows.append(
            {
                "images": [Image.new("RGB", (16, 16), (i * 40, 10, 200 - i * 30))],
                "prompt": [{"role": "user", "content": f"w{i} w2"}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return Dataset.from_list(rows)


def fine_processor():
    """Twice the resolution: four times the image tokens, another normalisation."""
    processor = llava_processor()
    size = {"height": 32, "width": 32}
    processor.image_processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.1] * 3)
    return processor


def fine_llava() -> LlavaForConditionalGeneration:
    config = tiny_llava(32, 2).config
    config.vision_config.image_size = 32
    torch.manual_seed(2)
    return LlavaForConditionalGeneration(config)


def test_two_families_of_vision_models_answer_different_tokens(tmp_path):
    model, batches, data = fine_llava(), Batches(), picture_questions()
    processors = llava_processor(), fine_processor()
    sides = [DataCollatorForVisionLanguageModeling(p, completion_only_loss=True) for p in processors]
    trainer = DistillSFTTrainer(
        tiny_llava(16, 1),
        teacher=PrivilegedTeacher(model, inputs=("input_ids", "pixel_values")),
        args=sft_arguments(tmp_path, max_length=None, max_steps=2, per_device_train_batch_size=5),
        data_collator=TeacherInputs(*sides),
        train_dataset=data,
        eval_dataset=data,
        processing_class=llava_processor(),
        callbacks=[batches],
    )
    metrics = trainer.evaluate()
    signals, batch = batches.seen[0]
    assert batch["teacher_input_ids"].shape[1] == batch["input_ids"].shape[1] + 12
    assert torch.equal(batch["row_labels"], batch["teacher_row_labels"])
    own = sides[1](list(data))
    with torch.no_grad():
        logits = model(**{k: own[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits[:, :-1]
    torch.testing.assert_close(signals.logits.dense(), logits[own["labels"][:, 1:] != -100])
    assert metrics["eval_teacher_kl"] > 0
    trainer.train()


def test_a_teacher_that_shares_the_text_gets_rows_of_its_own():
    """One tokenizer, two image processors of one size: only the pixels differ."""
    model, data = tiny_llava(32, 1), list(picture_questions(3))
    sides = DataCollatorForVisionLanguageModeling(llava_processor(), completion_only_loss=True)
    size = {"height": 16, "width": 16}
    brighter = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.0] * 3)
    pixels = TeacherInputs(sides, lambda rows: brighter([row["images"][0] for row in rows], return_tensors="pt"))
    batch = DataCollatorForDistillation(pixels)(data)
    teacher = PrivilegedTeacher(model, ("pixel_values",), shared=("input_ids", "attention_mask"))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")} | {"pixel_values": batch["teacher_pixel_values"]}
    said = teacher(batch).logits.dense()
    torch.testing.assert_close(said, model(**inputs).logits.flatten(0, 1)[batch["loss_rows"]].detach())
    inputs["pixel_values"] = batch["pixel_values"]
    assert (model(**inputs).logits.flatten(0, 1)[batch["loss_rows"]] - said).abs().max() > 1e-3
    assert teacher.describe()["teacher_reads"] == "pixel_values, input_ids, attention_mask"


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_missing_columns_are_found_out_late_or_not_named(tmp_path):
    data = questions(False)
    trainer = make_trainer(tmp_path, PrivilegedTeacher(tiny_llama(32, seed=1)), data)
    with pytest.raises(ValueError, match="needs teacher_input_ids, .* has none: make them with add_teacher_inputs"):
        trainer.train()
    without_labels = add_teacher_inputs(data, chat_tokenizer(), hinted).remove_columns("teacher_labels")
    trainer = make_trainer(tmp_path, PrivilegedTeacher(tiny_llama(32, seed=1)), without_labels)
    with pytest.raises(ValueError, match="needs teacher_labels, and .* teacher_input_ids"):
        trainer.train()
    with pytest.raises(ValueError, match="needs pixel_values"):
        PrivilegedTeacher(tiny_llama(), shared=("pixel_values",))({"teacher_input_ids": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"a tuple of names, got 'pixel_values': write \('pixel_values',\)"):
        PrivilegedTeacher(tiny_llama(), inputs="pixel_values")


def test_inputs_that_were_made_twice_are_read(tmp_path):
    data, pad = add_teacher_inputs(questions(False), chat_tokenizer()), DataCollatorForLanguageModeling(pad_token_id=0)
    trainer = make_trainer(tmp_path, PrivilegedTeacher(tiny_llama(32, seed=1)), data)
    trainer.data_collator = DataCollatorForDistillation(TeacherInputs(pad, pad))
    with pytest.raises(ValueError, match="made twice, by TeacherInputs and from the dataset's teacher_ columns"):
        trainer.evaluate()
    cached = FrozenTeacher(tiny_llama())
    cached.readers = ("a reader",)
    with pytest.raises(ValueError, match="is cached and reads no inputs: cache the privileged teacher"):
        PrivilegedTeacher(cached)


def test_other_answers_are_taken_for_the_students():
    pad = DataCollatorForLanguageModeling(pad_token_id=0)
    own = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    theirs = {"teacher_input_ids": [9, 5, 6, 7], "teacher_labels": [-100, -100, 6, 7]}
    features = [own | theirs for _ in range(3)]
    DataCollatorForDistillation(pad)(features)
    features[1]["teacher_labels"] = [-100, -100, 6, 8]
    for collate in (DataCollatorForDistillation(pad), TeacherInputs(pad, pad)):
        with pytest.raises(ValueError, match=r"in document 1 of .*\(example 1\): token 8 instead of 7"):
            collate(features)
    features[1]["teacher_labels"] = [-100, -100, -100, 7]
    for collate in (DataCollatorForDistillation(pad), TeacherInputs(pad, pad)):
        with pytest.raises(ValueError, match=r"\[2, 1, 2\] loss positions per document, the student's \[2, 2, 2\]"):
            collate(features)


def test_rows_that_cannot_be_prepared_are_not_named():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has the columns question: give prompt and completion, messages or text"):
        add_teacher_inputs(Dataset.from_list([{"question": "w1"}]), tokenizer)
    with pytest.raises(ValueError, match="empty completion"):
        add_teacher_inputs(Dataset.from_list([{"prompt": "w1", "completion": ""}]), tokenizer)
    with pytest.raises(ValueError, match="reads the column image, the examples have pixels: set remove_unused_columns"):
        TeacherInputs(lambda rows: {}, vit_processor(16, 0.5))([{"pixels": 1}])
