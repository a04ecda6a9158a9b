"""The generated part of model_cards/<slug>.md, from all results of evidence: language models' and classification's.

    python -m benchmarks.evidence_cards

What stands around the markers is written by hand; a card that is not there yet is begun from its method's docstring.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
from pathlib import Path

from hf_distill.evaluation.comparison import Run, paired, picture
from hf_distill.methods import METHODS

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
START, END = "<!-- evidence -->", "<!-- end of evidence -->"
ALONE, KD, ALONE_TIME = "student alone", "Hinton KD", "student alone, equal time"
REVERSE, JS, NO_TRANSPORT = "reverse KL", "Jensen-Shannon", "SinKD, without transport"
BESIDE = {"sinkd": (REVERSE, JS, NO_TRANSPORT)}  # rows that a method's card compares with, too
LABELS = {
    "accuracy": "accuracy, higher",
    "macro_f1": "macro F1, higher",
    "ece": "expected calibration error, lower",
    "agreement": "agreement with the teacher, higher",
    "centred accuracy": "accuracy on centred digits, higher",
}
PAGE = "classification"  # the page that holds every row of every table
ONE_HOT = (
    "**Why logits gain little here.** On images that it has learnt by heart the teacher's logits are nearly the "
    "labels, and what a high temperature brings out of them is mostly noise. Hinton KD may choose its temperature (see "
    "its settings); ND, TRG, DKD and BD-KD are judged with their papers' 4. What reads the teacher's features (FitNet, "
    "ReviewKD, SP, RKD) is not touched by that: see [all rows](classification.md)."
)
BEGIN = """# Evidence: {title}

{link}{doc}

**Limits.** Small models, few examples, one teacher per table; what is said holds for these.

{start}
{end}
"""


def fill(path: Path, body: str) -> None:
    """Put text between a page's markers."""
    head, rest = path.read_text(encoding="utf-8").split(START, 1)
    path.write_text(f"{head}{START}\n{body}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def write_classification(results: Path, cards: Path = CARDS) -> None:
    """Cards of the methods that have rows in the tables of evidence_vision, and the page of all rows."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("evidence_vision_*.json"))]
    found = [result for result in found if _runs(result)]
    for result in found:
        measures = result["measures"]
        path = str(cards / f"evidence_{result['table']}.png")
        picture(_runs(result), result["teacher"], path, result["title"], {m: LABELS[m] for m in measures})
    for slug in METHODS:
        if importlib.import_module(f"hf_distill.methods.{slug}").CARD.modality == "text":
            continue  # its card is on language models
        sections = [section(r, slug) for r in found if any(r["rows"][n]["slug"] == slug for n in _runs(r))]
        if sections:
            path = cards / f"{slug}.md"
            if not path.is_file():
                path.write_text(begun(slug), encoding="utf-8")
            fill(path, "\n\n".join(sections))
    if found:
        path = cards / f"{PAGE}.md"
        if not path.is_file():
            path.write_text(
                f"# Evidence: every row on classification\n\nWhat the methods' cards are cut from.\n\n{START}\n{END}\n",
                encoding="utf-8",
            )
        fill(path, "\n\n".join(section(result) for result in found))


def section(result: dict, slug: str | None = None) -> str:
    """One table: of a method's rows beside the student alone and Hinton KD; of all rows without a slug."""
    runs, rows = _runs(result), result["rows"]
    beside = [name for name in (ALONE, KD, ALONE_TIME, *BESIDE.get(slug, ())) if name in runs]
    own = [name for name in runs if name not in beside and slug in (None, rows[name]["slug"])]
    shown, measures = [*beside, *own], result["measures"]
    facts, seeds = result["facts"], len(runs[ALONE])
    lines = [
        f"### {result['title']}",
        f"Data: {facts['data']}. Teacher: {facts['teacher']}; test {_each(result['teacher'], measures)}. "
        f"Student: {facts['student']}, {result['student_parameters']:,} parameters. {seeds} paired seeds "
        f"(initialisation and order), {result['steps']} steps of {result['batch']}; learning rate one of "
        f"{', '.join(f'{rate:g}' for rate in result['rates'])}, chosen on a quarter of the training split "
        f"with {result.get('tune_share', 0.3):.0%} of the steps.",
        "",
        "| row | settings | learning rate | " + " | ".join(_words(m) for m in measures) + " | CPU s |",
        "|---" * (len(measures) + 4) + " |",
    ]
    for name in shown:
        cells = [_mean([run.test[m] for run in runs[name]]) for m in measures]
        seconds = statistics.mean(run.cpu_seconds for run in runs[name])
        settings = ", ".join(f"{k} {v}" for k, v in rows[name]["settings"].items()) or "defaults"
        lines.append(f"| {name} | {settings} | {runs[name][0].learning_rate:g} | {' | '.join(cells)} | {seconds:.0f} |")
    if slug is not None:
        lines += ["", "**In short.** " + " ".join(_in_short(runs, name, measures[0], seeds, slug) for name in own)]
    if "one-hot" in facts["teacher"]:
        lines += ["", ONE_HOT]
    lines += ["", "Mean paired difference ± standard error; a verdict needs 3 seeds and 2 standard errors.", ""]
    lines += [
        "| row | beside | " + " | ".join(f"{_words(m)} | verdict" for m in measures) + " |",
        "|---" * (2 + 2 * len(measures)) + " |",
    ]
    for name in own:
        for baseline in beside:
            cells = [_difference(runs, name, baseline, m) for m in measures]
            lines.append(f"| {name} | {baseline} | " + " | ".join(cells) + " |")
    extra = sorted({m for name in own for run in runs[name] for m in run.test if m.startswith("alpha")})
    for name in own if extra else []:
        if all(m in runs[name][0].test for m in extra):
            lines += ["", f"{name}: " + ", ".join(f"{m} {_mean([r.test[m] for r in runs[name]])}" for m in extra) + "."]
    notes = [f"{name}: {rows[name]['note']}" for name in shown if rows[name]["note"]]
    if notes:
        lines += ["", "Notes. " + ". ".join(notes) + "."]
    lines += ["", f"![{result['title']}](evidence_{result['table']}.png)", "", _made(result)]
    if slug is not None:
        lines += ["", f"Again, this method alone: `make evidence METHOD={slug} DATA=DIR`."]
    return "\n".join(lines)


def begun(slug: str) -> str:
    """A card to write by hand: the method's title, paper and docstring."""
    module = importlib.import_module(f"hf_distill.methods.{slug}")
    card = module.CARD
    link = f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv}). " if card.arxiv else ""
    return BEGIN.format(title=card.title, link=link, doc=inspect.getdoc(module), start=START, end=END)


