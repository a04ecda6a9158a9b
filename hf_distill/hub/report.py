"""What a run did, as one self-contained HTML page and one picture, from the log in its own folder.

It reads `run.json` and `log.jsonl` of `ReportCallback`, or the newest checkpoint's trainer_state.json, and what else
lies beside: `samples.jsonl`, and pictures (router loads, reliability). An unfinished run is reported as far as it got.
"""

from __future__ import annotations

import base64
import html
import json
import os
from datetime import UTC, datetime
from pathlib import Path

LOG, FACTS = "log.jsonl", "run.json"
PAGE, PICTURE = "report.html", "report.png"
STATE = "trainer_state.json"
PLAIN = ("epoch", "step", "train_loss", "total_flos", "num_tokens", "num_input_tokens_seen", "max_steps", "time")
# a panel's title, which keys belong to it (the first panel that takes a key has it), and whether its scale may be
# logarithmic
PANELS = (
    ("loss and its terms", lambda k: k in ("loss", "eval_loss") or k.startswith("loss/"), True),
    ("distance from the teacher (nats)", lambda k: k.endswith("teacher_kl"), True),
    ("top-1 agreement with the teacher", lambda k: k.endswith("agreement"), False),
    ("cross-entropy (nats)", lambda k: k.endswith(("cross_entropy", "entropy")) and "router" not in k, False),
    ("learning rate", lambda k: k == "learning_rate", False),
    ("gradient norm", lambda k: k == "grad_norm", True),
    ("preference rewards", lambda k: "rewards/" in k, False),
    ("answers", lambda k: k.startswith("logps/") or k.startswith("logits/"), False),
    ("accuracy", lambda k: "accuracy" in k or k.endswith(("macro_f1", "ece")), False),
    ("routers", lambda k: "expert_load" in k or "router" in k or k == "dropped", False),
    ("evaluation", lambda k: k.startswith("eval_"), False),
    ("schedules and other values", lambda k: True, False),
)
COST = ("runtime", "per_second", "preparation_time", "jit_compilation_time")
CURVES = 10  # lines in one panel; more would not be told apart


def write_report(run: str | os.PathLike) -> tuple[Path, Path]:
    """Write report.html and report.png into a run's folder; needs matplotlib (the extra `report`).

    Returns:
        The paths of both.

    Raises:
        ValueError: the folder holds no log.
    """
    run = Path(run)
    history = read_log(run)
    panels = panels_of(history)
    picture = draw(panels, run / PICTURE)
    page = run / PAGE
    part = page.with_suffix(".part")
    part.write_text(render(run, history, picture), encoding="utf-8")
    os.replace(part, page)
    return page, picture


def read_log(run: Path) -> list[dict]:
    """The values that were logged, in order; a last line that was cut is left out.

    Raises:
        ValueError: there is none.
    """
    if (run / LOG).is_file():
        history = _lines(run / LOG)
    else:
        checkpoints = sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)
        states = [p for p in (run / STATE, *(c / STATE for c in checkpoints)) if p.is_file()]
        history = json.loads(states[0].read_text(encoding="utf-8"))["log_history"] if states else []
    if not history:
        inside = ", ".join(sorted(p.name for p in run.iterdir())[:8]) if run.is_dir() else "no such folder"
        raise ValueError(
            f"{run} has no log ({LOG} or {STATE}; found: {inside or 'nothing'}): give the output folder of a run that "
            "logged something (logging_steps), with ReportCallback or a checkpoint"
        )
    return history


