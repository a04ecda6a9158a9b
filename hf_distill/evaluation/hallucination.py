"""How often a vision-language model says what is not in the image: yes/no questions (POPE) and captions (CHAIR).

POPE (2305.10355) asks "is there a ...?" half of present objects, half of absent ones; CHAIR (1809.02156) counts the
objects of a caption that the image does not hold. Pure functions over answers; `answers.py` gets them from a model.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class ObjectQuestion:
    """One yes/no question: does image number `image` hold `object`?"""

    image: int
    object: str
    present: bool

    def text(self, template: str = "is there a {} in the image ?") -> str:
        return template.format(self.object)


def yes_no(answer: str) -> bool | None:
    """What an answer says by its first yes, no or not; None where it says neither.

    Paper: POPE's script takes all that holds no "no" or "not" for a yes, empty answers too; here they are unanswered.

    Example:
        >>> yes_no("Yes, there is."), yes_no("There is no cat."), yes_no("perhaps")
        (True, False, None)
    """
    for word in re.findall(r"[a-z]+", answer.lower()):
        if word in ("yes", "true"):
            return True
        if word in ("no", "not", "false"):
            return False
    return None


def pope_scores(answers: Sequence[bool | None], present: Sequence[bool]) -> dict[str, float]:
    """Of yes/no answers about objects, "yes" the positive class. Shares between 0 and 1; 0 where there is none.

    Args:
        answers: what the model said; None (no answer) is wrong, and neither a yes nor a no.
        present: the truth.

    Returns:
        accuracy, precision, recall, f1, yes_ratio, hallucination_rate (yes among the absent objects), unanswered.

    Raises:
        ValueError: no answers, or not one per truth.

    Example:
        >>> scores = pope_scores([True, True, False, None], [True, False, False, True])
        >>> scores["accuracy"], scores["hallucination_rate"], scores["unanswered"]
        (0.5, 0.5, 0.25)
    """
    answers, present = list(answers), list(present)
    if not answers or len(answers) != len(present):
        raise ValueError(f"one answer per question is needed, got {len(answers)} answers to {len(present)} questions")
    pairs = Counter(zip(answers, map(bool, present), strict=True))
    true_yes, false_yes, true_no = pairs[True, True], pairs[True, False], pairs[False, False]
    positives = sum(map(bool, present))
    precision, recall = _share(true_yes, true_yes + false_yes), _share(true_yes, positives)
    return {
        "accuracy": (true_yes + true_no) / len(answers),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": (true_yes + false_yes) / len(answers),
        "hallucination_rate": _share(false_yes, len(answers) - positives),
        "unanswered": answers.count(None) / len(answers),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def object_questions(
    objects: Sequence[set[str]], kind: str = "random", per_image: int = 3, seed: int = 0
) -> list[ObjectQuestion]:
    """As many questions about present as about absent objects, at most `per_image` of each per image.

    Args:
        objects: what each image holds. Absent objects come from what the other images hold.
        kind: how absent objects are chosen: "random"; "popular", those that most images hold; "adversarial", those that
            meet the image's own objects most often in other images.
        seed: of the draws; image i's questions do not depend on the other images' draws.

    Raises:
        ValueError: an unknown kind, or per_image below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if per_image < 1:
        raise ValueError(f"per_image must be at least 1, got {per_image}")
    held = Counter(name for image in objects for name in image)
    together: dict[str, Counter] = {name: Counter() for name in held}
    if kind == "adversarial":
        for image in objects:
            for name in image:
                together[name].update(image - {name})
    questions = []
    for i, image in enumerate(objects):
        draw = random.Random(f"{seed} {i}")
        absent = draw.sample(sorted(held.keys() - image), len(held.keys() - image))  # ties stay in random order
        if kind == "popular":
            absent.sort(key=lambda name: -held[name])
        elif kind == "adversarial":
            absent.sort(key=lambda name: -sum(together[own][name] for own in image))
        count = min(per_image, len(image), len(absent))
        questions += [ObjectQuestion(i, name, True) for name in draw.sample(sorted(image), count)]
        questions += [ObjectQuestion(i, name, False) for name in absent[:count]]
    return questions


def chair_scores(captions: Sequence[str], objects: Sequence[set[str]], synonyms: Mapping[str, str]) -> dict[str, float]:
    """Objects that captions name and images do not hold.

    Args:
        captions: one per image.
        objects: what each image holds, by the names that `synonyms` gives.
        synonyms: word or words -> object, lower case, the object's own name included. The longest match counts; a
            plural -s or -es is understood.

    Returns:
        chair_i: wrong mentions among all mentions; chair_s: captions with a wrong mention among all captions;
        coverage: the images' objects that their captions name; mentions: per caption.

    Raises:
        ValueError: no captions, or not one per image.

    Example:
        >>> chair_scores(["a dog and two cats"], [{"dog"}], {"dog": "dog", "cat": "cat"})["chair_i"]
        0.5
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(f"one caption per image is needed, got {len(captions)} captions of {len(objects)} images")
    mentions = wrong = wrong_captions = covered = 0
    for caption, held in zip(captions, objects, strict=True):
        named = mentioned_objects(caption, synonyms)
        strangers = sum(name not in held for name in named)
        mentions, wrong, wrong_captions = mentions + len(named), wrong + strangers, wrong_captions + (strangers > 0)
        covered += len(held.intersection(named))
    return {
        "chair_i": _share(wrong, mentions),
        "chair_s": wrong_captions / len(captions),
        "coverage": _share(covered, sum(map(len, objects))),
        "mentions": mentions / len(captions),
    }


def mentioned_objects(caption: str, synonyms: Mapping[str, str]) -> list[str]:
    """The objects that a caption names, in order, one entry per mention."""
    words, found, i = re.findall(r"\w+", caption.lower()), [], 0
    longest = max((len(name.split()) for name in synonyms), default=0)
    while i < len(words):
        for length in range(min(longest, len(words) - i), 0, -1):
            phrase = " ".join(words[i : i + length])
            name = next(
                (p for p in (phrase, phrase.removesuffix("s"), phrase.removesuffix("es")) if p in synonyms), None
            )
            if name is not None:
                found.append(synonyms[name])
                i += length - 1
                break
        i += 1
    return found
