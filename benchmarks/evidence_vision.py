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
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cifar, classification_tasks, evidence_cards
from benchmarks.classification import Records, Row, Table, Task, measured, train_once
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from benchmarks.toy import quiet
from hf_distill.baselines import OBJECTIVES
from hf_distill.objectives import Objective
from hf_distill.teachers import MutualKD, PeerTeacher

ALONE, KD = evidence_cards.ALONE, evidence_cards.KD
FORMAT = 1  # of the records: another one runs everything again
WORK = ROOT / "runs" / "evidence" / "classification"


# ---- rows -----------------------------------------------------------------------------------------------------------
def baseline(name: str, settings: dict, train) -> Objective:
    given = {"classes": train.with_format(None)["labels"]} if name == "crd" else {}
    return OBJECTIVES[name](**given, **settings)


def of(name: str, *choices: dict, note: str = "", needs_index: bool = False, **settings) -> Row:
    """A row of a baseline; it may choose among `choices`, too."""
    made = partial(baseline, name)
    return Row(name, made, settings, choices=({}, *choices), note=note, needs_index=needs_index)


def mutual(settings: dict, train) -> Objective:
    return MutualKD(**settings)


def peer(task: Task, seed: int) -> PeerTeacher:
    """A larger untrained network, which learns beside the student."""
    return PeerTeacher(cifar.resnet(100 + seed, width=8, blocks=2), name="ResNet-14, width 8, untrained")


def alphas(trainer, task: Task) -> dict[str, float]:
    """What TGeo-KD's controller gives the teacher on images with right and with wrong labels, after training."""
    from hf_distill.methods.tgeo_kd import tgeo_state

    objective, train = trainer.objective, task.train
    means: dict[bool, list[float]] = {True: [], False: []}
    trainer.model.eval()
    with torch.no_grad():
        for start in range(0, len(train) // classification_tasks.VERSIONS, 100):  # the images as they are
            batch = train[start : start + 100]
            theirs = task.teacher({"pixel_values": batch["pixel_values"]}).logits
            ours = trainer.model(batch["pixel_values"]).logits
            alpha = objective.ratio(tgeo_state(ours, theirs, batch["labels"], objective.state["class_average"]))
            for value, noisy in zip(alpha.tolist(), batch["noisy"].tolist(), strict=True):
                means[noisy].append(value)
    return {
        "alpha, right labels": sum(means[False]) / len(means[False]),
        "alpha, wrong labels": sum(means[True]) / len(means[True]),
    }


ALONE_ROW = of("next_token")
KD_ROW = of(
    "kd",
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 10.0},
    note="temperature 4, 1, 2 or 10, chosen like the learning rate",
)
COMMON = {ALONE: ALONE_ROW, KD: KD_ROW}

PLD_ROW = Row("pld", choices=({}, {"pld_temperature": 4.0}))
TRG_ROW = Row(
    "trg", settings={"trg_student_layer": "-1", "trg_teacher_layer": "-1"}, choices=({}, {"trg_tau_max": 0.1})
)
TGEO_ROW = Row(
    "tgeo_kd",
    settings={"tgeo_outer_every": 4},
    choices=({}, {"tgeo_controller_lr": 0.005}),
    note="the controller learns at every fourth step, from 10 % of the training set",
)
OFA_CHOICES = ({}, {"ofa_eps": [1.5]}, {"ofa_temperature": 4.0})

# what every row of the main table is given beyond its own defaults, and what it may choose
CIFAR_ROWS = COMMON | {
    "forward KL": of("logit_kd", {"temperature": 4.0, "t_squared": True}),
    "KD, standardised logits": of("kd", standardize=True),
    "DKD": of("dkd", {"beta": 2.0}),
    "DKD, standardised logits": of("dkd", standardize=True),
    "DIST": of("dist", {"temperature": 1.0}),
    "NKD": of("nkd", {"temperature": 4.0}),
    "FitNet": of("fitnet", {"weight": 10.0}),
    "AT": of("at"),
    "RKD": of("rkd", {"weight": 0.1}),
    "SP": of("sp", {"weight": 300.0}),
    "CC": of("cc"),
    "CRD": of("crd", needs_index=True, negatives=512, note="512 negatives instead of 16,384"),
    "ReviewKD": of("review", {"weight": 0.1}),
    "ND": Row("nd_loss", choices=({}, {"nd_weight": 0.5}, {"projector": "linear"})),
    "PLD": PLD_ROW,
    "MIX-KD": Row("mix_kd", choices=({}, {"mixup_fraction": 0.5})),
    "TRG": TRG_ROW,
    "TGeo-KD": TGEO_ROW,
    "OFA-KD": Row("ofa_kd", settings={"ofa_stages": [f"hidden_states.{i}" for i in (1, 2, 3)]}, choices=OFA_CHOICES),
    "MaKD": Row(
        "multi_aspect",
        prepare=classification_tasks.with_aspects,
        note="templated answers by class in place of a vision-language model's; it sees no teacher",
    ),
    "MaKD, shuffled answers": Row(
        "multi_aspect",
        prepare=partial(classification_tasks.with_aspects, shuffled=True),
        note="a control: answers of other images",
    ),
}
OFA_UNIFORM = Row("ofa_kd", settings={"ofa_stages": ["uniform"]}, choices=OFA_CHOICES)
HETEROGENEOUS = COMMON | {"DKD": CIFAR_ROWS["DKD"], "DIST": CIFAR_ROWS["DIST"], "OFA-KD": OFA_UNIFORM}
TEXT = COMMON | {
    "DKD": of("dkd", {"beta": 2.0}),
    "DIST": of("dist", {"temperature": 1.0}),
    "PLD": PLD_ROW,
    "LELP": Row("lelp", choices=({}, {"lelp_num_subclasses": 2}, {"lelp_temperature": 2.0})),
    "SinKD": Row("sinkd"),
}
CIFAR_RATES, ATTENTION_RATES = (2e-3, 5e-3, 1e-2, 2e-2), (5e-4, 1e-3, 2e-3, 4e-3)
OF_SENTENCES = dict(  # at a third of the steps every row is still at chance, so choices get them all
    rates=(1e-3, 2e-3, 4e-3, 8e-3), batch=32, tune_share=1.0, measures=("accuracy", "macro_f1", "agreement")
)
ONLINE = dict(make_teacher=peer, note="beside an untrained ResNet-14 that learns, too")

