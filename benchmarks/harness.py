"""What the speed benchmarks share: an interleaved clock, ratios, and a JSON that says where they were taken.

Variants run A B C A B C, so that a busy machine slows all of them alike, and what is compared are ratios inside one
process. Figures are process CPU time on one thread, or CUDA events. A peer that is not installed or cannot run here
stays in the table as "absent: <why>".
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = {"torch": "torch", "transformers": "transformers", "trl": "trl", "liger": "liger-kernel"}
MIB = 2**20


class Absent(Exception):
    """A variant cannot run here; the message says why."""


@dataclass
class Variant:
    """One row of a table.

    Attributes:
        run: one whole measurement (a forward and backward pass, a training run). It may return its own seconds;
            None takes the clock's. Raising Absent takes the row out of the table, with the reason.
        required: False for peers, whose every failure is a reason for absence; ours and the floor must run.
    """

    name: str
    run: Callable[[], float | None]
    required: bool = False


# ---- time -----------------------------------------------------------------------------------------------------------
def seconds_of(run: Callable[[], float | None], device: str) -> float:
    """What one call takes: process CPU time, or the time between two CUDA events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        own = run()
        end.record()
        torch.cuda.synchronize()
        clock = start.elapsed_time(end) / 1e3
    else:
        before = time.process_time()
        own = run()
        clock = time.process_time() - before
    return clock if own is None else own


def keep_memory() -> bool:
    """Let this process keep memory that it freed; False where the C library offers no such setting.

    By default every tensor above some megabytes is asked of the system anew, and the page faults of a virtual machine
    can then take a third of the time and swing by as much, most for the variants that need most memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    return all([mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 256 * MIB), mallopt(mmap_max, 0)])


def interleave(variants: list[Variant], *, rounds: int = 5, warm_up: bool = True, device: str = "cpu") -> dict:
    """{name: {"times": [seconds], "min", "median", "system"} or {"absent": why}}, in the order of the variants.

    "system" is the share of process CPU time that the kernel took, nearly all of it for pages of new memory; it depends
    on the machine more than the rest does.

    Args:
        warm_up: run every variant once more before, unmeasured.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    rows: dict[str, dict] = {variant.name: {"times": []} for variant in variants}
    if len(rows) != len(variants):
        raise ValueError(f"variants need different names, got {[v.name for v in variants]}")
    spent: dict[str, tuple[float, ...]] = dict.fromkeys(rows, ())
    gc.collect()
    gc.freeze()  # so that the collections between runs look at what the runs left behind only
    bar = tqdm(total=(rounds + int(warm_up)) * len(variants), unit="run", disable=None)
    for round_ in range(-int(warm_up), rounds):
        for variant in variants:
            bar.update()
            row = rows[variant.name]
            if "absent" in row:
                continue
            gc.collect()
            before = os.times()
            try:
                seconds = seconds_of(variant.run, device)
            except Exception as error:
                if variant.required and not isinstance(error, Absent):
                    raise
                rows[variant.name] = {"absent": reason(error)}
                continue
            if round_ >= 0:
                after = os.times()
                row["times"].append(seconds)
                spent[variant.name] += (after.system - before.system, after.user - before.user)
    bar.close()
    gc.unfreeze()
    for name, row in rows.items():
        if "absent" not in row:
            row |= {"min": min(row["times"]), "median": statistics.median(row["times"])}
            row["system"] = sum(spent[name][::2]) / max(sum(spent[name]), 1e-9)
    return rows


