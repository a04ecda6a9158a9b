"""How private each token is: scores in [0, 1], and a dataset that carries them to the loss.

`add_privacy_scores` tokenises as SFTTrainer does and puts a score beside every token; truncation, packing and the
collator then keep the two together. The score of a position is that of the token it predicts.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from trl import is_conversational, pack_dataset

from hf_distill.curricula.collators import CACHED, DataCollatorForDistillation
from hf_distill.heads import is_encoder_decoder
from hf_distill.signals import Signals
from hf_distill.training import compat
from hf_distill.training.config import DistillSFTConfig

COLUMN = "privacy_score"  # of a dataset: one number per token
TARGET = "target_privacy"  # what the collator reads: one per position, of the token that is predicted there
PATTERNS = (
    r"\d{4,}",
    r"\b[A-Z]{1,3}-?\d{4,}",  # an ID's letters, too
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # e-mail
    r"(?<!\w)\+?\(?\d(?:[\s().-]{0,2}\d){6,}",  # phone and card numbers
)


# ---- scores ----------------------------------------------------------------------------------------------------------
def pattern_scores(text: str, offsets: Sequence[tuple[int, int]], patterns: Iterable[str] = PATTERNS) -> list[float]:
    """1.0 for every token that overlaps a match, else 0.0.

    Args:
        offsets: of the tokens in the text, (start, end) each.

    Example:
        >>> pattern_scores("call 5550199", [(0, 4), (4, 8), (8, 12)])
        [0.0, 1.0, 1.0]
    """
    private = bytearray(len(text))
    for pattern in patterns:
        for match in re.finditer(pattern, text):
            private[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    return [float(any(private[start:end])) for start, end in offsets]


def likelihood_ratio_scores(teacher_log_probs: Tensor, reference_log_probs: Tensor, m=2.0, k=1.0) -> Tensor:
    """sigmoid((log p_T - log p_ref - m) / k) of each target: what the teacher knows much better than the public does.

    Where the teacher gives probability 0 there is nothing to leak: 0. Where only the reference does: 1.

    Example:
        >>> teacher, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -torch.inf])
        >>> likelihood_ratio_scores(teacher, reference).tolist()
        [0.5, 1.0]
    """
    ratio = teacher_log_probs - reference_log_probs
    known = teacher_log_probs > -torch.inf
    return torch.sigmoid((ratio.where(known, -torch.inf) - m) / k)


def rarity_scores(counts: Tensor, common: float = 1000.0) -> Tensor:
    """clip((log f0 - log f) / log f0, 0, 1) per vocabulary entry: 0 from a count of f0 = `common` on, 1 at 1 and below.

    Args:
        counts: (V,) how often each token stands in public text (see `token_counts`).

    Raises:
        ValueError: `common` not above 1, a count that is negative or NaN, or none above 0.

    Example:
        >>> [round(s, 2) for s in rarity_scores(torch.tensor([0, 1, 10, 1000])).tolist()]
        [1.0, 1.0, 0.67, 0.0]
    """
    counts = counts.to(torch.float32)
    if not common > 1 or not (counts >= 0).all() or not counts.any():
        raise ValueError(f"rarity needs counts of public tokens, not negative and not all 0, and common > 1 ({common})")
    log_common = torch.tensor(common).log()
    return ((log_common - counts.clamp(min=1.0).log()) / log_common).clamp(0, 1)


def token_counts(texts: Iterable[str], tokenizer, vocabulary: int | None = None) -> Tensor:
    """(V,) int64, how often each token stands in texts."""
    counts = torch.zeros(vocabulary or len(tokenizer), dtype=torch.int64)
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        counts += torch.bincount(ids, minlength=len(counts))
    return counts


# ---- a dataset with scores -------------------------------------------------------------------------------------------
def add_privacy_scores(dataset, tokenizer, args, patterns: Sequence[str] | None = PATTERNS):
    """Rows as DistillSFTTrainer trains on them (`skip_prepare_dataset`), with the scores of what they predict.

    Args:
        dataset: rows of text, messages, prompt and completion, or input_ids; with `privacy_score`, one number in [0, 1]
            for each token, or without.
        args: DistillSFTConfig; its length, truncation, packing, shuffling and masks are followed.
        patterns: regular expressions of what is private, matched on text; None: the column alone says it. Where there
            are both, the larger score counts.

    Returns:
        The dataset with input_ids, labels and `target_privacy` (and seq_lengths where it is packed).

    Raises:
        ValueError: text and a slow tokenizer, token ids without scores, scores of another length or outside [0, 1].
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    names = dataset.column_names or list(next(iter(dataset)))
    if not {"image", "images"}.isdisjoint(names):
        raise ValueError("scores are carried beside tokens, which pictures get in the collator only: score texts")
    settings = {"tokenizer": tokenizer, "args": args, "patterns": None if patterns is None else tuple(patterns)}
    dataset = dataset.map(lambda row: scored(row, **settings), remove_columns=names)
    if args.packing:
        if args.max_length is None:
            raise ValueError("packing needs max_length: how many tokens go into a row")
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
    else:
        dataset = dataset.filter(lambda row: any(label != -100 for label in row["labels"]))
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def scored(row: dict, tokenizer, args, patterns: Sequence[str] | None = PATTERNS) -> dict[str, list]:
    """input_ids, labels and target_privacy of one row; see `add_privacy_scores`."""
    if "input_ids" in row:
        if patterns is not None:
            raise ValueError(
                "patterns are matched on text, and the rows hold input_ids: give text, or scores per token"
            )
        ids, masks = row["input_ids"], [row[n] for n in ("assistant_masks", "completion_mask") if n in row]
        scores = given_scores(row, len(ids))
    else:
        ids, masks, scores = _tokenised(row, tokenizer, args, patterns)
    labels = row.get("labels") or [i if all(bits) else -100 for i, *bits in zip(ids, *masks, strict=True)]
    target = [*scores[1:], 0.0]
    cut = slice(None)
    if args.max_length is not None and not args.packing:
        cut = slice(args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    return {"input_ids": ids[cut], "labels": labels[cut], TARGET: target[cut]}


def given_scores(row: dict, length: int) -> list[float]:
    """The column `privacy_score`. Raises ValueError where it is missing, of another length or outside [0, 1]."""
    scores = row.get(COLUMN)
    if scores is None:
        raise ValueError(
            f"the scorer given reads a column {COLUMN!r} with one number per token, which is not there: add it, or "
            "score by patterns"
        )
    if len(scores) != length or not all(0 <= score <= 1 for score in scores):
        raise ValueError(
            f"{COLUMN} must hold one number in [0, 1] for each of {length} tokens, got {len(scores)}: "
            f"{[score for score in scores if not 0 <= score <= 1][:4] or scores[:4]}"
        )
    return [float(score) for score in scores]


def _tokenised(row: dict, tokenizer, args, patterns) -> tuple[list[int], list[list[int]], list[float]]:
    """Ids, masks and scores of a row of text; the ids and masks are SFTTrainer's."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} tells no offsets: use a fast tokenizer, or give {COLUMN!r}")
    if is_conversational(row):
        text, masks, special = *_rendered(row, tokenizer, args), False
    else:
        text, special, masks = _with_end(row, tokenizer, args), True, []
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids = encoded["input_ids"]
    if "prompt" in row and args.completion_only_loss is not False:
        start = len(os.path.commonprefix([_prompt_ids(row, tokenizer), ids]))
        masks = [*masks, [0] * start + [1] * (len(ids) - start)]
    if any(len(mask) != len(ids) for mask in masks):
        raise ValueError("the chat template gives other tokens than its text does: give input_ids and scores")
    scores = pattern_scores(text, encoded["offset_mapping"], patterns or ())
    if patterns is None or COLUMN in row:
        scores = [max(pair) for pair in zip(scores, given_scores(row, len(ids)), strict=True)]
    return ids, masks, scores


def _with_end(row: dict, tokenizer, args) -> str:
    if "prompt" not in row and args.dataset_text_field not in row:
        raise ValueError(
            f"rows have the columns {', '.join(sorted(row))}: give {args.dataset_text_field}, messages, prompt and "
            "completion, or input_ids"
        )
    text = row["prompt"] + row["completion"] if "prompt" in row else row[args.dataset_text_field]
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _rendered(row: dict, tokenizer, args) -> tuple[str, list[list[int]]]:
    """A conversation's text, and where the assistant speaks if only that is learnt."""
    messages = row["prompt"] + row["completion"] if "prompt" in row else row["messages"]
    options = _template_options(row)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if not args.assistant_only_loss:
        return text, []
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    if 1 not in marked["assistant_masks"]:
        raise ValueError("assistant_only_loss: the chat template marks no assistant tokens ({% generation %})")
    return text, [marked["assistant_masks"]]


def _prompt_ids(row: dict, tokenizer) -> list[int]:
    if not is_conversational(row):
        return tokenizer(row["prompt"])["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": True} | _template_options(row)
    return tokenizer.apply_chat_template(row["prompt"], **options)["input_ids"]


def _template_options(row: dict) -> dict:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools} | (row.get("chat_template_kwargs") or {})


