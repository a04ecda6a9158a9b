"""The generated part of model_cards/onpolicy.md, from benchmarks/results/evidence_onpolicy.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.evidence_cards import END, START, fill
from hf_distill.evaluation.comparison import Run, paired, picture

ALONE, OFF, ON, MIXED = "student alone", "off-policy", "on-policy", "mixed"
GKD, DISTILLATION = "TRL GKDTrainer", "TRL DistillationTrainer"
LABELS = {
    "own_kl": "KL(student || teacher) on its own texts, lower",
    "teacher_kl": "KL(teacher || student) on speeches, lower",
    "cross_entropy": "cross-entropy on speeches, lower",
}
# what is asked: does a row beat the student alone and off-policy training; do ours and TRL's differ
PAIRS = [
    *((row, baseline) for row in (MIXED, ON, "adaptive", "sequence-level KD") for baseline in (ALONE, OFF)),
    (ON, "off-policy, equal time"),
    (MIXED, GKD),
    (ON, DISTILLATION),
]
BEGIN = f"""# Evidence: on-policy and mixed training

`lmbda` of `DistillSFTConfig`: the student learns from texts of its own beside the data's. GKD
([arXiv 2306.13649](https://arxiv.org/abs/2306.13649)), its adaptive form and replay after DistiLLM
([arXiv 2402.03898](https://arxiv.org/abs/2402.03898)). Flags and costs: [docs/on_policy.md](../docs/on_policy.md).

**Limits.** One small data set, one small teacher, texts of 24 tokens, 100 steps, plain sampling; what is said holds for
these. All rows chose the higher learning rate. Where the validation loss never rises, as here, adaptive stays at its
start. TRL's trainers shuffle in an order of their own, GKDTrainer divides by the data's label count, and
DistillationTrainer tokenises the prompts anew: beside them the seeds pair no more than the start, and small differences
should not be read.

{START}
{END}
"""


def write_cards(results: Path, cards: Path) -> None:
    """Fill model_cards/onpolicy.md and draw its picture; nothing where there are no results."""
    path = results / "evidence_onpolicy.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {name: [Run(**run) for run in runs] for name, runs in result["rows"].items()}
    card = cards / "onpolicy.md"
    if not card.is_file():
        card.write_text(BEGIN, encoding="utf-8")
    picture(rows, {}, str(cards / "evidence_onpolicy.png"), "Tiny Shakespeare, speeches to continue", LABELS)
    fill(card, section(result, rows))


def section(result: dict, rows: dict[str, list[Run]]) -> str:
    seeds, ratio = len(rows[ALONE]), result["teacher_parameters"] / result["student_parameters"]
    start = {key: statistics.mean(run[key] for run in result["start"]) for key in LABELS}
    lines = [
        "### Tiny Shakespeare, speeches to continue",
        f"Data: {result['examples']['train']:,} speeches (plays, public domain; the last tenth held out). Prompt: the "
        f"first {result['prompt']} tokens, the speaker among them; completion: up to {result['answer']} more, with an "
        f"end token where the speech ends. Teacher: a Llama of {result['teacher_parameters']:,} parameters trained on "
        f"the same speeches ({result['teacher_steps']} steps), test cross-entropy "
        f"{result['teacher']['cross_entropy']:.4f}. Student: {result['student_parameters']:,} parameters ({ratio:.1f} "
        f"times smaller), trained on the speeches for {result['student_steps']} steps before (then "
        f"{start['own_kl']:.4f}, {start['teacher_kl']:.4f} and {start['cross_entropy']:.4f} in the columns below). "
        f"Every row but the first minimises generalised JSD with beta 0.5, as TRL's trainers do here. "
        f"{seeds} paired seeds (initialisation and order), {result['steps']} steps of {result['batch']}; learning "
        f"rate one of {', '.join(f'{rate:g}' for rate in result['rates'])}, by the sum of both KLs "
        "on validation with the first seed and 40% of the steps.",
        "",
        "| row | what | learning rate | " + " | ".join(_words(m) for m in LABELS) + " | tokens of its texts | CPU s |",
        "|---" * (len(LABELS) + 5) + "|",
    ]
    for name, runs in rows.items():
        cells = [_mean([run.test[m] for run in runs]) for m in LABELS]
        length = statistics.mean(run.test["length"] for run in runs)
        seconds = statistics.mean(run.cpu_seconds for run in runs)
        steps = "" if runs[0].steps == result["steps"] else f" ({runs[0].steps} steps)"
        lines.append(
            f"| {name} | {result['notes'][name]}{steps} | {runs[0].learning_rate:g} | {' | '.join(cells)} | "
            f"{length:.1f} | {seconds:.1f} |"
        )
    lines += ["", "**In short.** " + " ".join(_in_short(rows))]
    lines += ["", "Mean paired difference ± standard error; a verdict needs 3 seeds and 2 standard errors.", ""]
    lines += [
        "| row | beside | " + " | ".join(f"{_words(m)} | verdict" for m in LABELS) + " |",
        "|---" * (2 + 2 * len(LABELS)) + "|",
    ]
    for row, baseline in PAIRS:
        cells = [_difference(rows, row, baseline, m) for m in LABELS]
        lines.append(f"| {row} | {baseline} | " + " | ".join(cells) + " |")
    ends = [run.test["lmbda at the end"] for run in rows["adaptive"] if "lmbda at the end" in run.test]
    lines += ["", f"Adaptive lmbda ended at {', '.join(f'{end:.1f}' for end in ends)}."]
    lines += ["", "![rows](evidence_onpolicy.png)", "", _made(result)]
    return "\n".join(lines)


def _in_short(rows: dict[str, list[Run]]) -> list[str]:
    said = []
    told = {"beats": "beats", "loses to": "**loses to**", "not told apart": "is **not told apart** from"}
    for row, baseline in PAIRS:
        found = {m: paired(rows, row, baseline, m) for m in ("own_kl", "teacher_kl")}
        parts = [
            f"{told[found[m].verdict]} {baseline} on {where} ({found[m].mean:+.4f} ± {found[m].standard_error:.4f})"
            for m, where in (("own_kl", "the student's own texts"), ("teacher_kl", "the speeches"))
        ]
        said.append(f"{row[0].upper() + row[1:]} {' and '.join(parts)}.")
    return said


def _difference(rows: dict[str, list[Run]], row: str, baseline: str, measure: str) -> str:
    found = paired(rows, row, baseline, measure)
    return f"{found.mean:+.4f} ± {found.standard_error:.4f} | {found.verdict}"


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def _words(measure: str) -> str:
    return LABELS[measure].rsplit(",", 1)[0].replace("|", "\\|")


def _made(result: dict) -> str:
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    return (
        f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed} · "
        f"commit {result['commit']}"
    )
