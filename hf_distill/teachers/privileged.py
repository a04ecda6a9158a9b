"""Teachers that see what the student does not: a hint, a caption, the future, or the same picture prepared their way.

    data = add_teacher_inputs(data, tokenizer, lambda row: {**row, "prompt": row["hint"] + row["prompt"]})
    DistillSFTTrainer(student, teacher=PrivilegedTeacher("Qwen/Qwen2.5-7B-Instruct"), train_dataset=data, ...)

What is prepared while training (pictures) goes through the collator instead:

    collator = TeacherInputs(DataCollatorForVisionLanguageModeling(processor),
                             DataCollatorForVisionLanguageModeling(teacher_processor))
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from transformers import BaseImageProcessor

from hf_distill.curricula.collators import check_same_answers, loss_rows
from hf_distill.heads import ROW_KEYS
from hf_distill.signals import Signals
from hf_distill.teachers.base import PREFIX, WrappedTeacher
from hf_distill.teachers.frozen import load_teacher


class PrivilegedTeacher(WrappedTeacher):
    """A teacher that reads the `teacher_` columns of a batch, and of the student's only what is named.

    Wraps any teacher: frozen, the student's own base or average (which teach the student to do without the hint), or a
    peer. The answer must be the same tokens as the student's, in `teacher_labels`; only what it reads may differ.

    Args:
        teacher: a Teacher, a model, or a Hub id / folder.
        inputs: what its model reads from `teacher_` columns, without the prefix: ("pixel_values",) for a picture
            prepared by its own processor. Other `teacher_` columns (masks) are passed on where the batch has them.
        shared: what it also reads of the student's batch; with "input_ids" its rows are the student's.

    Raises:
        ValueError: a cached teacher; at the first batch that lacks a column, naming it.
    """

    def __init__(self, teacher, inputs: tuple[str, ...] = ("input_ids",), *, shared: tuple[str, ...] = ()):
        super().__init__(load_teacher(teacher))
        if self.teacher.readers:
            raise ValueError(f"{self.teacher.name} is cached and reads no inputs: cache the privileged teacher instead")
        self.inputs, self.shared = _names(inputs, "inputs"), _names(shared, "shared")

    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        return self.teacher(self.own_batch(batch, needs), needs)

    def own_batch(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> dict:
        """What of a batch the wrapped teacher sees."""
        if any(key.startswith(2 * PREFIX) for key in batch):
            raise ValueError(
                f"the teacher's inputs were made twice, by TeacherInputs and from the dataset's {PREFIX} columns: the "
                "trainer collates such columns of a language model's data itself, so leave out one of the two"
            )
        wanted = [*(PREFIX + name for name in self.inputs), *self.shared]
        self._require([name for name in wanted if name not in batch], batch)
        own = {key.removeprefix(PREFIX): value for key, value in batch.items() if key.startswith(PREFIX)}
        own |= {name: batch[name] for name in self.shared}
        if "loss_rows" in batch and "input_ids" in self.shared:
            own |= {key: batch[key] for key in ROW_KEYS}
        elif "loss_rows" in batch and "logits" in needs:
            self._require([] if "loss_rows" in own else [PREFIX + "labels"], batch)
        return own

    def _require(self, missing: list[str], batch: dict) -> None:
        if missing:
            own = [k for k in sorted(batch) if k.startswith(PREFIX) and k.removeprefix(PREFIX) not in ROW_KEYS]
            raise ValueError(
                f"the privileged teacher {self.name} needs {', '.join(missing)}, and of its own inputs the batch has "
                f"{', '.join(own) or 'none'}: make them with add_teacher_inputs or the TeacherInputs collator, for "
                "evaluation data too"
            )

    def describe(self) -> dict:
        return self.teacher.describe() | {"teacher_reads": ", ".join((*self.inputs, *self.shared))}


def add_teacher_inputs(dataset, tokenizer, view: Callable[[dict], dict] | None = None):
    """A dataset with the columns a PrivilegedTeacher reads, tokenised as SFTTrainer does with the student's.

    Adds `teacher_input_ids`, and `teacher_labels` where there is an answer.

    Args:
        dataset: Dataset or IterableDataset of rows with prompt and completion (texts or messages), messages (the last
            one is the answer), or text without an answer (classification).
        tokenizer: the teacher's tokenizer or processor.
        view: row -> the row as the teacher sees it; None is the row itself.

    Raises:
        ValueError: the teacher's view of a row has none of these columns, or no answer.

    Example:
        >>> add_teacher_inputs(data, tokenizer, lambda row: {"text": row["caption"]})  # doctest: +SKIP
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

    def add(row: dict) -> dict:
        return {PREFIX + key: value for key, value in _tokenised(row if view is None else view(row), tokenizer).items()}

    return dataset.map(add)