def reason(error: Exception) -> str:
    """One line that says why something did not run."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if isinstance(error, Absent) else f"{type(error).__name__}: {text}"[:200]


def ratios(rows: Mapping[str, dict], base: str) -> dict[str, dict]:
    """{name: {"min": ratio of the minima, "median": ratio of the medians}} to the row `base`; absent rows have none."""
    return {
        name: {key: row[key] / rows[base][key] for key in ("min", "median")}
        for name, row in rows.items()
        if "absent" not in row
    }


def all_ratios(rows: Mapping[str, dict], bases: list[str]) -> dict[str, dict]:
    """The ratios to each of several rows, where they are there."""
    return {base: ratios(rows, base) for base in bases if "absent" not in rows.get(base, {"absent": ""})}


# ---- growth ---------------------------------------------------------------------------------------------------------
def slope(x: list[float], y: list[float]) -> float:
    """Least squares slope of y over x."""
    return statistics.linear_regression(x, y).slope


def loglog_slope(x: list[float], y: list[float]) -> float:
    """The exponent k of y ~ x^k; all values must be above 0."""
    return slope([math.log(v) for v in x], [math.log(v) for v in y])


# ---- where and on what ----------------------------------------------------------------------------------------------
def machine() -> dict:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def versions() -> dict[str, str]:
    """Installed versions, "absent" where a package is not installed."""
    out = {}
    for name, package in PACKAGES.items():
        try:
            out[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "absent"
    return out


def commit() -> str | None:
    """The checked-out commit, with "+" where the package differs from it; None outside a git checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "hf_distill"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _command(argv: list[str]) -> str:
    """What was called, without the folder that the result went to."""
    options = [a for i, a in enumerate(argv) if i and a != "--results" and argv[i - 1] != "--results"]
    return " ".join([f"python -m benchmarks.{Path(argv[0]).stem}", *options])


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes: figures of a busy machine are rough."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


# ---- one benchmark --------------------------------------------------------------------------------------------------
class Report:
    """The result of one benchmark: cases are added, each is printed, `write` makes the file.

    Args:
        name: the file is <folder>/<name>.json.
        clock: what the times are, in words.
        config: what was asked for.
    """

    def __init__(self, name: str, clock: str, config: dict):
        self.name = name
        self.result = {
            "name": name,
            "command": _command(sys.argv),
            "clock": clock,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "load_average": {"start": load_average()},
            "config": config,
            "cases": [],
        }

    def add(self, case: dict, rows: dict, bases: list[str], **more) -> dict:
        """A table: `rows` of `interleave`, and their ratios to each row of `bases`."""
        entry = {"case": case, "rows": rows, "ratios": all_ratios(rows, bases), **more}
        self.append(entry, table(entry))
        return entry

    def append(self, entry: dict, text: str) -> None:
        """A case of another form, and how it prints."""
        self.result["cases"].append(entry)
        print(text, flush=True)

    def write(self, folder: Path) -> Path:
        self.result["load_average"]["end"] = load_average()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(rounded(self.result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}", flush=True)
        return path


def rounded(value):
    """Floats to six significant digits, so that the files stay readable."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def table(entry: dict) -> str:
    """A case as text: milliseconds, then the ratio to each base (of the minima), then what else its rows hold."""
    bases = list(entry["ratios"])
    width = max(len(name) for name in entry["rows"])
    lines = ["", ", ".join(f"{k}={v}" for k, v in entry["case"].items())]
    heads = "".join(f" {'/ ' + base:>{len(base) + 4}}" for base in bases)
    lines.append(f"{'':{width}} {'min ms':>10} {'median':>10}{heads}  system")
    for name, row in entry["rows"].items():
        if "absent" in row:
            lines.append(f"{name:{width}} absent: {row['absent']}")
            continue
        line = f"{name:{width}} {row['min'] * 1e3:10.1f} {row['median'] * 1e3:10.1f}"
        for base in bases:
            ratio = entry["ratios"][base].get(name)
            shown = f"{ratio['min']:.2f}" if ratio else "-"
            line += f" {shown:>{len(base) + 4}}"
        extra = {k: v for k, v in row.items() if isinstance(v, float) and k not in ("min", "median", "system")}
        lines.append(line + f" {row['system']:7.0%}" + "".join(f"  {k} {v:.3g}" for k, v in extra.items()))
    return "\n".join(lines)


def parser(doc: str, results: Path = RESULTS) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--rounds", type=int, default=5, help="measurements of each variant, taken in turns")
    out.add_argument("--results", type=Path, default=results, help="folder of the JSON files")
    return out
