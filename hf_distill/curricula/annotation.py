"""Annotation: yes/no questions about what a picture shows, and a vision-language model's P(yes) for each.

A language model writes questions about the classes and picks the best; a vision-language model answers them for every
training picture, once. Answers stand in a folder, picture by picture, so a killed annotation goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from hf_distill.teachers.cache.fingerprint import differences
from hf_distill.teachers.generations import drop_unfinished_line, lines_of
from hf_distill.teachers.text import TextTeacher

COLUMN = "aspect_probs"
SUFFIX = "Answer Yes or No."  # ours; the paper's prompt is the question alone
PLAIN = "<image>\n{question} {suffix}"

Generate = Callable[[str], str]
Judge = Callable[[list, list[str]], Tensor]


# ---- questions -------------------------------------------------------------------------------------------------------
def question_prompt(class_names: Sequence[str], num_images: int, count: int) -> str:
    """Asks for `count` yes/no questions that tell the classes apart; after the paper, in words of ours."""
    return (
        f"A data set has {num_images} images of {len(class_names)} classes: {', '.join(class_names)}.\n"
        f"Write {count} yes/no questions about clear and distinct aspects of what such an image shows (shape, colour, "
        "parts, material, category, surroundings). Each must be answerable from an image alone, without knowing its "
        "class name.\nWrite one question per line and nothing else."
    )


def selection_prompt(questions: Sequence[str], class_names: Sequence[str], count: int) -> str:
    """Asks for the `count` questions that matter most and overlap least."""
    listed = "\n".join(f"{i}. {question}" for i, question in enumerate(questions, 1))
    return (
        f"These yes/no questions are about images of {len(class_names)} classes: {', '.join(class_names)}.\n{listed}\n"
        f"Choose the {count} most relevant and distinct ones: on different key features (visual, categorical, "
        "environmental) that tell the classes apart.\nWrite them unchanged, one per line, and nothing else."
    )


def parse_questions(text: str) -> list[str]:
    """The lines of a model's answer that are questions, without numbers and marks, each once.

    Example:
        >>> parse_questions("Sure!\\n1. Is it red?\\n- Is it round?\\n2) is it red?")
        ['Is it red?', 'Is it round?']
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        question = re.sub(r"^[\s\-*•\"']*(\d+\s*[.):]\s*)?[\"'*]*", "", line).strip().rstrip("\"'*").strip()
        if question.endswith("?"):
            found.setdefault(question.lower(), question)
    return list(found.values())


