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
    rows = {row: [Run(**found["run"]) for found in each["runs"]] for row, each in result["rows"].items()}
    picture(result, rows, cards / "evidence_ddk.png")
    card = cards / "ddk.md"
    if not card.is_file():
        card.write_text(begun("ddk"), encoding="utf-8")
    fill(card, section(result, rows))


def section(result: dict, rows: dict[str, list[Run]]) -> str:
    sizes, names, before = result["sizes"], result["domains"], result["before"]
    shares = [count / sum(result["rows_of_domains"]) for count in result["rows_of_domains"]]
    about = ", ".join(f"{name} ({share:.0%})" for name, share in zip(names, shares, strict=True))
    lines = [
        "### Four domains",
        f"{about} of the training blocks of {sizes['block']} tokens. WikiText-2's validation file and Tiny Shakespeare "
        "are cut at 90 and 95 % of their text, GSM8K at 800 and 900 of 1,000 problems; Python's standard library is "
        f"split by module. Teacher: a Llama of {result['teacher_parameters']:,} parameters, {sizes['teacher_steps']} "
        f"steps on all four, evenly mixed. Student: {result['student_parameters']:,} parameters, first "
        f"{sizes['pretrain_steps']} steps on the labels of {' and '.join(sizes['known'])} only. Then "
        f"{sizes['steps']} steps of {sizes['batch']} × {sizes['block']} tokens for every row, {len(rows[OURS])} paired "
        f"seeds; an interval is {sizes['interval']} steps, validation sets are {sizes['validation']} blocks, gamma 0.2 "
        f"but in the first row. Learning rate: the best of {', '.join(f'{rate:g}' for rate in result['rates'])} by the "
        f"mean cross-entropy over domains on validation, with {sizes['tune_share']:.0%} of the steps and the first "
        "seed. The table is on test sets that no mixture has seen.",
        "",
        f"| row | learning rate | {' | '.join(names)} | worst perplexity | mean | worst ratio | CPU s |",
        "|---|---|" + "---|" * (len(names) + 4),
        "| teacher | | " + " | ".join(f"{before[f'teacher {n}']:.2f}" for n in names) + " | | | | |",
        "| student before (seed 0) | | "
        + " | ".join(f"{before[key]:.2f}" for key in (*(f"perplexity {n}" for n in names), *MEASURES))
        + " | |",
    ]
    for row, runs in rows.items():
        keys = (*(f"perplexity {n}" for n in names), *MEASURES)
        cells = " | ".join(_mean([run.test[key] for run in runs]) for key in keys)
        seconds = statistics.mean(run.cpu_seconds for run in runs)
        lines.append(f"| {row} | {runs[0].learning_rate:g} | {cells} | {seconds:.0f} |")
    lines += ["", "Mean paired difference ± standard error (below 0: the first is better); a verdict needs 2.", ""]
    lines += [
        "| row | beside | " + " | verdict | ".join(MEASURES.values()) + " | verdict |",
        "|---|---|" + "---|---|" * 3,
    ]
    for row in rows:
        for baseline in rows:
            if row.startswith(OURS) and row != baseline and (row == OURS or baseline == OURS):
                cells = []
                for key in MEASURES:
                    found = paired(rows, row, baseline, key)
                    cells.append(f"{found.mean:+.3f} ± {found.standard_error:.3f} | {found.verdict}")
                lines.append(f"| {row} | {baseline} | {' | '.join(cells)} |")
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    made = f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed}"
    lines += ["", "![weights and perplexities](evidence_ddk.png)", "", f"`{result['command']}` · {made}"]
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def picture(result: dict, rows: dict[str, list[Run]], path: Path) -> None:
    """Left: a dot per seed of the worst and the mean perplexity. Right: DDK's weights and ratios, round by round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for axis, key in zip(axes, ("worst", "mean"), strict=False):
        for i, runs in enumerate(rows.values()):
            values = [run.test[key] for run in runs]
            axis.plot(values, [i] * len(values), "o", color=COLOURS[0], alpha=0.6)
            axis.plot([statistics.mean(values)], [i], "k|", markersize=16)
        axis.set_yticks(range(len(rows)), list(rows) if key == "worst" else [""] * len(rows), fontsize=9)
        axis.invert_yaxis()
        axis.set_title(f"{MEASURES[key]}, lower is better", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    shares = [count / sum(result["rows_of_domains"]) for count in result["rows_of_domains"]]
    for axis, key, title in (
        (axes[2], "r", "DDK: weight of each domain"),
        (axes[3], "ppl_ratio", "DDK: perplexity ratio"),
    ):
        for name, colour, share in zip(result["domains"], COLOURS, shares, strict=True):
            for number, found in enumerate(result["rows"][OURS]["runs"]):
                values = [log[f"ddk/{key}/{name}"] for log in found["rounds"]]
                # a log at the end of a round holds what the next one is drawn by
                values = [share, *values[:-1]] if key == "r" else values
                label = name if number == 0 else None
                axis.plot(range(len(values)), values, color=colour, alpha=0.6, label=label)
        axis.set_xlabel("interval", fontsize=9)
        axis.set_title(f"{title}, a line per seed", fontsize=9)
        axis.grid(alpha=0.3)
    axes[2].legend(fontsize=8)
    axes[3].set_yscale("log")
    figure.savefig(path, dpi=110)
    plt.close(figure)
