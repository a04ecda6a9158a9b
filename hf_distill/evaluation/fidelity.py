"""How closely a student imitates its teacher, which is not how good it is: tokens, answers and texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_distill.evaluation.calibration import take_reliability, token_calibration
from hf_distill.evaluation.classification import Reliability
from hf_distill.evaluation.extraction import Extractor
from hf_distill.losses import (
    TVD,
    Agreement,
    Divergence,
    ForwardKL,
    ReverseKL,
    StudentEntropy,
    TeacherEntropy,
    TopKOverlap,
    observe,
)


# ---- tokens ---------------------------------------------------------------------------------------------------------
def token_measures(topk: Sequence[int] = (1, 5)) -> dict[str, Divergence]:
    """Name -> what `observe` and a trainer's `eval_observed` measure per token. k = 1 is `token_top1_agreement`.

    Raises:
        ValueError: a k below 1.
    """
    measures = {
        "token_top1_agreement": Agreement(),
        "kl_teacher_student": ForwardKL(),
        "kl_student_teacher": ReverseKL(),
        "tvd": TVD(),
        "student_entropy": StudentEntropy(),
        "teacher_entropy": TeacherEntropy(),
    }
    overlaps = {k: TopKOverlap(k) for k in topk}
    return measures | {f"top{k}_overlap": overlap for k, overlap in overlaps.items() if k > 1}


def token_fidelity(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, topk: Sequence[int] = (1, 3)
) -> dict[str, float]:
    """Means over the counted tokens, a few rows at a time; nothing of the size tokens x vocabulary is stored.

    Args:
        student_logits, teacher_logits: (..., V) of any float dtype; the wider one is cut.
        mask: (...) bool, True counts.
        topk: also the share of the k likeliest entries that both have, for each k above 1.

    Returns:
        `token_top1_agreement`, `kl_teacher_student`, `kl_student_teacher`, `tvd`, `student_entropy`,
        `teacher_entropy` (nats) and `top<k>_overlap`.

    Raises:
        ValueError: no token counts, or shapes that do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, 1.0]])
        >>> found = token_fidelity(logits, logits, torch.tensor([True]), topk=(1, 2))
        >>> found["token_top1_agreement"], found["top2_overlap"], found["kl_teacher_student"]
        (1.0, 1.0, 0.0)
    """
    if mask.shape != student_logits.shape[:-1] or not mask.any():
        raise ValueError(
            f"mask must have the rows' shape {tuple(student_logits.shape[:-1])} and count at least one token, got "
            f"{tuple(mask.shape)} with {int(mask.sum())}"
        )
    counted, width = mask.to(torch.bool), min(student_logits.shape[-1], teacher_logits.shape[-1])
    values = observe(student_logits[..., :width], teacher_logits[..., :width], token_measures(topk))
    return {name: value[counted].double().mean().item() for name, value in values.items()}


def measure_tokens(trainer, topk: Sequence[int] = ()) -> tuple[dict[str, float], Reliability]:
    """A trainer's student beside its teacher on the trainer's evaluation set, whatever its batches and ranks.

    Args:
        topk: adds `token_measures(topk)`; empty leaves them out.

    Returns:
        Means over all tokens that carry loss, `ece` among them, and the reliability diagram.

    Raises:
        ValueError: measures of all logits, of a teacher that gives a few entries per row.
    """
    measures = token_measures(topk) if topk else {}
    before = trainer.eval_observed
    trainer.eval_observed = token_calibration() | measures
    try:
        found = trainer.evaluate()
    finally:
        trainer.eval_observed = before
    diagram = take_reliability(found, rows=10_000)
    if missing := [name for name in measures if f"eval_{name}" not in found]:
        raise ValueError(
            f"{', '.join(missing)} need all logits of the teacher, which {type(trainer.teacher).__name__} does not "
            'give: name a model, or a cache of mode "hidden"'
        )
    names = ("cross_entropy", "teacher_kl", "agreement", *measures)
    return {name: found[f"eval_{name}"] for name in names if f"eval_{name}" in found} | {"ece": diagram.error}, diagram


# ---- answers --------------------------------------------------------------------------------------------------------
def answer_fidelity(student_answers: Sequence, teacher_answers: Sequence, gold_answers: Sequence) -> dict[str, float]:
    """Who is right, and how often student and teacher answer the same, right or wrong.

    Args:
        student_answers, teacher_answers: extracted answers, None where a text has none: never right, and the same as
            another None.
        gold_answers: the right ones.

    Returns:
        `student_accuracy`, `teacher_accuracy`, `agreement`, `inherited_errors` (share of all examples where both are
        wrong with the same answer), and `agreement_given_teacher_correct` and `_wrong` where there are such examples.

    Raises:
        ValueError: no answers, or not as many of each.

    Example:
        >>> found = answer_fidelity([1, 2, 3, 9], [1, 5, 3, 9], [1, 2, 4, 4])
        >>> found["student_accuracy"], found["teacher_accuracy"], found["agreement"], found["inherited_errors"]
        (0.5, 0.25, 0.75, 0.5)
    """
    if not len(student_answers) or not len(student_answers) == len(teacher_answers) == len(gold_answers):
        raise ValueError(
            f"one answer of student, teacher and gold per example is needed, got {len(student_answers)}, "
            f"{len(teacher_answers)} and {len(gold_answers)}"
        )
    rows = list(zip(student_answers, teacher_answers, gold_answers, strict=True))
    same = [s == t for s, t, _ in rows]
    ours, theirs = ([gold is not None and row[i] == gold for row in rows for gold in row[2:]] for i in (0, 1))
    found = {
        "student_accuracy": _share(ours),
        "teacher_accuracy": _share(theirs),
        "agreement": _share(same),
        "inherited_errors": _share([a and not t for a, t in zip(same, theirs, strict=True)]),
    }
    for name, right in (("correct", True), ("wrong", False)):
        if own := [a for a, t in zip(same, theirs, strict=True) if t == right]:
            found[f"agreement_given_teacher_{name}"] = _share(own)
    return found


def text_fidelity(
    student_texts: Sequence[str], teacher_texts: Sequence[str], references: Sequence[str], extract: Extractor
) -> dict[str, float]:
    """`answer_fidelity` of the answers in texts, `rationale_bleu`, and the shares without an answer.

    Raises:
        ValueError: a reference without an answer.
    """
    gold = [extract(text) for text in references]
    if None in gold:
        raise ValueError(
            f"no answer was found in the reference {references[gold.index(None)]!r}: choose another answer_extractor"
        )
    ours, theirs = ([extract(text) for text in texts] for texts in (student_texts, teacher_texts))
    bleu = [sentence_bleu(s, t) for s, t in zip(student_texts, teacher_texts, strict=True)]
    return answer_fidelity(ours, theirs, gold) | {
        "rationale_bleu": _share(bleu),
        "student_unanswered": _share([answer is None for answer in ours]),
        "teacher_unanswered": _share([answer is None for answer in theirs]),
    }


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """BLEU of one text: words between spaces, n-grams of 1 to 4, add-one smoothing from n = 2 on, brevity penalty.

    Example:
        >>> sentence_bleu("2 and 3 make 5", "2 and 3 make 5"), sentence_bleu("", "5"), sentence_bleu("5", "6")
        (1.0, 0.0, 0.0)
    """
    ours, theirs = hypothesis.split(), reference.split()
    logs = 0.0
    for n in range(1, 5):
        counts, known = _ngrams(ours, n), _ngrams(theirs, n)
        matches, total = sum(min(count, known[gram]) for gram, count in counts.items()), counts.total()
        if n == 1 and not matches:
            return 0.0
        smooth = int(n > 1)
        logs += math.log((matches + smooth) / (total + smooth)) / 4
    brevity = min(1.0, math.exp(1 - len(theirs) / len(ours)))
    return brevity * math.exp(logs)


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _share(values: Sequence) -> float:
    return sum(values) / len(values)


# ---- over runs ------------------------------------------------------------------------------------------------------
def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; equal values share the mean of their ranks. nan where one side does not vary.

    Raises:
        ValueError: fewer than two values, or not as many of each.

    Example:
        >>> spearman([1, 2, 3], [10, 20, 15])
        0.5
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"two values of each at least, as many of x as of y, got {len(x)} and {len(y)}")
    a, b = _ranks(x), _ranks(y)
    spread = math.sqrt(math.fsum(v * v for v in a) * math.fsum(v * v for v in b))
    return math.fsum(v * w for v, w in zip(a, b, strict=True)) / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Centred ranks."""
    values = [float(v) for v in values]
    order = sorted(values)
    mean = (len(values) - 1) / 2
    return [order.index(v) + (order.count(v) - 1) / 2 - mean for v in values]