def _runs(result: dict) -> dict[str, list[Run]]:
    """Per row the runs of all seeds that both baselines have; rows that are not finished are left out."""
    by_seed = {n: {run["seed"]: Run(**run) for run in row["runs"]} for n, row in result["rows"].items()}
    seeds = sorted(set(by_seed.get(ALONE, ())) & set(by_seed.get(KD, ())))
    return {name: [runs[s] for s in seeds] for name, runs in by_seed.items() if seeds and set(seeds) <= set(runs)}


def _difference(runs: dict[str, list[Run]], row: str, baseline: str, measure: str) -> str:
    found = paired(runs, row, baseline, measure, higher_is_better=measure != "ece")
    return f"{found.mean:+.4f} ± {found.standard_error:.4f} | {found.verdict}"


def _in_short(runs: dict[str, list[Run]], row: str, measure: str, seeds: int, slug: str) -> str:
    """In words, of the first measure: what a row beats, and what it does not."""
    beside = [ALONE, KD, *(name for name in BESIDE.get(slug, ()) if name in runs)]
    found = {b: paired(runs, row, b, measure, higher_is_better=measure != "ece") for b in beside}
    told = {
        "beats": "beats {}",
        "loses to": "**loses to** {}",
        "not told apart": "**does not beat** {}, from which it is not told apart",
    }
    said = [
        told[difference.verdict].format(b) + f" ({difference.mean:+.4f} ± {difference.standard_error:.4f})"
        for b, difference in found.items()
    ]
    return f"In {_words(measure)} over {seeds} seeds, {row} {' and '.join(said)}."


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def _each(values: dict[str, float], measures: list[str]) -> str:
    return ", ".join(f"{_words(m)} {values[m]:.4f}" for m in measures if m in values and m != "agreement")


def _words(measure: str) -> str:
    return LABELS[measure].rsplit(",", 1)[0]


def _made(result: dict) -> str:
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    return (
        f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed} · "
        f"commit {result['commit']}"
    )


OTHERS = {  # results -> the module whose `write_cards(results, cards)` makes a card of them
    "evidence_ddk.json": "evidence_ddk_card",
    "evidence_fidelity.json": "evidence_fidelity_card",
    "evidence_hacking.json": "evidence_hacking",
    "evidence_miniplm.json": "evidence_miniplm",
    "evidence_onpolicy.json": "evidence_onpolicy_card",
    "evidence_swing.json": "evidence_swing",
    "evidence_uld.json": "evidence_uld",
}


def write_all(results: Path, cards: Path = CARDS) -> None:
    """Every card of every kind of evidence."""
    from benchmarks import evidence_lm, evidence_vlm_card

    evidence_lm.write_cards()
    evidence_vlm_card.write_cards(results, cards)
    write_classification(results, cards)
    for name, module in OTHERS.items():
        if (results / name).is_file():
            importlib.import_module(f"benchmarks.{module}").write_cards(results, cards)


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    write_all(options.parse_args(argv).results)


if __name__ == "__main__":
    main()
