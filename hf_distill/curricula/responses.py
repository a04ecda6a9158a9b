"""Answers that a model writes to a data set's prompts: once, or anew in every epoch.

Every draw is decided by (seed, round, prompt, place among a prompt's answers), so a resumed run reads what the first
one read, and ranks share the writing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from hf_distill.teachers import FrozenTeacher, LocalTextTeacher, Teacher
from hf_distill.teachers.text import Prompt

ROUND = 1_000_003  # between the seeds of two rounds


def prompts_of(dataset: Dataset) -> list[Prompt]:
    """The prompts of a data set: its column `prompt`, or `messages` up to the last answer.

    Raises:
        ValueError: it has neither, or a conversation has nothing before its answer.
    """
    if "prompt" in dataset.column_names:
        return list(dataset["prompt"])
    if "messages" not in dataset.column_names:
        raise ValueError(
            f"answers need prompts: a column prompt or messages, the data has {', '.join(dataset.column_names)}"
        )
    prompts = [m[:-1] if m and m[-1]["role"] == "assistant" else m for m in dataset["messages"]]
    if not all(prompts):
        raise ValueError(f"conversation {prompts.index([])} has nothing before its answer: leave it out")
    return prompts


def writer_of(teacher: Teacher, tokenizer, device: torch.device, batch_size: int = 16) -> LocalTextTeacher:
    """A teacher as one that writes, on this device, so many texts at once.

    Raises:
        ValueError: it is no model in this process (a cache, a remote one), or is sharded.
    """
    if isinstance(teacher, LocalTextTeacher):
        return teacher
    if not isinstance(teacher, FrozenTeacher):
        raise ValueError(
            f"{teacher.name} ({type(teacher).__name__}) cannot write answers: give a model, or train on answers that "
            "are in the data (data_source offline, num_generations_per_prompt 0)"
        )
    if getattr(teacher, "sharded", False):
        raise ValueError(f"{teacher.name} is sharded and cannot write answers: launch without FSDP or DeepSpeed")
    if not getattr(teacher.model, "hf_device_map", None) and not getattr(teacher.model, "is_quantized", False):
        teacher.model.to(device)
    writer = LocalTextTeacher(teacher, teacher.tokenizer or tokenizer, batch_size=batch_size)
    writer.vocabulary = len(getattr(writer.tokenizer, "tokenizer", writer.tokenizer))  # heads are padded differently
    return writer


def answered(
    writer: LocalTextTeacher,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_new_tokens: int,
    max_length: int | None = None,
    seed: int = 0,
) -> Dataset:
    """`samples` answers to each prompt, temperature 1, as rows for the trainer: `input_ids` and `labels`.

    An answer that stops at max_new_tokens has no end token. Every rank writes its share and gets all rows.

    Args:
        max_length: of the trainer, which cuts rows there; None does not cut.

    Raises:
        ValueError: a prompt and its answer may not fit into max_length; prompts as `TextTeacher.generate`.
    """
    tokenizer, state = getattr(writer.tokenizer, "tokenizer", writer.tokenizer), PartialState()
    ids = [_tokens(tokenizer, writer.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids), default=0)
    if max_length is not None and longest + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of up to {max_new_tokens} do not fit into max_length "
            f"{max_length}: raise it, or ask for fewer tokens"
        )
    # what is drawn belongs to (seed, prompt, place), so the share of a rank does not change it
    own = list(range(len(prompts)))[state.process_index :: state.num_processes]
    texts = writer.generate(
        [prompts[i] for i in own], max_new_tokens=max_new_tokens, num_return_sequences=samples, seed=seed
    ) if own else []  # fmt: skip
    mine = [(i, texts[samples * k + j].token_ids) for k, i in enumerate(own) for j in range(samples)]
    everyone = gather_object(mine) if state.num_processes > 1 else mine
    rows = sorted(everyone, key=lambda row: row[0])  # stable: a prompt's answers stay in order
    return Dataset.from_dict(
        {
            "input_ids": [ids[i] + answer for i, answer in rows],
            "labels": [[-100] * len(ids[i]) + answer for i, answer in rows],
        }
    )


def _tokens(tokenizer, processor, prompt: Prompt) -> list[int]:
    """As the writer reads a prompt."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class FreshResponses(torch.utils.data.Dataset):
    """Rows that `write(round)` gives anew every so many epochs; `RenewResponses` moves the round.

    Args:
        first: the rows of round 0.
        write: round -> rows, as many, the same for the same round.
        every: epochs that a round lasts.

    Attributes:
        round: whose rows these are.
    """

    def __init__(self, first: Dataset, write: Callable[[int], Dataset], every: int = 1):
        if every < 1:
            raise ValueError(f"responses are written anew every so many epochs, at least 1, got {every}")
        self.rows, self.write, self.every, self.round = first, write, every, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def renew(self, epoch: int) -> None:
        """The rows of an epoch."""
        if epoch // self.every != self.round:
            self.round = epoch // self.every
            self.rows = self.write(self.round)

    def __getstate__(self) -> dict:
        """For workers that load the data: they read rows and write none."""
        return self.__dict__ | {"write": None}


class RenewResponses(TrainerCallback):
    """Moves FreshResponses from epoch to epoch; a resumed run reads what the first one would have read."""

    def __init__(self, responses: FreshResponses):
        self.responses = responses

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.responses.renew(int((state.epoch or 0) + 1e-6))


__all__ = ["ROUND", "FreshResponses", "RenewResponses", "answered", "prompts_of", "writer_of"]
