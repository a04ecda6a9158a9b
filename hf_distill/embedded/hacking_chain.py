"""A controlled chain oracle -> teacher -> student on characters, small enough for a CPU, in which hacking can be seen.

The oracle is trained on text and is the truth from then on. The teacher is trained a little too long on few of the
oracle's answers, so it is imperfect; the student begins as a short training on the same answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_distill.curricula.responses import answered, writer_of
from hf_distill.teachers import FrozenTeacher

logger = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a chain: (hidden, layers) and steps of batches of 32."""

    oracle: tuple[int, int] = (96, 3)
    teacher: tuple[int, int] = (64, 2)
    student: tuple[int, int] = (48, 2)
    oracle_steps: int = 1500
    teacher_steps: int = 600
    student_steps: int = 100
    oracle_answers: int = 1000
    prompts: int = 1500
    eval_prompts: int = 200
    prompt_tokens: int = 8
    answer_tokens: int = 24
    learning_rate: float = 2e-3


@dataclass
class Chain:
    """A chain, ready for a run.

    Attributes:
        train, validation: `prompt`, and the text's own `completion`, from different parts of the text.
    """

    tokenizer: PreTrainedTokenizerFast
    oracle: FrozenTeacher
    teacher: FrozenTeacher
    student: LlamaForCausalLM
    train: Dataset
    validation: Dataset
    shape: Shape = field(default_factory=Shape)


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A token per character of a text."""
    words = {word: i for i, word in enumerate((*SPECIAL, *sorted(set(text))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def small_llama(vocabulary: int, size: tuple[int, int], seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    hidden, layers = size
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.05,  # learns faster at this size than the default 0.02
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def make_oracle(text: str, tokenizer, shape: Shape, seed: int = 0) -> FrozenTeacher:
    """The truth: a language model of a text."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    length = shape.prompt_tokens + shape.answer_tokens
    draw = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(len(ids) - length, (32,), generator=draw)
            yield torch.stack([ids[start : start + length] for start in starts])

    model = small_llama(len(tokenizer), shape.oracle, seed)
    return FrozenTeacher(
        _fitted(model, batches(), 1, shape.oracle_steps, shape.learning_rate), tokenizer, name="oracle"
    )


def make_chain(text: str, tokenizer, oracle: FrozenTeacher, shape: Shape, seed: int) -> Chain:
    """Teacher and first student of an oracle, and the prompts of stage 2; the last tenth of the text validates."""
    cut = int(0.9 * len(text))
    draw = torch.Generator().manual_seed(seed)

    def pieces(part: str, count: int) -> Dataset:
        length, first = shape.prompt_tokens + shape.answer_tokens, shape.prompt_tokens
        starts = torch.randint(len(part) - length, (count,), generator=draw).tolist()
        texts = [part[start : start + length] for start in starts]
        return Dataset.from_dict({"prompt": [t[:first] for t in texts], "completion": [t[first:] for t in texts]})

    asked = pieces(text[:cut], shape.oracle_answers)["prompt"]
    writer = writer_of(oracle, tokenizer, torch.device("cpu"), 512)
    rows = answered(writer, asked, max_new_tokens=shape.answer_tokens, seed=seed)
    rows = [row for row in rows["input_ids"] if len(row) == shape.prompt_tokens + shape.answer_tokens]
    data = torch.tensor(rows)

    def fitted(size: tuple[int, int], steps: int, own_seed: int) -> LlamaForCausalLM:
        order = torch.Generator().manual_seed(own_seed)
        batches = (data[torch.randint(len(data), (32,), generator=order)] for _ in range(steps))
        model = small_llama(len(tokenizer), size, own_seed)
        return _fitted(model, batches, shape.prompt_tokens, steps, shape.learning_rate)

    teacher = FrozenTeacher(fitted(shape.teacher, shape.teacher_steps, 100 + seed), tokenizer, name="imperfect teacher")
    return Chain(
        tokenizer,
        oracle,
        teacher,
        fitted(shape.student, shape.student_steps, 200 + seed),
        pieces(text[:cut], shape.prompts),
        pieces(text[cut:], shape.eval_prompts),
        shape,
    )


def _fitted(model: LlamaForCausalLM, batches: Iterator[Tensor], first: int, steps: int, rate: float):
    """Next-token training on ids (32, S) from place `first` on; AdamW with a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for _, ids in zip(range(steps), batches, strict=False):
        logits = model(ids, use_cache=False).logits[:, first - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, first:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


__all__ = ["Chain", "Shape", "character_tokenizer", "make_chain", "make_oracle", "small_llama"]
