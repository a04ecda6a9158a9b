"""On-policy and mixed training: the student learns from texts that it, or its teacher, has written to the prompts.

GKD (arXiv 2306.13649) draws per batch whether the completions are the student's own samples or the data's; DistiLLM
(arXiv 2402.03898) raises that chance when the validation loss rises, and replays older samples. What is here decides
and samples; the trainer's side, which counts tokens after it, is `training.onpolicy`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_distill.curricula.seeded import number_of
from hf_distill.heads import base_model_of
from hf_distill.objectives import scheduled
from hf_distill.teachers.decoding import left_padded
from hf_distill.teachers.frozen import eval_mode
from hf_distill.training.evaluation import random_state_kept

DATA, STUDENT, REPLAY = "data", "student", "replay"


@dataclass(frozen=True)
class Text:
    """A prompt and what was written to it, as token ids."""

    prompt: list[int]
    completion: list[int]

    @property
    def feature(self) -> dict[str, list[int]]:
        """What a collator takes: loss on the completion alone, its end token included where it has one."""
        return {
            "input_ids": self.prompt + self.completion,
            "labels": [-100] * len(self.prompt) + self.completion,
        }


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn.

    Attributes:
        max_new_tokens: length of a text at most.
        temperature: of the student's distribution; 0 takes the likeliest token.
        top_p, top_k: draw among the likeliest tokens alone; 1 and 0 draw among all.
        ends: token ids that end a text.
        padding: any token id; it is masked.
        vocabulary: ids from here on are never drawn (the teacher could not read them); None allows all.
        context: positions that the model has; None does not limit.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    ends: tuple[int, ...]
    padding: int
    vocabulary: int | None = None
    context: int | None = None

    def finished(self, completion: Sequence[int]) -> bool:
        """Whether a text came to its end; else it was cut off."""
        return completion[-1] in self.ends


def prompts_of(batch: dict) -> list[list[int]]:
    """The tokens before the last answer of each row: before its last run of labels.

    Args:
        batch: right-padded `input_ids`, `attention_mask` and `labels` (B, S). A row without any label is all prompt.

    Raises:
        ValueError: nothing stands before a row's answer.
    """
    prompts = []
    for row, (ids, mask, labels) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ):
        answer = (labels != -100).cpu()
        end = int(answer.nonzero()[-1]) if answer.any() else int(mask.sum())
        before = (~answer[:end]).nonzero()
        if not len(before):
            raise ValueError(
                f"row {row} of a batch has no prompt to answer, its labels begin with its first token: give prompt and "
                "completion columns (completion_only_loss on), or messages with assistant_only_loss"
            )
        prompts.append(ids[: int(before[-1]) + 1].tolist())
    return prompts


@torch.no_grad()
def sample(model: nn.Module, prompts: list[list[int]], sampling: Sampling, key: tuple) -> list[list[int]]:
    """A completion of each prompt by the model as it is: eval mode (no dropout, no checkpointing), with a cache.

    Args:
        model: a causal language model, not a wrapper that shards it; PEFT is allowed.
        key: numbers that decide every draw. Global random states are put back.

    Returns:
        Token ids, the end token included; a text that was cut off has none.

    Raises:
        ValueError: a prompt that leaves no room in the model's context.
    """
    base, width = base_model_of(model), max(map(len, prompts))
    room = (
        sampling.max_new_tokens if sampling.context is None else min(sampling.max_new_tokens, sampling.context - width)
    )
    if room < 1:
        raise ValueError(
            f"a prompt of {width} tokens fills the {sampling.context} positions of {type(base).__name__}: set "
            "max_length so that prompts leave room to answer"
        )
    entries = base.get_output_embeddings().weight.shape[0]
    hidden = None if sampling.vocabulary is None else list(range(sampling.vocabulary, entries))
    draws = dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    config = GenerationConfig(
        max_new_tokens=room,
        do_sample=sampling.temperature > 0,
        **(draws if sampling.temperature else {}),
        eos_token_id=list(sampling.ends) or None,
        pad_token_id=sampling.padding,
        suppress_tokens=hidden or None,
        use_cache=True,
    )
    # `generate` fills in the checkpoint's own settings (top_k, repetition penalty...) where these are a default
    own, base.generation_config = base.generation_config, config
    try:
        with random_state_kept(base.device), eval_mode(model):
            torch.manual_seed(number_of(*key))
            sequences = base.generate(**left_padded(prompts, sampling.padding, base.device))
    finally:
        base.generation_config = own
    return [up_to_the_end(row, sampling.ends) for row in sequences[:, width:].tolist()]


def up_to_the_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first end token, which is kept.

    Example:
        >>> up_to_the_end([5, 6, 1, 0], (1,)), up_to_the_end([5, 6], (1,))
        ([5, 6, 1], [5, 6])
    """
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


