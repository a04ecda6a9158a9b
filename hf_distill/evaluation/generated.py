"""What models write to the questions of a dataset: greedily, in batches, each rank its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from hf_distill.evaluation.extraction import extractor_of
from hf_distill.teachers.local_text import LocalTextTeacher
from hf_distill.teachers.text import Prompt


@dataclass(frozen=True)
class Questions:
    """What is asked, and what would be right.

    Attributes:
        prompts: texts or conversations.
        references: texts, one per prompt.
        images: a list of pictures per prompt, or None.
    """

    prompts: list[Prompt]
    references: list[str]
    images: list | None = None


def questions_of(dataset: Dataset) -> Questions:
    """Of a dataset of `prompt` and `completion`, or of `messages` whose last one answers; `image(s)` go along.

    Raises:
        ValueError: an empty dataset, other columns, or a conversation that does not end with an answer.
    """
    names = dataset.column_names
    if not len(dataset):
        raise ValueError("the dataset of questions is empty: check its split and filters")
    if not {"prompt", "completion"} <= set(names) and "messages" not in names:
        raise ValueError(
            f"generated answers need the columns prompt and completion, or messages, got {', '.join(names)}"
        )
    prompts, references = [], []
    for i, row in enumerate(dataset.select_columns([n for n in names if n in ("prompt", "completion", "messages")])):
        if "completion" in row:
            prompt, answer = row["prompt"], row["completion"]
            answer = answer if isinstance(answer, str) else text_of(answer[-1])
        else:
            *prompt, last = row["messages"]
            if last["role"] != "assistant" or not prompt:
                raise ValueError(
                    f"row {i} must be a question and end with an assistant's answer, got {row['messages']}"
                )
            answer = text_of(last)
        prompts.append(prompt)
        references.append(answer)
    column = next((n for n in ("images", "image") if n in names), None)
    images = None if column is None else [x if isinstance(x, list) else [x] for x in dataset[column]]
    return Questions(prompts, references, images)


def text_of(message: dict) -> str:
    """What a message says, its pictures left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text" and part.get("text"))


def greedy_texts(
    model,
    processing_class,
    prompts: Sequence[Prompt],
    *,
    images: Sequence | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> list[str]:
    """What a model writes to each prompt, taking the likeliest token; all texts on every rank.

    Padding is on the left and masked, so no text depends on batches or ranks, up to near ties: rounding differs by a
    few 1e-6 in float32.

    Raises:
        ValueError: prompts that do not fit the context, conversations without a chat template, a model that writes no
            text.
    """
    state = PartialState()
    own = range(state.process_index, len(prompts), state.num_processes)
    texts: list[tuple[int, str]] = []
    if own:
        writer = LocalTextTeacher(model, processing_class, batch_size=batch_size)
        shown = {} if images is None else {"images": [images[i] for i in own]}
        said = writer.generate([prompts[i] for i in own], max_new_tokens=max_new_tokens, temperature=0.0, **shown)
        texts = [(i, one.text.strip()) for i, one in zip(own, said, strict=True)]
    return [text for _, text in sorted(gather_object(texts))]


@dataclass
class AnswerSettings:
    """What of tokens and generated answers is measured."""

    topk: list[int] = field(
        default_factory=lambda: [1, 5],
        metadata={"help": "Fidelity: shares of the k likeliest tokens that student and teacher have in common."},
    )
    generate: bool = field(
        default=False, metadata={"help": "Let both models answer the held-out questions, greedily, and compare them."}
    )
    answer_extractor: str = field(
        default="exact",
        metadata={
            "help": "The answer in a text: number (the last one), letter (first A to E), exact (all of it, without "
            "case, punctuation and articles), or package.module:function of your own."
        },
    )
    answer_tokens: int = field(default=64, metadata={"help": "Most new tokens of an answer."})

    def __post_init__(self):
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f"topk must hold numbers of at least 1, got {self.topk}")
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens must be at least 1, got {self.answer_tokens}")
        extractor_of(self.answer_extractor)