def _tokenised(row: dict, tokenizer) -> dict[str, list[int]]:
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif row.get("messages"):
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    elif "text" in row:
        return {"input_ids": tokenizer(row["text"], truncation=True)["input_ids"]}
    else:
        raise ValueError(
            f"the teacher's view of a row has the columns {', '.join(sorted(row))}: give prompt and completion, "
            "messages or text"
        )
    if not completion:
        raise ValueError("the teacher's view of a row has an empty completion: drop rows without an answer")
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        completion = completion if completion.endswith(end) else completion + end
        before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
    else:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        options = {"tools": tools, "tokenize": True, "return_dict": True} | (row.get("chat_template_kwargs") or {})
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + completion, **options)["input_ids"]
    start = len(os.path.commonprefix([before, whole]))
    return {"input_ids": whole, "labels": [-100] * start + whole[start:]}


class TeacherInputs:
    """A collator that makes the student's batch and, from the same examples, the teacher's own inputs beside it.

    Args:
        student: the student's collator.
        teacher: the teacher's: any collator, or its image processor, which reads the column `image`. It gets an
            example's `teacher_` columns, without the prefix, where there are any, else the whole example.
        shift: as in DataCollatorForDistillation; False for encoder-decoders and token tasks.

    Raises:
        ValueError: the two answers are not the same tokens, naming the document; a picture is missing.
    """

    def __init__(self, student: Callable, teacher: Callable, *, shift: bool = True):
        self.student, self.shift = student, shift
        self.teacher = _pictures(teacher) if isinstance(teacher, BaseImageProcessor) else teacher

    @property
    def tokenizer(self):
        return getattr(self.student, "tokenizer", None)

    def __call__(self, features: list[dict], return_tensors: str | None = None) -> dict:
        theirs = [{k.removeprefix(PREFIX): v for k, v in f.items() if k.startswith(PREFIX)} or f for f in features]
        batch = dict(self.student([{k: v for k, v in f.items() if not k.startswith(PREFIX)} for f in features]))
        own = dict(self.teacher(theirs))
        if all("labels" in side and side["labels"].dim() == 2 for side in (batch, own)):
            rows = loss_rows(own["labels"], shift=self.shift)
            check_same_answers(rows, loss_rows(batch["labels"], shift=self.shift))
            own |= rows
        return batch | {PREFIX + key: value for key, value in own.items()}


def _pictures(processor: BaseImageProcessor) -> Callable[[list[dict]], dict]:
    def collate(rows: list[dict]) -> dict:
        if "image" not in rows[0]:
            raise ValueError(
                f"the teacher's image processor reads the column image, the examples have "
                f"{', '.join(sorted(rows[0]))}: set remove_unused_columns=False, or name the column image"
            )
        return processor([row["image"] for row in rows], return_tensors="pt")

    return collate


def _names(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"{what} must be a tuple of names, got {names!r}: write ({names!r},)")
    return tuple(name.removeprefix(PREFIX) for name in names)
