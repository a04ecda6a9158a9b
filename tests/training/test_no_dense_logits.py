"""No tensor of tokens × vocabulary may exist in a step of a language model, in training or evaluation."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_distill import DistillSFTTrainer, FeatureKD, FrozenTeacher, LogitKD
from tests.helpers import sft_arguments, tiny_llama, tiny_tokenizer

VOCABULARY, TOKENS = 4096, 256


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, and which."""

    def __init__(self):
        super().__init__()
        self.elements, self.made_by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.made_by = tensor.numel(), str(func)
        return out


def trainer(folder, **settings):
    rows = Dataset.from_list([{"text": " ".join(f"w{(i + j) % 61}" for j in range(TOKENS // 8))} for i in range(8)])
    objective = LogitKD("reverse_kl", label_weight=0.5) + LogitKD("generalized_jsd", per="sample") + FeatureKD()
    return DistillSFTTrainer(
        tiny_llama(16, 1, vocabulary=VOCABULARY),
        teacher=FrozenTeacher(tiny_llama(32, 1, vocabulary=VOCABULARY)),
        objective=objective,
        args=sft_arguments(
            folder,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            tile_megabytes=1,  # 32 rows of both models' float32 logits
            **{"max_length": 64} | settings,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )


def largest(trainer, train: bool) -> LargestTensor:
    loader = trainer.get_train_dataloader() if train else trainer.get_eval_dataloader()
    batches, _ = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
    assert batches[0]["input_ids"].numel() >= TOKENS
    if not train:
        trainer._eval_totals = {}
    with LargestTensor() as mode:
        if train:
            trainer.training_step(trainer.model, batches[0])
        else:
            trainer.prediction_step(trainer.model, batches[0], prediction_loss_only=True)
    return mode


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_step_makes_no_tensor_of_tokens_by_vocabulary(train, checkpointing, tmp_path):
    found = largest(trainer(tmp_path, gradient_checkpointing=checkpointing), train)
    assert found.elements <= TOKENS * VOCABULARY // 4, (found.elements, found.made_by)


def test_packing_makes_none_either(tmp_path):
    found = largest(trainer(tmp_path, padding_free=True, max_length=None), train=True)
    assert found.elements <= TOKENS * VOCABULARY // 4, (found.elements, found.made_by)


def test_the_measure_sees_dense_logits(tmp_path):
    assert largest(trainer(tmp_path, dense_logits=True), train=True).elements >= TOKENS * VOCABULARY