def score_data(train, held_out, student, processing_class, args, patterns: Sequence[str] | None) -> tuple:
    """Both sets with `target_privacy`, and the settings that keep a trainer from preparing them again.

    Args:
        held_out: a dataset, several by name, or None.
        student: a model, or the Hub id / folder of one.
        args: DistillSFTConfig: see `add_privacy_scores`. DistillConfig, or `skip_prepare_dataset`: rows are tokenised
            already and hold `privacy_score` beside `labels`.

    Raises:
        ValueError: patterns for rows that are tokenised already or hold pictures; see `add_privacy_scores`, too.
    """
    path = None if isinstance(student, nn.Module) else os.fspath(student)
    tokenised = not isinstance(args, DistillSFTConfig) or (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if tokenised:
        if patterns is not None:
            raise ValueError(
                "patterns are matched on text that DistillSFTTrainer tokenises: with DistillConfig or "
                "skip_prepare_dataset give privacy_score beside the labels, and the scorer given"
            )
        encoder_decoder = AutoConfig.from_pretrained(path).is_encoder_decoder if path else is_encoder_decoder(student)

        def prepare(dataset):
            return target_column(dataset, shift=not encoder_decoder)
    else:
        path = path or getattr(student.config, "_name_or_path", "")
        processing_class = processing_class or compat.load_processing_class(path)
        if processing_class is None:
            raise ValueError("scores are matched to tokens: pass processing_class, the student's tokenizer")
        args = copy.copy(args)
        args.dataset_kwargs = (args.dataset_kwargs or {}) | {"skip_prepare_dataset": True}

        def prepare(dataset):
            return add_privacy_scores(dataset, processing_class, args, patterns)

    if isinstance(held_out, dict):
        held_out = {name: prepare(dataset) for name, dataset in held_out.items()}
    elif held_out is not None:
        held_out = prepare(held_out)
    return None if train is None else prepare(train), held_out, args


# ---- to the loss -----------------------------------------------------------------------------------------------------
def target_column(dataset, shift: bool):
    """Tokenised rows whose `privacy_score` stands beside each label, with the column that the collator reads."""

    def move(row: dict) -> dict:
        scores = given_scores(row, len(row["labels"]))
        return {TARGET: [*scores[1:], 0.0] if shift else scores}

    return dataset.map(move, remove_columns=[COLUMN])


def carry_scores(trainer) -> None:
    """Let a trainer's collator bring `target_privacy` to the loss rows."""
    collator = trainer.data_collator
    if not isinstance(collator, DataCollatorForDistillation):
        raise ValueError(f"scores per token need a language model's collator, not {type(collator).__name__}")
    collator = trainer.data_collator = copy.copy(collator)  # another trainer may share it
    collator.token_columns = (*collator.token_columns, TARGET)


def carried(student: Signals) -> Tensor | None:
    """(N,) the scores that the collator brought to the loss rows; None where the batch has none."""
    return student.batch.get(CACHED + TARGET)