def panels_of(history: list[dict]) -> list[tuple[str, bool, dict[str, list[tuple[float, float]]]]]:
    """(title, may be logarithmic, {name: [(step, value)]}) of all that was logged as a number."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for key, value in entry.items():
            if key in PLAIN or key.endswith(COST) or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            curves.setdefault(key, []).append((entry.get("step", len(curves.get(key, ()))), value))
    rest, panels = dict(curves), []
    for title, belongs, logarithmic in PANELS:
        mine = {key: rest.pop(key) for key in list(rest) if belongs(key)}
        values = [v for points in mine.values() for _, v in points if v == v]
        spread = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        if any(len(points) > 1 for points in mine.values()) or (mine and title == "evaluation"):
            panels.append((title, logarithmic and spread, mine))
    return panels


def draw(panels: list, path: Path) -> Path:
    """All panels in one picture, two beside each other."""
    from matplotlib.figure import Figure

    rows = max((len(panels) + 1) // 2, 1)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, (title, logarithmic, curves) in zip(axes, panels, strict=False):
        for name in sorted(curves, key=lambda n: -len(curves[n]))[:CURVES]:
            steps, values = zip(*curves[name], strict=True)
            axis.plot(steps, values, "o-" if len(steps) < 20 else "-", markersize=3, linewidth=1.4, label=name)
        left_out = len(curves) - CURVES
        axis.set_title(title + (f" ({left_out} more not drawn)" if left_out > 0 else ""), fontsize=10)
        if logarithmic:
            axis.set_yscale("log")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    return path


# ---- the page -------------------------------------------------------------------------------------------------------
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .25em .8em .25em 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .facts td.number { text-align: left; }
pre { white-space: pre-wrap; word-break: break-word; background: #f5f5f2; padding: .6em; margin: 0; }
img { max-width: 100%; } .samples td { width: 45%; } .quiet { color: #777; }
"""


def render(run: Path, history: list[dict], picture: Path) -> str:
    """The whole page; every text that a model, a dataset or a file name gave is escaped."""
    facts = json.loads((run / FACTS).read_text(encoding="utf-8")) if (run / FACTS).is_file() else {}
    last = history[-1].get("step", len(history))
    total = facts.get("max_steps")
    progress = f"{last} of {total} steps" if total else f"{last} steps"
    state = "" if facts.get("finished") or not total or last >= total else " so far: the run has not ended"
    others = [p for p in sorted(run.glob("*.png")) if p.name != PICTURE]
    sections = [
        f"<h1>{html.escape(run.resolve().name)}</h1>",
        f'<p class="quiet">{progress}{state}; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>',
        _table("The run", ["", ""], [(k.replace("_", " "), v) for k, v in facts.get("about", {}).items()]),
        _table("Terms", ["term", "what", "weight now"], [tuple(t.values()) for t in facts.get("terms", [])]),
        _table("Evaluation", *_evaluation(history)),
        f"<h2>Over time</h2>{_image(picture)}",
        *(f"<h2>{html.escape(p.stem.replace('_', ' '))}</h2>{_image(p)}" for p in others),
        _samples(_lines(run / "samples.jsonl") if (run / "samples.jsonl").is_file() else []),
        _table("Settings", ["", ""], list(facts.get("settings", {}).items())),
        _table("Versions", ["", ""], list(facts.get("versions", {}).items())),
    ]
    title = html.escape(run.resolve().name)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>'


def _evaluation(history: list[dict]) -> tuple[list[str], list[tuple]]:
    """First, last and best value of every evaluation measure."""
    evaluations = [entry for entry in history if any(k.startswith("eval_") for k in entry)]
    keys = dict.fromkeys(k for e in evaluations for k in e if k.startswith("eval_") and not k.endswith(COST))
    rows = []
    for key in keys:
        points = [(e.get("step"), e[key]) for e in evaluations if isinstance(e.get(key), int | float)]
        if points:
            rows.append((key.removeprefix("eval_"), points[0][1], points[-1][1], points[-1][0]))
    return ["measure", "first", "last", "at step"], rows


def _table(title: str, heads: list[str], rows: list[tuple]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads) if any(heads) else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    kind = "" if any(heads) else ' class="facts"'
    return f"<h2>{html.escape(title)}</h2><table{kind}><tr>{head}</tr>{body}</table>"


def _cell(value) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number">{text}</td>'


def _samples(lines: list[dict]) -> str:
    """The newest completions, the student's beside the teacher's."""
    if not lines:
        return ""
    newest = [line for line in lines if line["step"] == lines[-1]["step"]]
    sides = [side for side in ("student", "teacher") if side in newest[0]]
    rows = ""
    for line in newest:
        prompt = f'<tr><td colspan="2"><pre class="quiet">{html.escape(line["prompt"])}</pre></td></tr>'
        texts = "".join(f"<td><pre>{html.escape(line[side])}</pre></td>" for side in sides)
        rows += f"{prompt}<tr>{texts}</tr>"
    head = "".join(f"<th>{side}</th>" for side in sides)
    return f'<h2>Samples at step {lines[-1]["step"]}</h2><table class="samples"><tr>{head}</tr>{rows}</table>'


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def _lines(path: Path) -> list[dict]:
    """Of a jsonl file; a last line that a kill has cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
