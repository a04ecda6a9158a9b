"""What goes into a step: packed documents, images, streams, low precision, compiled backbones."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import (
    DataCollatorForDistillation,
    DistillCallback,
    DistillSFTTrainer,
    FeatureKD,
    FrozenTeacher,
    LogitKD,
    Teacher,
)
from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.training.scaling_cases import Recorder, compare

STEP = SGD | dict(num_train_epochs=1, per_device_train_batch_size=8, per_device_eval_batch_size=8)


class Seen(DistillCallback):
    """Copies of the last step's signals."""

    def on_distill_loss(self, args, state, control, *, student, teacher, terms, **kwargs):
        self.hidden = student.logits.hidden.detach().clone()
        self.teacher_hidden = teacher.logits.hidden.detach().clone()
        self.rows, self.batch = student.rows, student.batch


def ran(folder, data=None, student=None, objective=None, callbacks=(), **settings):
    """A trainer after one step over eight texts, what the optimizer saw, and its evaluation."""
    recorder, seen = Recorder(), Seen()
    trainer = DistillSFTTrainer(
        student or tiny_llama(16, 2, seed=1),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=2)),
        objective=objective or LogitKD(label_weight=0.5, temperature=2.0),
        args=sft_arguments(folder, **STEP | settings),
        train_dataset=data if data is not None else text_dataset(8, seed=4),
        eval_dataset=text_dataset(7, seed=5),
        processing_class=tiny_tokenizer(),
        callbacks=[recorder, seen, *callbacks],
    )
    trainer.train()
    return trainer, recorder.seen, seen


@pytest.mark.parametrize("how", [{"packing": True, "eval_packing": True}, {"padding_free": True, "max_length": None}])
def test_documents_of_one_row_do_not_see_each_other(how, tmp_path):
    apart, expected, seen_apart = ran(tmp_path / "a")
    together, found, seen = ran(tmp_path / "b", **how)
    assert "attention_mask" not in seen.batch and (seen.batch["position_ids"] == 0).sum() >= 8
    assert len(seen.rows.example) == 8, "documents, not packed rows, are samples"
    assert max(compare(found, expected).values()) <= 1e-5
    # the same rows in another order: both models' hidden states, each document by itself
    for ours, theirs in ((seen.hidden, seen_apart.hidden), (seen.teacher_hidden, seen_apart.teacher_hidden)):
        torch.testing.assert_close(ours.sum(0), theirs.sum(0), rtol=1e-4, atol=1e-4)
    metrics, reference = together.evaluate(), apart.evaluate()
    for name in ("eval_loss", "eval_kd", "eval_label", "eval_teacher_kl", "eval_agreement"):
        assert metrics[name] == pytest.approx(reference[name], rel=1e-5)


def test_autocast_is_on_inside_the_redirected_forward(tmp_path):
    """Twice: it must differ from float32, and be what the model itself computes under autocast, bit for bit."""
    settings = dict(learning_rate=0.0, gradient_checkpointing=False)
    exact, _, plain = ran(tmp_path / "a", **settings)
    low, _, seen = ran(tmp_path / "b", bf16=True, **settings)
    assert not torch.equal(plain.hidden, seen.hidden)
    inputs = {k: seen.batch[k] for k in ("input_ids", "attention_mask")}
    model = low.accelerator.unwrap_model(low.model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[seen.rows.index]
    assert torch.equal(seen.hidden, own)
    with torch.no_grad():
        alone = low.teacher.model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[seen.rows.index]
    assert torch.equal(seen.teacher_hidden, alone), "the student's autocast must not change the teacher"
    losses = [t.state.log_history[0]["loss"] for t in (exact, low)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_checkpointing_changes_no_gradient(tmp_path):
    objective = LogitKD() + 0.5 * FeatureKD(layers=((1, 1), (-1, -1)))
    _, plain, _ = ran(tmp_path / "a", gradient_checkpointing=False, objective=objective)
    objective = LogitKD() + 0.5 * FeatureKD(layers=((1, 1), (-1, -1)))
    _, found, _ = ran(tmp_path / "b", gradient_checkpointing=True, objective=objective)
    assert max(compare(found, plain).values()) <= 1e-5


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_backbone_changes_no_number(backend, tmp_path):
    _, plain, _ = ran(tmp_path / "a", gradient_checkpointing=False)
    torch._dynamo.reset()
    trainer, found, _ = ran(tmp_path / "b", gradient_checkpointing=False, torch_compile_backend=backend)
    assert trainer.model.base_model._compiled_call_impl is not None
    assert max(compare(found, plain).values()) <= 1e-5
    trainer.save_model(tmp_path / "out")
    from transformers import LlamaForCausalLM

    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_stream_trains_as_the_list_of_its_rows(tmp_path):
    options = dict(max_steps=2, per_device_train_batch_size=4, train_sampling_strategy="sequential")
    rows = text_dataset(8, seed=4)
    listed, _, _ = ran(tmp_path / "a", data=rows, **options)
    streamed, _, _ = ran(tmp_path / "b", data=rows.to_iterable_dataset(), **options)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (listed, streamed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 2


def test_each_of_several_evaluation_sets_is_measured(tmp_path):
    sets = {"short": text_dataset(3, seed=1), "long": text_dataset(5, seed=2)}
    trainer = DistillSFTTrainer(
        tiny_llama(16, 2, seed=1),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=2)),
        args=sft_arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1),
        train_dataset=text_dataset(8, seed=4),
        eval_dataset=sets,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logged = {k: v for line in trainer.state.log_history for k, v in line.items()}
    for name in sets:
        assert {f"eval_{name}_{k}" for k in ("loss", "kd", "label", "teacher_kl", "agreement")} <= logged.keys()
    assert logged["eval_short_loss"] != logged["eval_long_loss"]


def test_the_launchers_dynamo_setting_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    with pytest.raises(ValueError, match="torch_compile"):
        ran(tmp_path)
    AcceleratorState._reset_state(True)


# ---- images ---------------------------------------------------------------------------------------------------------
IMAGE_ID = 64
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tiny_llava(hidden: int, seed: int) -> LlavaForConditionalGeneration:
    text = tiny_llama(hidden, 2, vocabulary=65).config
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=4)
    )


