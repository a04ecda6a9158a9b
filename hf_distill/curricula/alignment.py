"""Answers in the tokens of two tokenizers, aligned once: what a teacher with another tokenizer is trained with.

    data = align_answers(data, student_tokenizer, teacher_tokenizer)

DistillSFTTrainer does this itself where its objective is `ULD`. Each model reads a conversation in its own chat
template; what both say of the same bytes of the answer is compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill.curricula.collators import CACHED, PREFIX, DataCollatorForDistillation
from hf_distill.losses import align_bytes

ALIGNMENT = CACHED + "alignment"  # of a batch: (G, 5) document, first and last + 1 loss row of student and of teacher
COLUMN = PREFIX + "alignment"  # of an example: first and last + 1 token of student and of teacher, group after group
VERSION = 1  # of the columns; another one aligns anew
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


# ---- one text, one tokenizer -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tokens:
    """A text as one model reads it.

    Attributes:
        ids: of the whole text.
        answer: the first token that is learnt.
        first: the first token of what both sides compare, and behind it `ends`, where each of its tokens ends in bytes
            from the beginning of what is compared.
        closing: the token that follows what is compared (end of text, end of turn); None where nothing does.
    """

    ids: list[int]
    answer: int
    first: int
    ends: list[int]
    closing: int | None

    def cut(self, length: int | None) -> Tokens:
        if length is None or len(self.ids) <= length:
            return self
        closing = self.closing if self.closing is not None and self.closing < length else None
        return Tokens(self.ids[:length], self.answer, self.first, self.ends[: max(length - self.first, 0)], closing)

    @property
    def labels(self) -> list[int]:
        start = min(self.answer, len(self.ids))
        return [-100] * start + self.ids[start:]


@dataclass(frozen=True)
class Rendered:
    """A text and where, in characters, the answer begins and what is compared lies in it."""

    text: str
    answer: int
    begin: int
    end: int
    chat: bool


def render(row: dict, tokenizer, text_field: str = "text") -> Rendered:
    """A row as its model reads it: prompt and completion (texts or messages), messages, or text.

    Raises:
        ValueError: none of these; an empty answer; an answer of several messages; no chat template, or one that
            changes the answer.
    """
    if "prompt" in row and "completion" in row:
        prompt, answer = row["prompt"], row["completion"]
    elif row.get("messages"):
        prompt, answer = row["messages"][:-1], row["messages"][-1:]
    elif isinstance(row.get(text_field), str):
        prompt, answer = "", row[text_field]
    else:
        raise ValueError(
            f"it has the columns {', '.join(sorted(row))}: give prompt and completion, messages or {text_field}, not "
            "tokens, which belong to one tokenizer"
        )
    if isinstance(answer, str):
        if not answer:
            raise ValueError("its answer is empty: drop rows without an answer")
        return Rendered(prompt + answer, len(prompt), len(prompt), len(prompt) + len(answer), chat=False)
    if len(answer) != 1 or not isinstance(answer[0].get("content"), str):
        raise ValueError(f"its answer must be one message of text, got {len(answer)} messages: {answer!r:.200}")
    return _render_chat(prompt, answer, row, tokenizer)


def _render_chat(prompt: list[dict], answer: list[dict], row: dict, tokenizer) -> Rendered:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"it is a conversation, and the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat "
            "template: set tokenizer.chat_template, or give texts"
        )
    options = {"tokenize": False} | (row.get("chat_template_kwargs") or {})
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(prompt + answer, **options)
    start = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    content = answer[0]["content"].strip()
    begin = whole.find(content, start)
    if not content or begin < 0:
        raise ValueError(
            "its answer is empty: drop rows without an answer"
            if not content
            else f"the chat template of {tokenizer.name_or_path} changes the answer {content!r:.80}, so that its bytes "
            "cannot be compared: render the conversation to text yourself"
        )
    return Rendered(whole, start, begin, begin + len(content), chat=True)


def tokenise(rendered: Rendered, tokenizer) -> Tokens:
    """Token ids, and where in the compared bytes each token ends; texts get the end token behind them."""
    encoded = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.chat,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
    if not rendered.chat:
        while ids and encoded["special_tokens_mask"][len(ids) - 1]:  # [SEP]: the end token stands in its place
            ids.pop()
    ends = byte_ends(tokenizer, ids, offsets, rendered.text)
    places = (rendered.answer, rendered.begin, rendered.end)
    answer, begin, end = (len(rendered.text[:place].encode()) for place in places)
    starts = [0, *ends]
    answer, first = (next((i for i, e in enumerate(ends) if e > place), len(ids)) for place in (answer, begin))
    last = next((i for i in range(first, len(ids)) if starts[i] >= end), len(ids))
    if not rendered.chat and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return Tokens(ids, answer, first, [place - begin for place in ends[first:last]], last if last < len(ids) else None)


def byte_ends(tokenizer, ids: list[int], offsets: list[tuple[int, int]], text: str) -> list[int]:
    """Where each token ends in the UTF-8 bytes of the text.

    Offsets count characters, and all tokens of one character that is cut into bytes have the same: their own ends are
    counted back from the token that finishes it.
    """
    bytes_at = [0]
    for character in text:
        bytes_at.append(bytes_at[-1] + len(character.encode()))
    ends = [bytes_at[end] for _, end in offsets[: len(ids)]]
    names = None
    byte_level = None
    for i in range(len(ids) - 2, -1, -1):
        start, end = offsets[i + 1][0], offsets[i][1]
        if start < end and offsets[i + 1] != (0, 0):  # the next one begins inside this one's last character
            if names is None:
                names, byte_level = tokenizer.convert_ids_to_tokens(ids), spells_bytes(tokenizer)
            size = len(names[i + 1]) if byte_level and not BYTE.fullmatch(names[i + 1]) else 1
            ends[i] = max(ends[i + 1] - size, bytes_at[offsets[i][0]])
    return ends


def spells_bytes(tokenizer) -> bool:
    """Whether each character of a token's name is one byte (byte-level tokenizers)."""
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


