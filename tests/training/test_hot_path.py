"""A training step waits for the device at logging steps only: what would wait on a GPU is counted here on the CPU."""

import inspect
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import hf_distill
from hf_distill import DistillSFTTrainer, DistillTrainer, FeatureKD, FrozenTeacher, LogitKD
from hf_distill.training.callbacks import TeacherAgreementCallback
from tests.helpers import plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

OURS = hf_distill.__path__[0]
WAITS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")
WAITING_OPS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")
COLLATING = ("collators.py", "caches.py")  # before the batch goes to the device


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU, by the line of ours that asked for it."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()
        self.own = {name: getattr(torch.Tensor, name) for name in WAITS}

    def __enter__(self):
        for name, method in self.own.items():
            setattr(torch.Tensor, name, self.counted(method))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.own.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def counted(self, method):
        def wrapper(tensor, *args, **kwargs):
            self.note(sys._getframe(1))
            return method(tensor, *args, **kwargs)

        return wrapper

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in WAITING_OPS:
            self.note(inspect.currentframe().f_back)
        return func(*args, **(kwargs or {}))

    def note(self, frame):
        """The nearest frame, unless something that is not ours (transformers, accelerate) asked below it."""
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        name = "" if frame is None else frame.f_code.co_filename
        if name.startswith(OURS) and not name.endswith(COLLATING):
            self.lines[f"{name.removeprefix(OURS)}:{frame.f_lineno}"] += 1


class Watch(TrainerCallback):
    """Counts from the end of the second step (the first checks the names of the terms) to the end of the fifth."""

    def __init__(self):
        self.waits = Waits()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.waits.__enter__()
        elif state.global_step == 5:
            self.waits.__exit__(None, None, None)


def language(folder, **settings):
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=100) | settings
    return DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher(tiny_llama(32, 1, seed=1)),
        objective=LogitKD("reverse_kl", label_weight=0.5) + LogitKD("forward_kl", per="sample") + FeatureKD(),
        args=sft_arguments(folder, max_steps=6, **settings),
        train_dataset=text_dataset(24),
        processing_class=tiny_tokenizer(),
    )


def test_a_step_of_a_language_model_waits_nowhere(tmp_path):
    trainer, watch = language(tmp_path), Watch()
    trainer.add_callback(TeacherAgreementCallback())
    trainer.add_callback(watch)
    trainer.train()
    assert not watch.waits.lines, watch.waits.lines


def test_the_count_sees_what_waits(tmp_path, monkeypatch):
    trainer, watch = language(tmp_path, logging_steps=1), Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert any("mixin.py" in line for line in watch.waits.lines)  # logging reads its values


def test_a_step_of_a_classifier_waits_nowhere(tmp_path):
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    def bert(hidden, seed):
        torch.manual_seed(seed)
        sizes = dict(hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1, num_attention_heads=2)
        return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **sizes))

    examples = [{"input_ids": [1 + i % 7, 2, 3 + i % 5], "labels": i % 3} for i in range(16)]
    trainer = DistillTrainer(
        bert(8, 0),
        teacher=FrozenTeacher(bert(16, 1)),
        objective=LogitKD(label_weight=0.5),
        args=plain_arguments(tmp_path, max_steps=6, per_device_train_batch_size=2, logging_steps=100),
        train_dataset=Dataset.from_list(examples),
    )
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert not watch.waits.lines, watch.waits.lines


def test_the_loss_waits_nowhere():
    from tests.losses.test_fused import TERMS, gradients, heads, labels_of

    leaves, student, teacher = heads()
    with Waits() as waits:
        values = hf_distill.losses.run_terms(student, teacher, TERMS, labels=labels_of(), tile_rows=2)
        gradients(TERMS, values, leaves)
    assert not waits.lines, waits.lines
