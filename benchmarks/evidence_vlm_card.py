"""The card of LLaVA-MoD from the results of `evidence_vlm`: tables, what is claimed, and the picture of the experts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.evidence_cards import CARDS, fill
from hf_distill.evaluation.comparison import Paired, Run, paired
from hf_distill.training.routers import draw_expert_load

RESULTS = Path(__file__).parent / "results"
SETS = {
    "digits": "scikit-learn's handwritten digits (BSD): four questions and a caption of each image; the teacher "
    "has learnt from 1,397 images, students learn from 300 of them, 400 are to test",
    "nlvr": "NLVR (CC BY 4.0), 600 pictures of shapes: true or false statements by people, questions about present and "
    "absent objects, captions; a quarter of the sentences, with all their pictures, to test",
}
TEACHER, ALONE, ALONE_ON = "teacher", "labels alone", "labels alone, trained on"
DENSE, DENSE_ON, WIDE = "dense mimic", "dense mimic, trained on", "wide dense mimic"
SPARSE, PREFERENCE, PAIR_LABELS = "sparse mimic", "preference", "labels of the pairs"
ROWS = (TEACHER, ALONE, ALONE_ON, DENSE, DENSE_ON, WIDE, SPARSE, PREFERENCE, PAIR_LABELS)
COMPARED = (  # what the method claims to be better than what
    (DENSE, ALONE),
    (SPARSE, DENSE_ON),
    (SPARSE, WIDE),
    (SPARSE, ALONE_ON),
    (PREFERENCE, SPARSE),
    (PREFERENCE, PAIR_LABELS),
    (PREFERENCE, TEACHER),
)
MEASURES = {  # lower is better
    "teacher_kl": "KL(teacher \\|\\| student)",
    "error": "wrong answers",
    "hallucination": "hallucination rate",
    "chair_i": "CHAIR_i",
}


def write_cards(results: Path = RESULTS, cards: Path = CARDS) -> None:
    """Put the tables between the markers of the card; what stands around them is written by hand."""
    found = [json.loads(p.read_text()) for p in sorted(results.glob("evidence_vlm_*.json"))]
    for result in found:
        loads = results / "expert_load.part"
        loads.write_text("".join(json.dumps(row) + "\n" for row in result["expert_load"]))
        draw_expert_load(str(loads), str(cards / f"evidence_llava_mod_{result['set']}.png"))
        loads.unlink()
    fill(cards / "llava_mod.md", "\n\n".join(map(section, found)))


def section(result: dict) -> str:
    """Tables of one set: every row, then what the method claims."""
    rows = {row: [Run(**run) for run in runs] for row, runs in result["rows"].items()}
    plan, seeds = result["plan"], len(rows[SPARSE])
    pairs = " and ".join(f"{mean([p[split] for p in result['pairs']]):.0f} {split}" for split in ("train", "test"))
    columns = {"error": "wrong answers", "teacher_kl": "KL to the teacher", "chair_i": "CHAIR_i", "chair_s": "CHAIR_s"}
    kinds = [key for key in rows[SPARSE][0].test if key.startswith("hallucination/")]
    columns |= {key: f"hallucination, {key.split('/')[1]}" for key in kinds}
    lines = [
        f"### {result['set']}",
        f"{SETS[result['set']]}. {seeds} paired seeds (initialisation and data order); {plan['adaptor']} adaptor, "
        f"{plan['dense']} dense, {plan['sparse']} sparse and {plan['preference']} preference steps of {plan['batch']} "
        f"rows. Pairs are the sparse mimic's own wrong answers: {pairs} on average.",
        "",
        f"| row | parameters | activated | {' | '.join(columns.values())} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for row, runs in rows.items():
        test = runs[0].test
        cells = [_spread([run.test[key] for run in runs]) for key in columns]
        lines.append(f"| {row} | {test['parameters']:,} | {test['activated']:,} | {' | '.join(cells)} |")
    lines += ["", "| row | reward accuracy | reward margin |", "|---|---|---|"]
    for row in (SPARSE, PREFERENCE, PAIR_LABELS):
        cells = [_spread([run.test[key] for run in rows[row]]) for key in ("reward_accuracy", "reward_margin")]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "| row | tokens read per CPU second | tokens written |", "|---|---|---|"]
    for row in (DENSE, WIDE, SPARSE):
        cells = [f"{mean([speed[row][task] for speed in result['speed']]):,.0f}" for task in ("read", "write")]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", *claims(rows), "", f"![expert load on {result['set']}](evidence_llava_mod_{result['set']}.png)"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += ["", f"`{result['command']}` · {result['machine']} · {versions}"]
    return "\n".join(lines)


def claims(rows: dict[str, list[Run]]) -> list[str]:
    """Mean paired differences of what is compared, and in words what does not hold."""
    lines = [
        "Mean paired difference ± standard error (below 0: the first is better); a verdict needs 2 standard errors.",
        "",
        f"| row | beside | {' | '.join(f'{label} | verdict' for label in MEASURES.values())} |",
        "|---|---|" + "---|---|" * len(MEASURES),
    ]
    fails = []
    for row, beside in COMPARED:
        cells = []
        for key, label in MEASURES.items():
            if key == "teacher_kl" and beside == TEACHER:
                cells.append("| ")
                continue
            difference: Paired = paired(rows, row, beside, key)
            cells.append(f"{difference.mean:+.4f} ± {difference.standard_error:.4f} | {difference.verdict}")
            if difference.verdict != "beats":
                fails.append(
                    f"{row} {difference.verdict} {beside} in {label}".replace(
                        "not told apart", "is not told apart from"
                    )
                )
        lines.append(f"| {row} | {beside} | {' | '.join(cells)} |")
    if fails:
        lines += ["", "**Does not hold here:** " + "; ".join(fails) + "."]
    return lines


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else float("nan")


def _spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {error:.4f}"
