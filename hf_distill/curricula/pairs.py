"""Preference pairs from a student's own mistakes: a good answer is chosen, what the student wrote is rejected."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from datasets import Dataset

from hf_distill.teachers.generations import GenerationStore
from hf_distill.teachers.local_text import LocalTextTeacher
from hf_distill.teachers.text import Prompt, TextTeacher

logger = logging.getLogger(__name__)

PICTURES = ("image", "images")


class PairCounts(NamedTuple):
    """What became of the rows: `made` a pair, `right` in every draw, or with no wrong one that says `equal` else."""

    made: int
    right: int
    equal: int


def contrastive_pairs(
    dataset: Dataset,
    student: LocalTextTeacher,
    *,
    teacher: TextTeacher | None = None,
    is_wrong: Callable[[str, dict], bool] | None = None,
    samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[Dataset, PairCounts]:
    """Rows of prompt, chosen and rejected, for DistillDPOTrainer: rejected is the student's own wrong answer.

    What is drawn depends on the seed, the prompt and its pictures, not on the other rows: rows of one prompt get the
    same draws. With a store in `student` (and `teacher`) nothing is drawn twice, so a call that was killed goes on; on
    several ranks each then writes its share, and without one every rank writes everything.

    Args:
        dataset: rows of prompt and completion, both texts or both messages, with `image` or `images` where the prompts
            (then messages) ask about pictures. Other columns are for `is_wrong` and are dropped.
        student: the student as a writer, LocalTextTeacher(model, processing_class, store=folder).
        teacher: who writes the chosen answers, as texts or messages as the completions are; None takes the completions.
            It is asked once per prompt, at temperature 0.
        is_wrong: (the student's answer, the row) -> whether it is wrong; None: it is another text than the row's
            completion. Surrounding white space counts in neither case.
        samples: draws per prompt; the first wrong one is taken.
        temperature, top_p, max_new_tokens, seed: of the draws. Temperature 0 takes one draw.

    Returns:
        The pairs, and how many rows made one; rows whose wrong answer is the chosen one are `equal` and left out.

    Raises:
        ValueError: columns are missing; pictures with plain texts; no row made a pair.

    Example:
        >>> writer = LocalTextTeacher(student, tokenizer, store="answers")  # doctest: +SKIP
        >>> pairs, counts = contrastive_pairs(dataset, writer, samples=4)  # doctest: +SKIP
    """
    if missing := {"prompt", "completion"} - {*dataset.column_names}:
        raise ValueError(
            f"pairs are made of rows with prompt and completion, {', '.join(sorted(missing))} is missing: the columns "
            f"are {', '.join(dataset.column_names)}"
        )
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    drawn = _answers(student, dataset, **settings, num_return_sequences=samples)
    good = None if teacher is None else _answers(teacher, dataset, max_new_tokens=max_new_tokens, temperature=0.0)
    rows, right, equal = [], 0, 0
    for i, row in enumerate(dataset):
        reference = _text(row["completion"])
        chosen = reference if good is None else _joined(good[i][0], reference)
        wrong = [text for text in drawn[i] if (is_wrong(text.strip(), row) if is_wrong else not _same(text, reference))]
        other = next((text for text in wrong if not _same(text, chosen)), None)
        if other is None:
            right, equal = right + (not wrong), equal + bool(wrong)
            continue
        kept = {name: row[name] for name in ("prompt", *PICTURES) if name in row}
        answers = {"chosen": chosen, "rejected": _joined(other, reference)}
        if not isinstance(row["completion"], str):
            answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append(kept | answers)
    counts = PairCounts(len(rows), right, equal)
    if not rows:
        raise ValueError(
            f"none of {len(dataset)} rows made a pair: {right} were answered right and {equal} wrong answers say what "
            "the chosen one says. Draw more (samples, temperature), or see is_wrong"
        )
    logger.info(
        "pairs from the student's answers: %d of %d rows (%d right, %d equal)", *counts[:1], len(dataset), *counts[1:]
    )
    return Dataset.from_list(rows), counts


def _answers(writer: TextTeacher, dataset: Dataset, num_return_sequences: int = 1, **settings) -> list[list[str]]:
    """Per row its answers."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks > 1 and writer.store is not None:
        mine = dataset.select(range(torch.distributed.get_rank(), len(dataset), ranks))
        if len(mine):
            _generate(writer, mine, num_return_sequences, settings)
        torch.distributed.barrier()
        writer.store = GenerationStore(writer.store.folder, writer.store.teacher)  # with what the others wrote
    texts = _generate(writer, dataset, num_return_sequences, settings)
    return [texts[i : i + num_return_sequences] for i in range(0, len(texts), num_return_sequences)]


def _generate(writer: TextTeacher, dataset: Dataset, num_return_sequences: int, settings: dict) -> list[str]:
    prompts: list[Prompt] = list(dataset["prompt"])
    pictures = next((name for name in PICTURES if name in dataset.column_names), None)
    shown = {} if pictures is None else {"images": list(dataset[pictures])}
    written = writer.generate(prompts, num_return_sequences=num_return_sequences, **shown, **settings)
    return [generation.text for generation in written]


def _text(completion: str | list[dict]) -> str:
    """The text of an answer, in whichever of the usual forms."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _same(text: str, other: str) -> bool:
    return text.strip() == other.strip()


def _joined(text: str, reference: str) -> str:
    """The text with the white space between prompt and answer, which some tokenizers do not give back."""
    return text if text[:1].isspace() else reference[: len(reference) - len(reference.lstrip())] + text


__all__ = ["PairCounts", "contrastive_pairs"]
