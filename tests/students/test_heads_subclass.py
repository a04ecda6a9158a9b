"""Classifiers with several outputs per class: exact at the start, saved, loaded by path, under adapters."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_distill.baselines.probe import probe_batch
from hf_distill.students.heads import SubclassHead, class_logits, pooled_rows, subclass_head, with_subclasses
from hf_distill.training.compat import load_model
from tests.baselines.models import bert, resnet, vit
from tests.helpers import tiny_llama

SIZES = dict(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
PIXELS = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16)


def built(kind, config):
    torch.manual_seed(1)
    model = kind(config)
    for parameter in model.parameters():  # biases and positions start as zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def llama():
    config = LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return built(LlamaForSequenceClassification, config)


MODELS = {
    "bert": bert,
    "roberta": lambda: built(RobertaForSequenceClassification, RobertaConfig(**SIZES, num_labels=3)),
    "albert": lambda: built(AlbertForSequenceClassification, AlbertConfig(**SIZES, embedding_size=8, num_labels=3)),
    "distilbert": lambda: built(
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=32, dim=8, hidden_dim=16, n_layers=2, n_heads=2, num_labels=3),
    ),
    "llama": llama,
    "vit": vit,
    "resnet": resnet,
    "convnext": lambda: built(
        ConvNextForImageClassification,
        ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=3, image_size=32),
    ),
}


def said(model):
    with torch.no_grad():
        batch = {
            k: torch.linspace(-2, 2, v.numel()).view_as(v).to(v.dtype).abs() for k, v in probe_batch(model).items()
        }
        return model.eval()(**batch).logits


def trained(model):
    """With outputs that are no copies of each other any more."""
    head = model.get_submodule(subclass_head(model))
    torch.nn.init.normal_(head.outputs.weight)
    return model


def test_class_logits_are_not_the_sum_of_subclass_probabilities():
    outputs = torch.randn(4, 6, dtype=torch.float64)
    expected = torch.stack([outputs.softmax(-1)[:, 2 * c : 2 * c + 2].sum(-1) for c in range(3)], -1)
    torch.testing.assert_close(class_logits(outputs, 2).softmax(-1), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_grown_student_says_something_else_or_does_not_come_back(name, tmp_path):
    model = MODELS[name]()
    before, kind = said(model), type(model)
    student = with_subclasses(model, 4)
    torch.testing.assert_close(said(student), before)
    assert isinstance(student, kind) and student.config.num_labels == 3
    expected = said(trained(student))
    assert not torch.allclose(expected, before, atol=1e-3)
    student.save_pretrained(tmp_path)
    image = "pixel_values" in probe_batch(student)
    auto = AutoModelForImageClassification if image else AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(student) and not any(info.values()), info
    torch.testing.assert_close(said(loaded), expected)
    torch.testing.assert_close(said(load_model(str(tmp_path))), expected)
    out = loaded(**probe_batch(loaded), labels=torch.tensor([1]))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([1])))
    assert type(kind.from_pretrained(tmp_path, config=kind.config_class(**MODELS[name]().config.to_dict()))) is kind


def test_another_process_does_not_load_it_or_loads_it_without_its_class(tmp_path):
    student = trained(with_subclasses(bert(), 3))
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = student.eval()(**probe_batch(student)).logits
    code = f"""
import torch
from transformers import AutoModelForSequenceClassification
try:
    AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    assert "subclasses" in str(error)
else:
    raise AssertionError("stock transformers took it for something else")
import hf_distill.students
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r}).eval()
ids = torch.arange(8)[None]
print(type(model).__name__, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, logits = done.stdout.split(" ", 1)
    assert name == "SubclassesBertForSequenceClassification"
    torch.testing.assert_close(torch.tensor([json.loads(logits)]), expected)


def test_an_adapter_leaves_the_head_behind():
    student = with_subclasses(bert(), 3)
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    path = subclass_head(adapted.get_base_model())
    assert ".modules_to_save." in path
    head = adapted.get_base_model().get_submodule(path)
    assert all(p.requires_grad for p in head.parameters())
    torch.nn.init.normal_(head.outputs.weight)
    expected = said(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(said(merged), expected)
    assert subclass_head(merged) == "classifier"


def test_a_decoder_takes_another_token_than_its_model():
    model = llama()
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 1], [0, 0, 2, 3, 4]])
    head_says = torch.randn(3, 5, 3)
    model.score.register_forward_hook(lambda *_: head_says)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.equal(pooled_rows(head_says, {"input_ids": ids}, model.config), expected)


@pytest.mark.parametrize(
    "model, subclasses, message",
    [
        (lambda: bert(), 0, "at least 1"),
        (lambda: bert(), 2.0, "whole number"),
        (lambda: with_subclasses(bert(), 2), 2, "already"),
        (lambda: get_peft_model(bert(), LoraConfig(target_modules=["query"])), 2, "adapter"),
        (lambda: tiny_llama(), 2, "no sequence or image classifier"),
        (lambda: built(DeiTForImageClassificationWithTeacher, DeiTConfig(**PIXELS, num_labels=3)), 2, "one head"),
    ],
)
def test_a_model_that_cannot_be_divided_is(model, subclasses, message):
    with pytest.raises(ValueError, match=message):
        with_subclasses(model(), subclasses)


def test_a_grown_head_gives_one_subclass_more_than_another():
    linear = torch.nn.Linear(4, 3, bias=False)
    head, x = SubclassHead.grown_from(linear, 5), torch.randn(6, 4)
    torch.testing.assert_close(head(x), linear(x))
    assert head.outputs(x).unflatten(-1, (3, 5)).std(-1).max() < 1e-6
