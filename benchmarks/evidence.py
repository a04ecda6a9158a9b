"""Measure a method again and rewrite the generated part of its card.

    make evidence METHOD=pld DATA=DIR             # DIR: a folder per set, see `make data`
    make evidence METHOD=taid DATA=DIR DRY=1      # only say what would run

Every command is the one that its card prints. Runs that were finished before are not trained again where the command
keeps them (runs/evidence/); a set that is not there is left out, said aloud, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence_cards import write_all
from benchmarks.harness import RESULTS, ROOT

CIFAR, LANGUAGE = ("cifar10", "resnet_cifar10"), ("tinyshakespeare", "gsm8k")
SEEDS = {"cifar10_mixer": 3, "cifar10_vit": 3}  # of tables whose runs are long
# what tables read that is not CIFAR-10; digits are scikit-learn's
SETS_OF_TABLES = {"sst2": ("sst2",), "trec": ("trec",), "digits_moved": ()}


@dataclass(frozen=True)
class Step:
    """One command: a module of benchmarks, its flags (DIR stands for the data folder), the sets it reads."""

    module: str
    flags: str
    sets: tuple[str, ...] = ()

    def argv(self, data: Path) -> list[str]:
        given = [str(data) if flag == "DIR" else flag for flag in self.flags.split()]
        return [sys.executable, "-m", f"benchmarks.{self.module}", *given]

    def __str__(self) -> str:
        return f"python -m benchmarks.{self.module} {self.flags}"


STEPS: dict[str, list[Step]] = (
    {
        slug: [
            Step("evidence_lm", "--data DIR --set tinyshakespeare", LANGUAGE[:1]),
            Step("evidence_lm", "--data DIR --set gsm8k --teacher_steps 1000", LANGUAGE[1:]),
            Step("evidence_lm", "--data DIR --set tinyshakespeare --pretrain 600 --steps 250", LANGUAGE[:1]),
            Step("evidence_lm", "--data DIR --set gsm8k --pretrain 600 --steps 250", LANGUAGE[1:]),
        ]
        for slug in ("logit_kd", "taid")
    }
    | {
        "llava_mod": [
            Step("evidence_vlm", "--set digits --seeds 0 1 2 3 4"),
            Step("evidence_vlm", "--set nlvr --data DIR --seeds 0 1 2", ("nlvr",)),
        ],
        "ddk": [Step("evidence_ddk", "--data DIR --seeds 3", ("wikitext2", *LANGUAGE))],
        "fidelity": [Step("evidence_fidelity", "--data DIR --seeds 3", LANGUAGE[:1])],
        "miniplm": [Step("evidence_miniplm", "--data DIR --seeds 3", ("wikitext2", *LANGUAGE))],
        "onpolicy": [
            Step("evidence_onpolicy", "--data DIR --seeds 3", LANGUAGE[:1])
        ],  # no method but a way of training
        "swing": [Step("evidence_swing", "--data DIR --seeds 3", LANGUAGE[:1])],
        "teacher_hacking": [Step("evidence_hacking", "--data DIR --seeds 3", LANGUAGE[:1])],
        "uld": [Step("evidence_uld", "--data DIR --seeds 3", LANGUAGE[:1])],
    }
)


def steps_of(slug: str) -> list[Step]:
    """The commands behind a method's card.

    Raises:
        ValueError: nothing measures it.
    """
    if slug in STEPS:
        return STEPS[slug]
    from benchmarks.classification_rows import BASELINES, TABLES

    found = []
    for name, table in TABLES.items():
        if slug in {row.slug for key, row in table.rows.items() if key not in BASELINES}:
            flags = f"--data DIR --tables {name} --methods {slug} --seeds {SEEDS.get(name, 5)}"
            found.append(Step("evidence_vision", flags, SETS_OF_TABLES.get(name, CIFAR)))
    if not found:
        raise ValueError(f"no evidence is measured for {slug!r}; for these it is: {', '.join(measured())}")
    return found


def measured() -> list[str]:
    """Every method whose card can be made again."""
    from benchmarks.classification_rows import BASELINES, TABLES
    from hf_distill.methods import METHODS

    rows = {row.slug for table in TABLES.values() for key, row in table.rows.items() if key not in BASELINES}
    return sorted({*STEPS, *(rows & set(METHODS))})


def run(slug: str, data: Path, *, dry: bool = False) -> list[str]:
    """Run a method's commands; returns what was left out or failed."""
    wrong = []
    for step in steps_of(slug):
        missing = [name for name in step.sets if not (data / name).is_dir()]
        if missing:
            wrong.append(f"left out, {', '.join(missing)} not in {data} (make data DATA={data}): {step}")
            continue
        print(f"+ {step}", flush=True)
        if not dry and subprocess.run(step.argv(data), cwd=ROOT).returncode:
            wrong.append(f"failed: {shlex.join(step.argv(data))}")
    return wrong


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", help="slug of a method")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per set")
    parser.add_argument("--dry", action="store_true", help="only print the commands")
    options = parser.parse_args(argv)
    try:
        wrong = run(options.method, options.data.resolve(), dry=options.dry)
    except ValueError as error:
        parser.error(str(error))
    if not options.dry:
        write_all(RESULTS)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
