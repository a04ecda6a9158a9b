"""Pictures and tables of docs/performance.md and docs/teachers.md from the JSON files in benchmarks/results.

    python -m benchmarks.report

A result that is not there is left out; what stands around the markers is written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.harness import MIB, RESULTS, ROOT

START, END = "<!-- results -->", "<!-- end of results -->"
TITLES = {
    "loss_cpu": "Loss, CPU",
    "loss_cpu_system_allocator": "Loss, CPU, memory given back to the system and asked for again",
    "loss_cpu_large": "Loss, CPU, large vocabulary",
    "loss_cpu_large_system_allocator": "Loss, CPU, large vocabulary, memory given back and asked for again",
    "loss_cuda": "Loss, GPU",
    "memory_cpu": "Memory of the loss, CPU",
    "memory_cuda": "Memory of the loss, GPU",
    "trainer": "Trainers",
    "packing": "Packing",
    "moe": "Routed experts",
    "teacher": "Teachers",
    "vision": "Classification objectives",
}
PAGES = {"teachers": ("teacher",)}  # all others are on the page performance


def results_in(folder: Path) -> dict[str, dict]:
    """The results that are there, in the order of TITLES."""
    paths = {name: folder / f"{name}.json" for name in TITLES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


# ---- tables ---------------------------------------------------------------------------------------------------------
def section(name: str, result: dict, picture: str | None) -> str:
    parts = [f"### {TITLES[name]}"]
    if name.startswith("memory"):
        parts.append(memory_table(result))
    else:
        parts += [facts_table(entry) if "facts" in entry else time_table(entry) for entry in result["cases"]]
    if picture:
        parts.append(f"![{TITLES[name]}]({picture})")
    where, load = result["machine"], result["load_average"]
    device = where["gpu"] if "cuda" in name else f"{where['cpu']}, {where['cores']} cores"
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts.append(
        f"`{result['command']}` · {result['clock']} · {device} · {installed} · commit {result['commit']} · load "
        f"{load['start'] and load['start'][0]} to {load['end'] and load['end'][0]}"
    )
    return "\n\n".join(parts)


def time_table(entry: dict) -> str:
    """Milliseconds and ratios of the minima; absent rows with their reason."""
    bases = list(entry["ratios"])
    extra = list(dict.fromkeys(key for row in entry["rows"].values() for key in row if key not in HIDDEN_KEYS))
    head = ["", "min ms", "median ms", *(f"× {base}" for base in bases), *(key.replace("_", " ") for key in extra)]
    lines = [_case(entry), "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in entry["rows"].items():
        if "absent" in row:
            lines.append(f"| {name} | absent: {row['absent']} |" + " |" * (len(head) - 2))
            continue
        cells = [f"{row['min'] * 1e3:.1f}", f"{row['median'] * 1e3:.1f}"]
        cells += [f"{entry['ratios'][base][name]['min']:.2f}" for base in bases]
        cells += [_number(row[key]) if key in row else "" for key in extra]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if "note" in entry:
        lines += ["", entry["note"]]
    if "fit" in entry:
        lines += ["", "Fitted: " + ", ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in entry["fit"].items())]
    return "\n".join(lines)


def facts_table(entry: dict) -> str:
    """Rows of named numbers that are no times."""
    columns = list(dict.fromkeys(key for row in entry["facts"].values() for key in row))
    lines = [_case(entry), "", "| " + " | ".join(["", *(c.replace("_", " ") for c in columns)]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in entry["facts"].items():
        lines.append(f"| {name} | " + " | ".join(_number(row[c]) if c in row else "" for c in columns) + " |")
    return "\n".join(lines)


def _case(entry: dict) -> str:
    return ", ".join(f"{k} {_number(v) if isinstance(v, float) else v}" for k, v in entry["case"].items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}" if 0.9 < value <= 1 else f"{value:.2g}"


HIDDEN_KEYS = ("times", "min", "median", "system", "absent")


def memory_table(result: dict) -> str:
    lines = [
        "Peak MiB above the inputs; in brackets what lies beyond the two gradients and our tile budget.",
        "",
        "| against | variant | peaks | growth of what lies beyond |",
        "|---|---|---|---|",
    ]
    for entry in result["cases"]:
        sweep, variant = entry["case"]["sweep"], entry["case"]["variant"]
        if "absent" in entry:
            lines.append(f"| {sweep} | {variant} | absent: {entry['absent']} | |")
            continue
        peaks = ", ".join(f"{p[sweep]}: {p['peak'] / MIB:.0f} ({p['beyond'] / MIB:+.0f})" for p in entry["points"])
        fit = entry["fit"]
        grows = f"{sweep}^{fit['beyond_exponent']:.2f}, {fit['beyond_bytes_each']:,.0f} bytes each"
        lines.append(f"| {sweep} | {variant} | {peaks} | {grows} |")
    return "\n".join(lines)


# ---- pictures -------------------------------------------------------------------------------------------------------
def draw(name: str, result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    if name.startswith("memory"):
        _draw_memory(axes, result)
    elif name.startswith("loss"):
        _draw_loss(axes, result)
    elif name == "moe":
        _draw_growth(axes, [entry for entry in result["cases"] if "rows" in entry])
    elif name == "teacher":
        _draw_bars(axes, result | {"cases": result["cases"][:1]})
    else:
        _draw_bars(axes, result)
    axes.set_title(TITLES[name], loc="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_loss(axes, result: dict) -> None:
    """Times the floor, one group of bars per loss."""
    cases = [entry for entry in result["cases"] if "floor" in entry["ratios"]]
    names = list(dict.fromkeys(n for entry in cases for n in entry["ratios"]["floor"] if n != "floor"))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        heights = [entry["ratios"]["floor"].get(name, {"min": 0.0})["min"] for entry in cases]
        axes.bar([x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))], heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cases)), [entry["case"]["loss"] for entry in cases])
    axes.set_ylabel("time / matrix products alone")
    axes.legend(frameon=False, fontsize=8)


def _draw_memory(axes, result: dict) -> None:
    """Peak beyond the gradients against rows."""
    for entry in result["cases"]:
        if entry["case"]["sweep"] == "rows" and "points" in entry:
            x = [p["rows"] for p in entry["points"]]
            y = [max(p["peak"] - p["gradients"], 1) / MIB for p in entry["points"]]
            axes.plot(x, y, marker="o", label=entry["case"]["variant"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("rows that carry loss")
    axes.set_ylabel("MiB beyond inputs and gradients")
    axes.legend(frameon=False, fontsize=8)


def _draw_growth(axes, cases: list[dict]) -> None:
    """Times the dense block against the number of experts."""
    for name in cases[0]["ratios"]["dense"]:
        y = [entry["ratios"]["dense"][name]["min"] for entry in cases]
        axes.plot([entry["case"]["experts"] for entry in cases], y, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("experts")
    axes.set_ylabel("time / dense block")
    axes.legend(frameon=False, fontsize=8)


def _draw_bars(axes, result: dict) -> None:
    rows = {n: row["min"] * 1e3 for entry in result["cases"] for n, row in entry["rows"].items() if "absent" not in row}
    names = list(rows)[::-1]
    bars = axes.barh(names, [rows[n] for n in names], color=["C3" if n.startswith("Distill") else "C0" for n in names])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlabel("ms, " + result["clock"])


def write(results: Path = RESULTS, docs: Path = ROOT / "docs") -> str:
    """Draw the pictures and fill the pages between their markers; gives all text between them."""
    found, written = results_in(results), []
    apart = {name for names in PAGES.values() for name in names}
    for page, names in {"performance": [n for n in found if n not in apart], **PAGES}.items():
        sections = []
        for name in names:
            if name in found:
                picture = f"{page}_{name}.png"
                draw(name, found[name], docs / picture)
                sections.append(section(name, found[name], picture))
        body = "\n\n".join(sections) or "No results yet: run `make bench`."
        path = docs / f"{page}.md"
        head, rest = path.read_text(encoding="utf-8").split(START, 1)
        path.write_text(f"{head}{START}\n{body}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
        written.append(body)
    return "\n\n".join(written)


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = options.parse_args(argv)
    write(options.results, options.docs)


if __name__ == "__main__":
    main()
