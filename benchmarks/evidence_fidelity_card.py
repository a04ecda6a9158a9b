"""The card of the evidence on fidelity, from its JSON."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from benchmarks.evidence_cards import CARDS, begun, fill
from hf_distill.evaluation.comparison import Run, paired, picture
from hf_distill.evaluation.fidelity import spearman

SUMS, TOKENS, SFT = "sums", "tinyshakespeare", "labels alone"
TITLES = {SUMS: "Sums, written out", TOKENS: "Tiny Shakespeare, tokens only"}
MEASURES = {  # measure -> its axis, and whether more is better
    SUMS: {
        "student_accuracy": ("accuracy, higher", True),
        "agreement": ("same answer as the teacher, higher", True),
        "rationale_bleu": ("BLEU against the teacher, higher", True),
        "kl_teacher_student": ("KL(teacher || student), lower", False),
    },
    TOKENS: {
        "cross_entropy": ("cross-entropy (nats), lower", False),
        "token_top1_agreement": ("same likeliest token, higher", True),
        "kl_teacher_student": ("KL(teacher || student), lower", False),
        "kl_student_teacher": ("KL(student || teacher), lower", False),
    },
}
FAITHFUL = {  # what improvement is ranked against
    SUMS: ("agreement", "agreement_given_teacher_wrong", "rationale_bleu", "token_top1_agreement"),
    TOKENS: ("token_top1_agreement", "top5_overlap", "kl_teacher_student"),
}


def write_cards(results: Path, cards: Path = CARDS) -> None:
    """Fill model_cards/fidelity.md between its markers, and draw its pictures."""
    path = results / "evidence_fidelity.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    card = cards / "fidelity.md"
    if not card.is_file():
        card.write_text(begun("fidelity"), encoding="utf-8")
    parts = [section(name, found, result, cards) for name, found in result["sets"].items()]
    where = f"`{result['command']}` · {result['machine']['cpu']}, {result['machine']['threads']} thread · "
    where += ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + f" · commit {result['commit']}"
    fill(card, "\n\n".join([*parts, where]))


def runs_of(found: dict) -> dict[str, list[Run]]:
    return {
        row: [Run(row, r["rate"], r["seed"], r["steps"], cpu_seconds=r["cpu_seconds"], test=r["scores"]) for r in runs]
        for row, runs in found["rows"].items()
    }


def improvements(rows: dict[str, list[Run]], measure: str, higher: bool) -> list[tuple[float, Run]]:
    """Of every run of every row over the run on labels alone with its seed, more being better."""
    sign = 1 if higher else -1
    return [
        (sign * (run.test[measure] - alone.test[measure]), run)
        for row, runs in rows.items()
        if row != SFT
        for run, alone in zip(runs, rows[SFT], strict=True)
    ]


def section(name: str, found: dict, result: dict, cards: Path) -> str:
    rows, measures, plan = runs_of(found), MEASURES[name], result["plan"]
    first, (_, higher) = next(iter(measures.items()))
    image = f"evidence_fidelity_{name}.png"
    teacher = {k: v for k, v in found["teacher"].items() if k in measures}
    picture(rows, teacher, str(cards / image), TITLES[name], {m: label for m, (label, _) in measures.items()})
    lines = [f"### {TITLES[name]}", described(name, found, plan, rows, result["rates"]), ""]
    lines += ["| row | learning rate | " + " | ".join(m.replace("_", " ") for m in measures) + " | CPU s |"]
    lines += ["|---" * (len(measures) + 3) + "|"]
    for row, runs in rows.items():
        cells = [mean([run.test[m] for run in runs]) for m in measures]
        seconds = statistics.mean(run.cpu_seconds for run in runs)
        lines.append(f"| {row} | {runs[0].learning_rate:g} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", f"Beside {SFT}: mean paired difference ± standard error; a verdict needs 3 seeds and 2 of them.", ""]
    lines += ["| row | " + " | ".join(f"{m.replace('_', ' ')} | verdict" for m in measures) + " |"]
    lines += ["|---" * (2 * len(measures) + 1) + "|"]
    for row in rows:
        if row != SFT:
            pairs = [paired(rows, row, SFT, m, higher_is_better=up) for m, (_, up) in measures.items()]
            cells = [f"{p.mean:+.4f} ± {p.standard_error:.4f} | {p.verdict}" for p in pairs]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", in_words(name, rows, first, higher), "", *paradox(name, rows, first, higher)]
    lines += ["", f"![{TITLES[name]}]({image})"]
    return "\n".join(lines)


def described(name: str, found: dict, plan: dict, rows: dict, rates: list[float]) -> str:
    sizes, teacher = found["sizes"], found["teacher"]
    data = {
        SUMS: "Made-up sums of two numbers below 100, each step written out (`37+48=` → `7+8=15 3+4+1=8 85`); no pair "
        "is in two parts",
        TOKENS: "Plays, public domain, blocks of 64 tokens of a vocabulary of 512: first 90 % train",
    }[name]
    right = f"accuracy {teacher['student_accuracy']:.3f}, " if "student_accuracy" in teacher else ""
    return (
        f"{data}. Teacher: {found['teacher_parameters']:,} parameters, trained on {sizes['teacher']:,} rows, test "
        f"{right}cross-entropy {teacher['cross_entropy']:.4f}. Student: {found['student_parameters']:,} parameters, "
        f"{plan['warm_steps' if name == SUMS else 'token_warm_steps']} steps on the labels first; then "
        f"{sizes['train']:,} rows, {rows[SFT][0].steps} steps of {plan['batch']}; learning rate one of "
        f"{', '.join(f'{rate:g}' for rate in rates)}, chosen on validation ({sizes['validation']} rows) with half the "
        f"steps. {len(rows[SFT])} paired seeds; {sizes['test']} test rows."
    )


def in_words(name: str, rows: dict[str, list[Run]], measure: str, higher: bool) -> str:
    """Which rows beat the labels alone, which do not, and whether the most faithful row is the best one."""
    own = [row for row in rows if row != SFT]
    verdicts = {row: paired(rows, row, SFT, measure, higher_is_better=higher).verdict for row in own}
    what = measure.replace("_", " ").removeprefix("student ")
    said = [f"**In words.** In {what}, beside {SFT}."]
    for verdict, words in (("beats", "Better"), ("loses to", "Worse"), ("not told apart", "Not told apart from it")):
        some = [row for row in own if verdicts[row] == verdict]
        said += [f"{words}: {', '.join(some)}."] if some else []
    faithful = FAITHFUL[name][0]
    means = {m: {row: statistics.mean(r.test[m] for r in rows[row]) for row in own} for m in (measure, faithful)}
    best = (max if higher else min)(own, key=means[measure].get)
    closest = max(own, key=means[faithful].get)
    same = "is also the one closest to the teacher"
    if best != closest:
        same = f"is not the one closest to the teacher ({closest} is)"
    return " ".join([*said, f"The best distilled row, {best}, {same} by {faithful.replace('_', ' ')}."])


def paradox(name: str, rows: dict[str, list[Run]], measure: str, higher: bool) -> list[str]:
    """Rank correlations of improvement with fidelity over all runs, and whether the improvements are above 0."""
    pairs = improvements(rows, measure, higher)
    gains = [gain for gain, _ in pairs]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    lines = [
        f"Improvement of all {len(gains)} distilled runs over {SFT}: {statistics.mean(gains):+.4f} ± {error:.4f} "
        f"(t = {statistics.mean(gains) / error if error else math.nan:.2f}; runs of a row are not independent). "
        f"Spearman correlation of a run's improvement in {measure.replace('_', ' ')} with",
        "",
        "| fidelity | all distilled runs | mean within a seed |",
        "|---|---|---|",
    ]
    for fidelity in FAITHFUL[name]:
        if all(fidelity in run.test for _, run in pairs):
            sign = -1 if fidelity.startswith("kl") else 1
            own = [(gain, sign * run.test[fidelity], run.seed) for gain, run in pairs]
            seeds = sorted({seed for *_, seed in own})
            within = [spearman(*zip(*[(g, f) for g, f, s in own if s == seed], strict=True)) for seed in seeds]
            shown = fidelity.replace("_", " ") + (" (lower is closer)" if sign < 0 else "")
            together = spearman([g for g, *_ in own], [f for _, f, _ in own])
            lines.append(f"| {shown} | {together:+.2f} | {statistics.mean(within):+.2f} |")
    return lines


def mean(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


__all__ = ["CARDS", "SFT", "SUMS", "TOKENS", "write_cards"]
