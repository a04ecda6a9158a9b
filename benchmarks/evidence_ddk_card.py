"""The generated part of model_cards/ddk.md, and its picture."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.evidence_cards import CARDS, begun, fill
from hf_distill.evaluation.comparison import Run, paired

MEASURES = {
    "worst": "worst domain's perplexity",
    "mean": "mean perplexity",
    "worst_ratio": "worst ratio to the teacher",
}
OURS = "DDK"
COLOURS = ("#2f6fb0", "#b0413e", "#4a8f4a", "#8a5fa8")


def write_cards(results: Path, cards: Path = CARDS) -> None:
    """Fill model_cards/ddk.md, which is begun where it is not there, and draw its picture."""
    path = results / "evidence_ddk.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    picture(result, cards / "evidence_ddk.png")
    card = cards / "ddk.md"
    if not card.is_file():
        card.write_text(begun("ddk"), encoding="utf-8")
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    made = f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed}"
    sections = [section(result, case) for case in result["cases"]]
    fill(card, "\n\n".join([setting(result), *sections, "![weights and perplexities](evidence_ddk.png)", made]))


def runs_of(result: dict, case: str) -> dict[str, list[Run]]:
    rows = result["cases"][case]["rows"]
    return {row: [Run(**found["run"]) for found in each["runs"]] for row, each in rows.items()}


def setting(result: dict) -> str:
    """What all tables have in common."""
    sizes, total = result["sizes"], sum(result["rows_of_domains"])
    shares = zip(result["domains"], result["rows_of_domains"], strict=True)
    about = ", ".join(f"{name} ({count / total:.0%})" for name, count in shares)
    rates = ", ".join(f"{rate:g}" for rate in result["rates"])
    return (
        f"Domains and their shares of the training blocks of {sizes['block']} tokens: {about}. WikiText-2's validation "
        "file and Tiny Shakespeare are cut at 90 and 95 % of their text, GSM8K at 800 and 900 of 1,000 problems; "
        f"Python's standard library is split by module. Teacher: a Llama of {result['teacher_parameters']:,} "
        f"parameters, {sizes['teacher_steps']} steps on all four, evenly mixed. Student: "
        f"{result['student_parameters']:,} parameters, first {sizes['pretrain_steps']} steps on the labels of two "
        f"domains. Then {sizes['steps']} steps of {sizes['batch']} × {sizes['block']} tokens for every row. One "
        f"interval is {sizes['interval']} steps, a validation set {sizes['validation']} blocks; gamma is 0.2, in "
        f"the first row 0. Learning rate: the best of {rates} by the mean cross-entropy over domains on validation, "
        f"with {sizes['tune_share']:.0%} of the steps and the first seed. Figures are of test sets no mixture has seen."
    )


def section(result: dict, case: str) -> str:
    names, found = result["domains"], result["cases"][case]
    rows, before = runs_of(result, case), found["before"]
    keys = (*(f"perplexity {name}" for name in names), *MEASURES)
    lines = [
        f"### Unknown before: {case}",
        f"The student starts from {' and '.join(found['known'])}. {len(rows[OURS])} paired seeds (student and draws).",
        "",
        f"| row | learning rate | {' | '.join(names)} | worst perplexity | mean | worst ratio | CPU s |",
        "|---|---|" + "---|" * (len(names) + 4),
        "| teacher | | " + " | ".join(f"{before[f'teacher {name}']:.2f}" for name in names) + " | | | | |",
        "| student before (first seed) | | " + " | ".join(f"{before[key]:.2f}" for key in keys) + " | |",
    ]
    for row, runs in rows.items():
        cells = " | ".join(_mean([run.test[key] for run in runs]) for key in keys)
        seconds = statistics.mean(run.cpu_seconds for run in runs)
        lines.append(f"| {row} | {runs[0].learning_rate:g} | {cells} | {seconds:.0f} |")
    lines += ["", "Mean paired difference ± standard error (below 0: DDK is better); a verdict needs 2.", ""]
    lines += ["| DDK beside | " + " | verdict | ".join(MEASURES.values()) + " | verdict |", "|---|" + "---|---|" * 3]
    for baseline in rows:
        if baseline != OURS:
            differences = [paired(rows, OURS, baseline, key) for key in MEASURES]
            cells = (f"{d.mean:+.3f} ± {d.standard_error:.3f} | {d.verdict}" for d in differences)
            lines.append(f"| {baseline} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def picture(result: dict, path: Path) -> None:
    """A line per case. Left: a dot per seed and row. Right: DDK's weights and ratios, round by round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(result["cases"])
    figure, grid = plt.subplots(count, 4, figsize=(17, 3.4 * count), layout="constrained", squeeze=False)
    for axes, case in zip(grid, result["cases"], strict=True):
        rows = runs_of(result, case)
        for axis, key in zip(axes, ("worst", "worst_ratio"), strict=False):
            for i, runs in enumerate(rows.values()):
                values = [run.test[key] for run in runs]
                axis.plot(values, [i] * len(values), "o", color=COLOURS[0], alpha=0.6)
                axis.plot([statistics.mean(values)], [i], "k|", markersize=16)
            axis.set_yticks(range(len(rows)), list(rows) if key == "worst" else [""] * len(rows), fontsize=9)
            axis.invert_yaxis()
            axis.set_title(f"{MEASURES[key]}, lower is better", fontsize=9)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_ylabel(f"unknown before:\n{case}", fontsize=9)
        paths(axes[2:], result, result["cases"][case]["rows"][OURS]["runs"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paths(axes, result: dict, runs: list[dict]) -> None:
    """Weights and ratios of every seed; each interval's log holds what the next one is drawn by."""
    shares = [count / sum(result["rows_of_domains"]) for count in result["rows_of_domains"]]
    for name, colour, share in zip(result["domains"], COLOURS, shares, strict=True):
        for number, found in enumerate(runs):
            weights = [share, *(log[f"ddk/r/{name}"] for log in found["rounds"][:-1])]
            ratios = [log[f"ddk/ppl_ratio/{name}"] for log in found["rounds"]]
            axes[0].plot(range(len(weights)), weights, color=colour, alpha=0.6, label=None if number else name)
            axes[1].plot(range(1, len(ratios) + 1), ratios, color=colour, alpha=0.6)
    for axis, what in zip(axes, ("weight of each domain in an interval", "perplexity over the teacher's"), strict=True):
        axis.set_title(f"DDK: {what}, a line per seed", fontsize=9)
        axis.set_xlabel("intervals done", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
