"""Evidence for the methods of image and text classification: paired seeds, same budget and same tuning for every row.

    python -m benchmarks.evidence_vision --data DIR --tables cifar10 --seeds 5
    python -m benchmarks.evidence_vision --data DIR --methods kd dkd pld        # these rows, of every table with them
    python -m benchmarks.evidence_vision --cards                                # rewrite model_cards/ from the results
    python -m benchmarks.evidence_vision --list                                 # tables, rows, which are not there yet

DIR holds a folder per set (see cifar.py and classification_tasks.py). Every finished run is kept under runs/, so
that a killed command goes on where it was, and several processes share the work: start the same command twice, or give
each its own --seed_list.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import evidence_cards
from benchmarks.classification import Records, Row, Table, measured, train_once
from benchmarks.classification_rows import BASELINES, TABLES
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from benchmarks.toy import quiet

FORMAT = 1  # of the records: another one runs everything again
WORK = ROOT / "runs" / "evidence" / "classification"


# ---- runs -----------------------------------------------------------------------------------------------------------
class Study:
    """One table: what is asked for, what has been run, what is left."""

    def __init__(self, name: str, options):
        self.name, self.options, self.table = name, options, scaled(TABLES[name], options.steps)
        self.rows = {k: r for k, r in self.table.rows.items() if r.is_there and wanted(k, r, options.methods)}
        self.records = Records(options.work / name)
        self.task = self.table.task(options.data, options.work)
        teacher, tests = self.task.teacher.model, self.task.tests.items()
        found = [(i, test, measured(teacher, self.task, data)) for i, (test, data) in enumerate(tests)]
        self.teacher = {k if i == 0 else f"{test} {k}": v for i, test, values in found for k, v in values.items()}

    def asked(self, row: Row, **more) -> dict:
        """All that a record depends on."""
        table = self.table
        made = [getattr(f, "func", f) for f in (row.prepare, row.make_teacher, row.extra)]
        asked = {
            "format": FORMAT,
            "slug": row.slug,
            "settings": row.settings,
            "choices": row.choices,
            "calls": [getattr(f, "__name__", None) for f in made],
            "table": [table.steps, table.rates, table.batch, table.weight_decay, table.tune_share],
        }
        asked |= {} if row.stretch == 1.0 else {"stretch": row.stretch}
        return asked | more

    def run(self, row: Row, changes: dict, rate: float, seed: int, *, tuning: bool) -> dict:
        return train_once(self.task, self.table, row, changes, rate, seed, tuning=tuning).record()

    def chosen(self, name: str) -> dict | None:
        """Learning rate and changes of a row, tried where they have not been; None while another process tries them."""
        name = self.rows[name].like or name
        row = self.rows[name]
        asked = self.asked(row)
        found = self.records.read(f"{name} choice", asked)
        if found is not None:
            return found
        with self.records.claimed(f"{name} choice", asked) as mine:
            if not mine:
                return None
            tried = [self._tried(name, {}, rate) for rate in self.table.rates]
            best = max(tried, key=lambda t: t["validation"])
            tried += [self._tried(name, changes, best["rate"]) for changes in row.choices[1:]]
            best = max(tried, key=lambda t: t["validation"])
            found = {"rate": best["rate"], "changes": best["changes"], "tried": tried}
            self.records.write(f"{name} choice", asked, found)
        return found

    def _tried(self, name: str, changes: dict, rate: float) -> dict:
        row = self.rows[name]
        asked = self.asked(row, rate=rate, changes=changes, tuning=True)
        found = self.records.read(f"{name} tried", asked)
        if found is None:
            record = self.run(row, changes, rate, 0, tuning=True)
            found = {"rate": rate, "changes": changes, "validation": record["validation"]}
            self.records.write(f"{name} tried", asked, found)
        return found

    def seeds_of(self, name: str, choice: dict, seed: int) -> dict | None:
        """The record of one seed; None while another process is at it."""
        row = self.rows[name]
        asked = self.asked(row, rate=choice["rate"], changes=choice["changes"], seed=seed)
        found = self.records.read(name, asked)
        if found is not None:
            return found
        with self.records.claimed(name, asked) as mine:
            if not mine:
                return None
            found = self.run(row, choice["changes"], choice["rate"], seed, tuning=False) | {"row": name}
            self.records.write(name, asked, found)
        return found

    def measure(self) -> None:
        """All runs that nobody else does; then those that others were at."""
        left = [(name, seed) for seed in self.options.seed_list for name in self.rows]
        with tqdm(total=len(left), unit="run", desc=self.name, disable=None) as bar:
            while left:
                waiting = []
                for name, seed in left:
                    bar.set_postfix_str(f"{name}, seed {seed}")
                    choice = self.chosen(name)
                    record = None if choice is None else self.seeds_of(name, choice, seed)
                    if record is None:
                        waiting.append((name, seed))
                        continue
                    bar.update()
                    self.write()
                if len(waiting) == len(left):
                    time.sleep(5)
                left = waiting

    def write(self) -> None:
        """The table as far as it is known, of all processes."""
        rows = {}
        for name, row in self.table.rows.items():
            chosen = row.like or name
            choice = self.records.read(f"{chosen} choice", self.asked(self.table.rows[chosen]))
            if choice is None:
                continue
            asked = (self.asked(row, rate=choice["rate"], changes=choice["changes"], seed=seed) for seed in range(100))
            runs = [record for each in asked if (record := self.records.read(name, each)) is not None]
            if runs:
                settings = row.settings | choice["changes"]
                rows[name] = {"slug": row.slug, "settings": settings, "note": row.note, "runs": runs}
        result = {
            "table": self.name,
            "title": self.table.title,
            "measures": self.table.measures,
            "facts": self.task.facts,
            "teacher": self.teacher,
            "student_parameters": self.task.make_student(0).num_parameters(),
            "steps": self.table.steps,
            "batch": self.table.batch,
            "rates": self.table.rates,
            "tune_share": self.table.tune_share,
            "command": command(self.name, self.options),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "rows": rows,
        }
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / f"evidence_vision_{self.name}.json"
        part = path.with_suffix(f".{id(self)}.part")
        part.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)


def scaled(table: Table, steps: int | None) -> Table:
    return table if steps is None else replace(table, steps=steps)


def wanted(name: str, row: Row, methods: list[str] | None) -> bool:
    if methods is None or name in BASELINES or row.slug in methods:
        return True
    return any(name in evidence_cards.BESIDE.get(method, ()) for method in methods)


def command(table: str, options) -> str:
    steps = "" if options.steps is None else f" --steps {options.steps}"
    return f"python -m benchmarks.evidence_vision --data DIR --tables {table} --seeds {options.seeds}{steps}"


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per set")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), help="default: all that hold one of --methods")
    parser.add_argument("--methods", nargs="+", help="slugs of methods and names of baselines; default: all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--seed_list", type=int, nargs="+", help="only these, for processes side by side")
    parser.add_argument("--steps", type=int, help="another budget than the tables', to try things out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of trained teachers and finished runs")
    parser.add_argument("--cards", action="store_true", help="only rewrite the cards from the results")
    parser.add_argument("--list", action="store_true", help="only say what there is")
    options = parser.parse_args(argv)
    known = {row.slug for table in TABLES.values() for row in table.rows.values()}
    if unknown := set(options.methods or ()) - known:
        parser.error(f"no rows of {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if options.tables is None:
        asked = set(options.methods or known)
        options.tables = [
            n for n, t in TABLES.items() if asked & {r.slug for k, r in t.rows.items() if k not in BASELINES}
        ]
    if not (options.cards or options.list) and (options.data is None or not options.data.is_dir()):
        parser.error(f"--data must name the folder of the sets, got {options.data}")
    if options.seed_list is None:
        options.seed_list = list(range(options.seeds))
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.list:
        for name, table in TABLES.items():
            absent = [key for key, row in table.rows.items() if not row.is_there]
            print(f"{name}: {', '.join(k for k in table.rows if k not in absent)}")
            print(f"  not there yet: {', '.join(absent)}" if absent else "  complete")
        return
    torch.set_num_threads(1)
    quiet()
    if not options.cards:
        for name in options.tables:
            Study(name, options).measure()
    if options.cards:
        evidence_cards.write_all(options.out)


if __name__ == "__main__":
    main()
