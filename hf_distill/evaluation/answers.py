"""What a vision-language model answers, how likely it finds an answer, and how it ranks pairs of answers.

Datasets hold `image` (or `images`), `prompt` and `completion` as messages, and optionally `kind`; pairs hold `chosen`
and `rejected` instead of `completion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from trl import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from hf_distill.evaluation.hallucination import pope_scores, yes_no

ARTICLES = {"a", "an", "the"}


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and extra spaces.

    Example:
        >>> normalised("The  Cat.")
        'cat'
    """
    return " ".join(word for word in re.findall(r"\w+", answer.lower()) if word not in ARTICLES)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that equal their reference once both are `normalised`.

    Raises:
        ValueError: no answers, or not one per reference.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"one answer per reference is needed, got {len(answers)} and {len(references)}")
    return sum(normalised(a) == normalised(b) for a, b in zip(answers, references, strict=True)) / len(answers)


def reward_statistics(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> dict[str, float]:
    """Of summed answer log-probabilities (N,): how often and by how much the chosen answer's reward is the larger.

    A reward is beta · (log p_policy - log p_reference). A tie counts as wrong.
    """
    margin = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return {"reward_accuracy": (margin > 0).float().mean().item(), "reward_margin": margin.mean().item()}


# ---- models ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    **generation,
) -> list[str]:
    """The model's answer to each row's prompt, greedily unless `generation` says otherwise; special tokens left out."""
    answers = []
    for rows in _batches(dataset, batch_size, "answers"):
        inputs = prompt_inputs(processor, rows).to(model.device)
        made = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": max_new_tokens} | generation)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def prompt_inputs(processor: ProcessorMixin, rows: list[dict]) -> BatchFeature:
    """Prompts and images of rows, padded on the left, ready for an answer."""
    return processor.apply_chat_template(
        [prepare_multimodal_messages(row["prompt"], images=_images(row)) for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
    )


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    column: str = "completion",
    batch_size: int = 32,
) -> Tensor:
    """Summed log-probability of each row's answer in `column`, end of answer included: (N,) float32 on the CPU."""
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    sums = []
    for rows in _batches(dataset, batch_size, "log-probabilities"):
        images = [_images(row) for row in rows]
        rows = [
            {"prompt": row["prompt"], "completion": row[column], "images": own}
            for row, own in zip(rows, images, strict=True)
        ]
        batch = {name: values.to(model.device) for name, values in collate(rows).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        sums.append(-losses.view(labels.shape).sum(-1).cpu())
    return torch.cat(sums)


def choose_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    candidates: Sequence[str],
    *,
    batch_size: int = 32,
) -> list[str]:
    """The likeliest of the candidate answers to each row's prompt, by `answer_log_probs`."""
    scores = []
    for candidate in candidates:
        said = [[{"role": "assistant", "content": candidate}]] * len(dataset)
        rows = dataset.remove_columns("completion") if "completion" in dataset.column_names else dataset
        rows = rows.add_column("completion", said)
        scores.append(answer_log_probs(model, processor, rows, batch_size=batch_size))
    return [candidates[i] for i in torch.stack(scores, 1).argmax(1).tolist()]


def evaluate_pairs(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Dataset,
    *,
    beta: float = 0.1,
    batch_size: int = 32,
) -> dict[str, float]:
    """`reward_statistics` of a student beside its reference on preference pairs."""
    log_probs = [
        answer_log_probs(side, processor, pairs, column=column, batch_size=batch_size)
        for side in (model, reference)
        for column in ("chosen", "rejected")
    ]
    return reward_statistics(*log_probs, beta)


def evaluate_vlm(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    *,
    object_kind: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> dict[str, float]:
    """Accuracy of the generated answers, and the yes/no scores of `pope_scores`.

    Args:
        object_kind: rows of this `kind` ask whether something is in the image, and the yes/no scores are theirs. None
            takes all rows whose reference is a yes or no.

    Returns:
        accuracy, `accuracy/<kind>` where the dataset has kinds, and, where there are yes/no rows, `pope/<score>`.
    """
    was_training = model.training
    model.eval()
    answers = generate_answers(model, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens)
    model.train(was_training)
    references = [completion[-1]["content"] for completion in dataset["completion"]]
    kinds = dataset["kind"] if "kind" in dataset.column_names else [None] * len(dataset)
    return score_answers(answers, references, kinds, object_kind)


def score_answers(
    answers: Sequence[str], references: Sequence[str], kinds: Sequence[str | None], object_kind: str | None = None
) -> dict[str, float]:
    """The scores of `evaluate_vlm` from answers that are there already."""
    scores = {"accuracy": exact_match(answers, references)}
    for kind in sorted({kind for kind in kinds if kind is not None}):
        own = [i for i, k in enumerate(kinds) if k == kind]
        scores[f"accuracy/{kind}"] = exact_match([answers[i] for i in own], [references[i] for i in own])
    truths = [yes_no(r) if object_kind in (None, k) else None for r, k in zip(references, kinds, strict=True)]
    asked = [i for i, truth in enumerate(truths) if truth is not None]
    if asked:
        pope = pope_scores([yes_no(answers[i]) for i in asked], [truths[i] for i in asked])
        scores |= {f"pope/{name}": value for name, value in pope.items()}
    return scores


def _images(row: dict) -> list:
    return row["images"] if "images" in row else [row["image"]]


def _batches(dataset: Dataset, size: int, what: str) -> Iterator[list[dict]]:
    for start in tqdm(range(0, len(dataset), size), desc=what, unit="batch", disable=None, leave=False):
        yield [dict(dataset[i]) for i in range(start, min(start + size, len(dataset)))]
