"""What the trainer benchmarks share: toy models, a tokenizer of whole words, tokens, and stamps of a run's steps."""

from __future__ import annotations

import os
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import logging
import warnings
from collections.abc import Callable

import torch
from datasets import disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

VOCABULARY = 512
SPECIAL = ["<pad>", "<eos>", "<unk>"]
PLAIN = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=10,
    gradient_checkpointing=False,
    dataloader_pin_memory=False,
    learning_rate=1e-3,
)


def llama(hidden: int, layers: int, seed: int, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(LlamaConfig(**settings | config))


def student(hidden: int = 64) -> LlamaForCausalLM:
    return llama(hidden, 2, seed=1)


def teacher(hidden: int = 128) -> LlamaForCausalLM:
    return llama(hidden, 4, seed=2).eval().requires_grad_(False)


def tokenizer() -> PreTrainedTokenizerFast:
    """512 whole words; a chat is its contents, one after the other."""
    words = {word: i for i, word in enumerate(SPECIAL + [f"w{i}" for i in range(len(SPECIAL), VOCABULARY)])}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=4096
    )
    out.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return out


def token_ids(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random tokens, none of them special."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), vocabulary, (n,), generator=draw).tolist() for n in lengths]


def quiet() -> None:
    """No bars, no warnings about toy settings: only the tables."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    for name in ("trl", "hf_distill", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Stamps(TrainerCallback):
    """Process CPU time at the end of each step; seconds per step come from the slope between two of them."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.at: dict[int, float] = {}
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.stamp(state.global_step)

    def stamp(self, step: int) -> None:
        self.at[step] = time.process_time()

    @property
    def seconds_per_step(self) -> float:
        return (self.at[self.last] - self.at[self.first]) / (self.last - self.first)

    @property
    def start_up(self) -> float:
        """From the making of this object to the first step, in seconds."""
        return self.at[self.first] - self.start - self.first * self.seconds_per_step


def stamped(build: Callable[[], object], stamps: Stamps):
    """The trainer after training, each of its steps stamped."""
    trainer = build()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(stamps)
    trainer.train()
    return trainer