# ---- two tokenizers --------------------------------------------------------------------------------------------------
def groups_of(student: Tokens, teacher: Tokens, skip_eos: bool = True) -> list[tuple[int, int, int, int]]:
    """First and last + 1 token of the student and of the teacher, per group that covers the same bytes on both sides.

    A group that holds the first token of a sequence, which nothing predicts, is left out.
    """
    pairs = zip(*align_bytes(*([[0, end] for end in side.ends] for side in (student, teacher))), strict=True)
    found = [
        (student.first + s[0], student.first + s[-1] + 1, teacher.first + t[0], teacher.first + t[-1] + 1)
        for s, t in pairs
        if s and t
    ]
    if not skip_eos and student.closing is not None and teacher.closing is not None:
        found.append((student.closing, student.closing + 1, teacher.closing, teacher.closing + 1))
    return [group for group in found if group[0] > 0 and group[2] > 0]


def align_answers(
    dataset: Dataset,
    student_tokenizer,
    teacher_tokenizer,
    *,
    max_length: int | None = None,
    teacher_max_length: int | None = None,
    skip_eos: bool = True,
    text_field: str = "text",
    num_proc: int | None = None,
) -> Dataset:
    """The dataset in the tokens of both tokenizers; kept by `datasets`' own cache, so made once.

    Columns: `input_ids`, `labels` (the student's), `teacher_input_ids`, `teacher_labels`, `teacher_alignment`.

    Args:
        dataset: rows with prompt and completion (texts or messages), messages (the last one is the answer) or text.
        student_tokenizer, teacher_tokenizer: fast ones. Conversations go through each one's own chat template; texts
            get each one's own special tokens, and its end token behind them.
        max_length, teacher_max_length: longer sequences are cut at the end; rows whose answer is lost go.
        skip_eos: do not compare what follows the answer (end token, end of turn); it stays in the labels.
        text_field: the column of plain texts.
        num_proc: processes.

    Raises:
        ValueError: a tokenizer without offsets (a slow one); no map-style dataset; a row without a text answer, saying
            which.
    """
    for who, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        check_offsets(tokenizer, who)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"answers are aligned once and kept on disk, which needs a datasets.Dataset, got {type(dataset).__name__}"
        )
    sides = ((student_tokenizer, max_length), (teacher_tokenizer, teacher_max_length))

    def align(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        made: dict[str, list] = {name: [] for name in COLUMNS}
        for index, values in zip(indices, zip(*rows.values(), strict=True), strict=True):
            row = {k: v for k, v in zip(rows, values, strict=True) if v is not None}
            try:
                student, teacher = (tokenise(render(row, t, text_field), t).cut(length) for t, length in sides)
            except ValueError as error:
                raise ValueError(f"row {index} cannot be aligned: {error}") from error
            if any(len(side.ids) <= max(side.answer, 1) for side in (student, teacher)):
                continue  # its answer lies beyond the maximum length
            flat = [place for group in groups_of(student, teacher, skip_eos) for place in group]
            values = (student.ids, student.labels, teacher.ids, teacher.labels, flat)
            for name, value in zip(COLUMNS, values, strict=True):
                made[name].append(value)
        return made

    facts = [t.backend_tokenizer.to_str() + str(t.chat_template) + str(t.eos_token) for t, _ in sides]
    known = (VERSION, dataset._fingerprint, *facts, max_length, teacher_max_length, skip_eos, text_field)
    return dataset.map(
        align,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        new_fingerprint=Hasher.hash(known),  # a tokenizer's own hash changes with its use
        num_proc=num_proc,
        desc="aligning answers of two tokenizers",
    )


COLUMNS = ("input_ids", "labels", PREFIX + "input_ids", PREFIX + "labels", COLUMN)


def check_offsets(tokenizer, who: str) -> None:
    """Raises ValueError where a tokenizer cannot say which characters its tokens cover."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"the {who} has no text tokenizer (got {type(tokenizer).__name__}): pass one")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the {who}'s tokenizer {type(tokenizer).__name__} is a slow one, which does not say which characters its "
            "tokens cover: load its fast version (AutoTokenizer, with the tokenizers package)"
        )


# ---- batches ---------------------------------------------------------------------------------------------------------
class AlignedCollator(DataCollatorForDistillation):
    """Pads both sides of aligned examples, each with its own rows, and adds their groups in rows of the batch.

    Args:
        student: the collator that pads the student's tokens.
        teacher: that pads the teacher's, with its own padding token.
    """

    def __init__(self, student, teacher, **options):
        super().__init__(student, **options)
        self.teacher = teacher

    def _teacher_inputs(self, features: list[dict], batch: dict) -> dict:
        if COLUMN not in features[0]:
            raise ValueError(
                f"the examples have {', '.join(sorted(features[0]))} and no {COLUMN}: pass data that was not prepared "
                "to the trainer, or prepare what is evaluated later with align_answers"
            )
        own = [{k: f[PREFIX + k] for k in ("input_ids", "labels")} for f in features]
        collated = dict(self.teacher(own))
        collated |= self.rows(collated, None)
        groups = [torch.tensor(f[COLUMN], dtype=torch.int64).reshape(-1, 4) for f in features]
        made = {PREFIX + key: value for key, value in collated.items()}
        return made | {ALIGNMENT: _in_rows(groups, batch, collated)}


def _in_rows(groups: list[Tensor], student: dict, teacher: dict) -> Tensor:
    """(G, 5) document, and groups in loss rows instead of tokens."""
    example = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(g) for g in groups]))
    tokens = torch.cat(groups)
    parts = []
    for side, (first, last) in ((student, tokens[:, :2].unbind(1)), (teacher, tokens[:, 2:].unbind(1))):
        batch, width = side["labels"].shape
        row_of = torch.full((batch * width,), -1)
        row_of[side["loss_rows"]] = torch.arange(len(side["loss_rows"]))
        begin = row_of[example * width + first - 1]  # the row before a token predicts it
        parts += [begin, begin + last - first]
    return torch.stack([student["row_document"][parts[0]], *parts], 1)
