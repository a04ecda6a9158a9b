"""Tiny models, a tokenizer and data that the trainers' tests share. Everything is made from a config and a seed."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_distill import DistillConfig, DistillDPOConfig, DistillSFTConfig

WORDS = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(61)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """64 whole words: w0 to w60 and <pad>, <eos>, <unk>."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def tiny_llama(hidden: int = 16, layers: int = 2, vocabulary: int = 64, seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        # larger than usual, so that random models differ visibly and gradients are far from rounding noise
        initializer_range=0.2,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | config))


def text_dataset(n: int, seed: int = 0) -> Dataset:
    """Texts of 3 to 11 words."""
    draw = random.Random(seed)
    texts = [" ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(3, 12))) for _ in range(n)]
    return Dataset.from_dict({"text": texts})


_PLAIN = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)


def sft_arguments(output_dir, **settings) -> DistillSFTConfig:
    return DistillSFTConfig(output_dir=str(output_dir), **_PLAIN | dict(max_length=16) | settings)


def dpo_arguments(output_dir, **settings) -> DistillDPOConfig:
    settings = _PLAIN | dict(gradient_checkpointing=False) | settings
    return DistillDPOConfig(output_dir=str(output_dir), **settings)


def plain_arguments(output_dir, **settings) -> DistillConfig:
    return DistillConfig(output_dir=str(output_dir), **_PLAIN | settings)


# One step moves each weight by rate times its gradient, so that nothing hides a wrong scale.
SGD = dict(optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0)


def relative_difference(ours: dict[str, Tensor], reference: dict[str, Tensor], floor: float = 1e-7) -> float:
    """Largest |ours - reference| / |reference| over the tensors whose reference norm is above `floor`."""
    assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
    counted = {n: r for n, r in reference.items() if r.norm() > floor}
    assert counted, "nothing to compare: all references vanish"
    return max(((ours[n] - r).norm() / r.norm()).item() for n, r in counted.items())