TABLES = {
    "cifar10": Table("CIFAR-10, 1,600 images", classification_tasks.cifar10, CIFAR_ROWS, 500, CIFAR_RATES),
    "cifar10_vit": Table(
        "CIFAR-10, a ViT student",
        partial(classification_tasks.cifar10, student="ViT, width 48, 4 layers, patch 4"),
        HETEROGENEOUS,
        500,
        ATTENTION_RATES,
    ),
    "cifar10_mixer": Table(
        "CIFAR-10, an MLP student",
        partial(classification_tasks.cifar10, student="MLP-Mixer, width 48, 4 layers, patch 4"),
        HETEROGENEOUS,
        500,
        ATTENTION_RATES,
    ),
    "cifar10_longtail": Table(
        "CIFAR-10 with a long tail",
        partial(classification_tasks.cifar10, tail=0.1),
        COMMON | {"RKD": CIFAR_ROWS["RKD"], "TRG": TRG_ROW},
        300,
        CIFAR_RATES,
    ),
    "cifar10_noisy": Table(
        "CIFAR-10 with wrong labels",
        partial(classification_tasks.cifar10, noise=0.4),
        COMMON | {"TGeo-KD": replace(TGEO_ROW, extra=alphas)},
        300,
        CIFAR_RATES,
    ),
    "cifar10_online": Table(
        "CIFAR-10, two networks that learn together",
        classification_tasks.cifar10,
        COMMON
        | {
            "mutual KD": Row("mutual_kd", mutual, {"temperature": 4.0, "t_squared": True}, **ONLINE),
            "BD-KD": Row("bdkd", **ONLINE),
        },
        300,
        CIFAR_RATES,
        measures=("accuracy", "ece", "macro_f1"),
    ),
    "digits_moved": Table(
        "Digits that move",
        classification_tasks.digits,
        COMMON
        | {
            "KD, moved by hand": Row(
                "kd",
                partial(baseline, "kd"),
                prepare=classification_tasks.moved_by_hand,
                note="8 random shifts of each image by up to 3 pixels, those of the test: told what HARD must find",
            ),
            "HARD": Row("hard_augment", settings={"hard_grid_steps": 0}),
        },
        400,
        ATTENTION_RATES,
        measures=("accuracy", "centred accuracy", "agreement"),
    ),
    "sst2": Table("SST-2", partial(classification_tasks.sentences, name="sst2"), TEXT, 300, **OF_SENTENCES),
    "trec": Table("TREC", partial(classification_tasks.sentences, name="trec"), TEXT, 300, **OF_SENTENCES),
}


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
        return {
            "format": FORMAT,
            "slug": row.slug,
            "settings": row.settings,
            "choices": row.choices,
            "calls": [getattr(f, "__name__", None) for f in made],
            "table": [table.steps, table.rates, table.batch, table.weight_decay, table.tune_share],
        } | more

    def run(self, row: Row, changes: dict, rate: float, seed: int, *, tuning: bool) -> dict:
        return train_once(self.task, self.table, row, changes, rate, seed, tuning=tuning).record()

    def chosen(self, name: str) -> dict | None:
        """Learning rate and changes of a row, tried where they have not been; None while another process tries them."""
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
            choice = self.records.read(f"{name} choice", self.asked(row))
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
    return methods is None or name in (ALONE, KD) or row.slug in methods


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
            n for n, t in TABLES.items() if asked & {r.slug for k, r in t.rows.items() if k not in COMMON}
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