def generate_questions(
    generate: Generate, class_names: Sequence[str], num_images: int, count: int, *, candidates: int | None = None
) -> list[str]:
    """`count` questions for these classes, chosen by the model among `candidates` that it wrote.

    Args:
        generate: prompt -> answer, of any model: `lambda prompt: teacher.generate([prompt])[0].text`.
        candidates: twice `count` by default (ours).

    Raises:
        ValueError: the model wrote fewer questions than asked for; its answer is shown.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    written = _asked(generate, question_prompt(class_names, num_images, candidates or 2 * count), count)
    if len(written) == count:
        return written
    return _asked(generate, selection_prompt(written, class_names, count), count)[:count]


def _asked(generate: Generate, prompt: str, count: int) -> list[str]:
    answer = generate(prompt)
    questions = parse_questions(answer)
    if len(questions) < count:
        raise ValueError(
            f"asked for at least {count} questions, the model gave {len(questions)}: use a larger model or more new "
            f"tokens, or write the questions yourself. It answered:\n{answer[:500]}"
        )
    return questions


# ---- answers ---------------------------------------------------------------------------------------------------------
def vlm_judge(
    teacher: TextTeacher, *, yes: str = "Yes", no: str = "No", chat: bool | None = None, suffix: str = SUFFIX
) -> Judge:
    """(images, questions) -> P(yes) against no, of a vision-language model; both lists are equally long.

    Args:
        teacher: a LocalTextTeacher of a vision-language model.
        yes, no: the answers; in plain prompts mostly " Yes" and " No". Of several tokens the whole word counts.
        chat: ask in a conversation; None does where the processor has a chat template.
        suffix: stands after every question.
    """
    conversation = bool(getattr(teacher.tokenizer, "chat_template", None)) if chat is None else chat

    def ask(question: str):
        if not conversation:
            return PLAIN.format(question=question, suffix=suffix).strip()
        parts = [{"type": "image"}, {"type": "text", "text": f"{question} {suffix}".strip()}]
        return [{"role": "user", "content": parts}]

    def judge(images: list, questions: list[str]) -> Tensor:
        return teacher.yes_no([ask(question) for question in questions], images=images, yes=yes, no=no)

    return judge


def annotate(
    dataset,
    questions: Sequence[str],
    judge: Judge,
    folder: str | os.PathLike,
    *,
    teacher: dict | None = None,
    image_column: str = "image",
    id_column: str | None = None,
    images_per_call: int = 1,
):
    """The data set with a column `aspect_probs`: P(yes) of each question, for each picture.

    Every process takes every so-many-th picture and keeps its answers in `folder`, one line per picture; what is there
    is not asked again, whoever wrote it. The targets belong to the whole picture: training crops see a part of it.

    Args:
        dataset: a `datasets.Dataset` with pictures.
        questions: the aspects, in the order of the column.
        judge: (images, questions) -> P(yes), as `vlm_judge` makes it.
        folder: on a disk that all processes see.
        teacher: what identifies the judge (`teacher.fingerprint()` and its words): a folder of another one is refused.
        id_column: names each picture; None takes its row number, so the data must keep its order.
        images_per_call: pictures whose questions are asked at once.

    Raises:
        ValueError: no questions or repeated ones, a missing column, ids that repeat, a folder of other questions or of
            another judge, an answer that is no probability.
    """
    questions = list(questions)
    if not questions or len(set(questions)) < len(questions):
        raise ValueError(f"questions must be different, and at least one, got {questions}")
    missing = {image_column, id_column or image_column} - set(dataset.column_names)
    if missing:
        raise ValueError(f"no column {', '.join(sorted(missing))} among {', '.join(dataset.column_names)}")
    ids = [str(i) for i in (range(len(dataset)) if id_column is None else dataset.with_format(None)[id_column])]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the values of {id_column!r} repeat: they must name each picture")
    state = PartialState()
    answers = _Answers(Path(folder), {"questions": questions, "teacher": teacher or {}}, state)
    own = [i for i in range(len(ids)) if ids[i] not in answers.known][state.process_index :: state.num_processes]
    calls = [own[i : i + images_per_call] for i in range(0, len(own), images_per_call)]
    for rows in tqdm(calls, desc="annotating", disable=None if state.is_main_process else True):
        images = [dataset[i][image_column] for i in rows]
        asked = judge([image for image in images for _ in questions], questions * len(rows))
        answers.add([ids[i] for i in rows], _checked(asked, len(rows), len(questions)))
    state.wait_for_everyone()
    answers.read()
    return _with_column(dataset, [answers.known[i] for i in ids])


def _with_column(dataset, values: list):
    """The data set with the answers; its format or transform stays."""
    kept = dataset.format
    plain = dataset.with_format(None).add_column(COLUMN, values)
    columns = None if set(kept["columns"]) == set(dataset.column_names) else [*kept["columns"], COLUMN]
    return plain.with_format(kept["type"], columns, kept["output_all_columns"], **kept["format_kwargs"])


def _checked(answers: Tensor, rows: int, questions: int) -> list[list[float]]:
    answers = torch.as_tensor(answers).float()
    if answers.shape != (rows * questions,) or not ((answers >= 0) & (answers <= 1)).all():
        raise ValueError(f"the judge must give {rows * questions} probabilities, got {tuple(answers.shape)}: {answers}")
    return answers.reshape(rows, questions).tolist()


class _Answers:
    """A folder with `questions.json`, which says whose answers these are, and a file of lines per process."""

    def __init__(self, folder: Path, owner: dict, state: PartialState):
        self.folder, self.known = folder, {}
        self._own = folder / f"aspects-{state.process_index:05d}.jsonl"
        path, owner = folder / "questions.json", json.loads(json.dumps(owner))
        if state.is_main_process and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(owner, indent=1, ensure_ascii=False), encoding="utf-8")
            os.replace(scratch, path)
        state.wait_for_everyone()
        changed = differences(json.loads(path.read_text(encoding="utf-8")), owner)
        if changed:
            raise ValueError(
                f"the answers in {folder} are to other questions or another model's, give another folder:\n  "
                + "\n  ".join(changed)
            )
        self.read()
        state.wait_for_everyone()  # nobody writes before all have read, so all share out the same rest

    def read(self) -> None:
        for path in sorted(self.folder.glob("aspects-*.jsonl")):
            self.known |= {line["id"]: line["probs"] for line in lines_of(path)}

    def add(self, ids: list[str], answers: list[list[float]]) -> None:
        """On the disk before it returns."""
        with open(self._own, "a+b") as file:
            drop_unfinished_line(file)
            for name, probs in zip(ids, answers, strict=True):
                file.write((json.dumps({"id": name, "probs": probs}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def templated_answers(
    dataset, table: dict[str, Sequence[str]], class_names: Sequence[str], *, label_column: str = "labels"
):
    """The column `aspect_probs` from what is known of the classes, without any model: 1 for yes, 0 for no.

    For trying things out: such answers know the class and nothing more of the picture.

    Args:
        table: question -> the names of the classes for which the answer is yes.
        class_names: of labels 0, 1, …

    Raises:
        ValueError: a name that is no class.
    """
    unknown = sorted({name for yes in table.values() for name in yes} - set(class_names))
    if unknown:
        raise ValueError(f"no such classes: {', '.join(unknown)}; the data set has {', '.join(class_names)}")
    answers = [[float(name in yes) for yes in table.values()] for name in class_names]
    return _with_column(dataset, [answers[label] for label in dataset.with_format(None)[label_column]])