def llava_processor() -> LlavaProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def pictures(n: int) -> Dataset:
    rows = []
    for i, answer in enumerate(text_dataset(n, seed=3)["text"]):
        messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [Image.new("RGB", (16, 16), (i * 40, 10, 200 - i * 30))], "messages": messages})
    return Dataset.from_list(rows)


def test_images_reach_both_models_and_the_loss_is_exact(tmp_path):
    teacher, losses, recorders, batches = tiny_llava(32, 2), [], [], []
    for per_device, accumulation in ((5, 1), (2, 3)):
        recorder, seen = Recorder(), Seen()
        trainer = DistillSFTTrainer(
            tiny_llava(16, 1),
            teacher=FrozenTeacher(teacher),
            objective=LogitKD(label_weight=0.5),
            args=sft_arguments(
                tmp_path,
                **SGD
                | dict(
                    max_length=None,
                    per_device_train_batch_size=per_device,
                    gradient_accumulation_steps=accumulation,
                    num_train_epochs=1,
                ),
            ),
            train_dataset=pictures(5),
            processing_class=llava_processor(),
            callbacks=[recorder, seen],
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        recorders.append(recorder.seen)
        batches.append(seen.batch)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert max(compare(recorders[1], recorders[0]).values()) <= 1e-5
    assert any("vision_tower" in name for name in recorders[0]), "the image tower must be trained"
    batch = {k: batches[0][k] for k in ("input_ids", "attention_mask", "pixel_values")}
    labels = batches[0]["labels"][:, 1:]
    counted = labels != -100
    with torch.no_grad():
        s, t = (m(**batch).logits[:, :-1][counted] for m in (tiny_llava(16, 1), teacher))
    by_hand = 0.5 * cross_entropy(s, labels[counted])
    by_hand += kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    assert losses[0] == pytest.approx(by_hand.item(), rel=1e-5)


def test_cached_columns_are_given_to_the_model(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 1], "labels": [5, 6, 7, 1], "score": 0.5}] * 4
    base = DataCollatorForLanguageModeling(pad_token_id=0)
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher(tiny_llama(32, 1)),
        args=sft_arguments(tmp_path, max_steps=1, dataset_kwargs={"skip_prepare_dataset": True}),
        data_collator=DataCollatorForDistillation(base, example_columns=("score",)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["cached_score"].tolist() == [0.5] * 4
    trainer.train()
    assert trainer.evaluate()["eval_teacher_kl"] > 0


class HiddenStatesOnly(Teacher):
    """A teacher without a head, such as an encoder or a cache of features."""

    gives = frozenset({"hidden_states"})

    def __init__(self, model):
        self.inner = FrozenTeacher(model)

    @property
    def config(self):
        return self.inner.config

    def __call__(self, batch, needs=frozenset({"hidden_states"})):
        assert needs <= self.gives, f"asked for {sorted(needs)}"
        return replace(self.inner(batch, needs), logits=None)


def test_a_teacher_is_asked_for_what_it_cannot_give(tmp_path):
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=HiddenStatesOnly(tiny_llama(32, 1)),
        objective=FeatureKD(),
        args=sft_arguments(tmp_path, max_steps=1),
        train_dataset=text_dataset(8),
        eval_dataset=text_dataset(4, seed=1),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_feature"] > 0 and metrics["eval_cross_entropy"] > 0 and "eval_teacher_kl" not in metrics