class ReplayBuffer:
    """The last `capacity` texts, the same on every rank.

    Example:
        >>> kept = ReplayBuffer(2)
        >>> kept.add([Text([5], [6]), Text([7], [8]), Text([9], [1])])
        >>> [text.prompt for text in kept.draw(2, (0, 0))]
        [[7], [9]]
    """

    def __init__(self, capacity: int):
        self.texts: deque[Text] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def full(self) -> bool:
        return len(self.texts) == self.texts.maxlen

    def add(self, texts: Sequence[Text]) -> None:
        self.texts.extend(texts)

    def draw(self, count: int, key: tuple) -> list[Text]:
        """Different texts, as far as there are so many; `key` decides which."""
        generator = torch.Generator().manual_seed(number_of(*key))
        order = torch.randperm(len(self.texts), generator=generator)
        return [self.texts[order[i % len(order)]] for i in range(count)]

    def state_tensors(self) -> dict[str, Tensor]:
        ids = [token for text in self.texts for token in (*text.prompt, *text.completion)]
        return {
            "replay.ids": torch.tensor(ids, dtype=torch.int64),
            "replay.prompts": torch.tensor([len(text.prompt) for text in self.texts], dtype=torch.int64),
            "replay.completions": torch.tensor([len(text.completion) for text in self.texts], dtype=torch.int64),
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.texts.clear()
        lengths = torch.stack([tensors["replay.prompts"], tensors["replay.completions"]], 1).flatten().tolist()
        parts = iter([part.tolist() for part in tensors["replay.ids"].split(lengths)])
        self.texts.extend(Text(prompt, next(parts)) for prompt in parts)


class Policy:
    """Whose texts a micro-batch holds: by a fixed, a scheduled or an adaptive chance of the student's own.

    Args:
        lmbda: the chance, at the start where it moves.
        schedule: "constant", "linear" (to `end` at the last step) or "adaptive".
        step, tolerance: adaptive: the chance grows by `step` when a validation loss lies `tolerance` above the lowest
            one since it last grew.
        capacity: texts that an adaptive run keeps for replay.

    Paper: DistiLLM's code compares with the loss at which the chance last grew, and with that before training at
    first; here with the lowest since, so that an untrained student, whose loss falls by far at first, gets there too.
    Its share of fresh samples falls linearly with progress ("decreasing", its default), as here.
    """

    def __init__(self, lmbda: float, schedule: str, *, end: float, step: float, tolerance: float, capacity: int):
        self.started, self.lmbda, self.schedule = lmbda, lmbda, schedule
        self.end, self.step, self.tolerance = end, step, tolerance
        self.lowest = float("inf")
        self.buffer = ReplayBuffer(capacity) if schedule == "adaptive" else None

    def chance(self, progress: float) -> float:
        """Of texts by the student, fresh or replayed."""
        return scheduled("linear", self.lmbda, self.end, progress) if self.schedule == "linear" else self.lmbda

    def source(self, draw: float, progress: float) -> str:
        """DATA, STUDENT (sample now) or REPLAY; `draw` is uniform in [0, 1)."""
        chance = self.chance(progress)
        if draw >= chance:
            return DATA
        fresh = self.buffer is None or not self.buffer.full or draw < chance * (1 - progress)
        return STUDENT if fresh else REPLAY

    def judge(self, loss: float) -> None:
        """An adaptive chance follows a validation loss."""
        if self.schedule != "adaptive":
            return
        if loss >= self.lowest + self.tolerance:
            self.lmbda, self.lowest = min(self.lmbda + self.step, 1.0), loss
        self.lowest = min(self.lowest, loss)

    def set(self, value: float) -> None:
        """Change the chance. Raises ValueError where it is no probability, or a schedule would undo it."""
        if not 0 <= value <= 1:
            raise ValueError(f"lmbda must lie between 0 and 1, got {value}")
        if self.schedule == "linear":
            raise ValueError("lmbda_schedule linear sets lmbda at every step: use constant or adaptive with set_lmbda")
        self.lmbda = float(value)

    def state_tensors(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.started, self.lmbda, self.lowest], dtype=torch.float64)
        return {"policy": numbers} | ({} if self.buffer is None else self.buffer.state_tensors())

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError when the run was started with another lmbda."""
        started, self.lmbda, self.lowest = tensors["policy"].tolist()
        if started != self.started or ("replay.ids" in tensors) != (self.buffer is not None):
            raise ValueError(
                f"the run was started with lmbda {started}{' adaptive' if 'replay.ids' in tensors else ''} and is "
                f"resumed with {self.started} {self.schedule}: resume with the same settings, then call set_lmbda"
            )
        if self.buffer is not None:
            self.buffer.load_state_tensors(tensors)


__all__ = ["DATA", "REPLAY", "STUDENT", "Policy", "ReplayBuffer", "Sampling", "Text", "prompts_of", "sample"]
