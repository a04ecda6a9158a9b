"""What each classification objective costs beside a plain step and the teacher's forward: time and FLOPs.

    python -m benchmarks.bench_vision        # CPU, two minutes

Every row of the evidence on images trains one ResNet-8 from one ResNet-20 on the same random images. A step is data
loading, teacher, student, objective, backward, clipping, AdamW. What a step cannot do without is the sum of the plain
step and the teacher's forward; a row should not be above it by more than 10 %, unless the method itself runs the
networks more often or trains layers of its own: those are named with what they do more.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cifar
from benchmarks.bench_teacher import Steps
from benchmarks.classification import Row, Table, Task, build
from benchmarks.classification_rows import ALONE, CIFAR_ROWS, TABLES, TEXT, baseline
from benchmarks.classification_tasks import image_dataset
from benchmarks.harness import Report, Variant, interleave, keep_memory, parser
from benchmarks.toy import quiet
from hf_distill import FrozenTeacher

CLOCK = "process CPU time per step, one thread"
SIZES = dict(student=(16, 1), teacher=(16, 3), batch=64, batches=3)
SMALL = dict(student=(4, 1), teacher=(4, 1), batch=20, batches=5)
PLAIN, FORWARD, SUM = "labels only", "teacher's forward", "sum of both"
LIMIT = 1.1
MORE = {
    "FitNet": "trains a convolution",
    "ReviewKD": "trains fusion blocks",
    "CRD": "scores every image against 512 rows of two banks",
    "TRG": "relates every token of an image to each other",
    "OFA-KD": "trains a branch per stage",
    "TGeo-KD": "runs both networks again for its controller (at every step here)",
    "BD-KD": "trains the teacher",
    "mutual KD": "trains the teacher",
    "HARD": "runs both networks on augmented images, forward and backward",
    "MaKD": "has no teacher",
}


def rows() -> dict[str, Row]:
    """Those of the evidence, once each; those of another table where they need its set-up only there."""
    apart = {name: row for table in ("cifar10_online", "digits_moved") for name, row in TABLES[table].rows.items()}
    found = {name: row for name, row in CIFAR_ROWS.items() if name != ALONE and "shuffled" not in name}
    found |= {name: replace(apart[name], make_teacher=_learns) for name in ("mutual KD", "BD-KD")}
    hard = apart["HARD"]
    found["HARD"] = replace(hard, settings=hard.settings | {"hard_start_step": 0})
    found["TGeo-KD"] = replace(found["TGeo-KD"], settings={"tgeo_outer_every": 1})
    found["LELP"] = TEXT["LELP"]
    return {PLAIN: Row("next_token", partial(baseline, "next_token"))} | found


def task_of(sizes: dict) -> Task:
    draw = torch.Generator().manual_seed(0)
    count = sizes["batch"] * sizes["batches"]
    data = image_dataset(torch.rand(count, 3, 32, 32, generator=draw), torch.arange(count) % 10)
    (width, blocks), (wide, deep) = sizes["student"], sizes["teacher"]
    return Task(
        teacher=FrozenTeacher(cifar.resnet(1, width=wide, blocks=deep)),
        make_student=lambda seed: cifar.resnet(seed, width=width, blocks=blocks),
        train=data,
        tune=data,
        validation=data,
        tests={},
        facts={},
    )


def _learns(task: Task, seed: int):
    from hf_distill.teachers import PeerTeacher

    model = task.teacher.model
    peer = cifar.resnet(1, width=model.config.width, blocks=model.config.blocks)
    return PeerTeacher(peer)


class Forward:
    """The teacher's answers for one batch."""

    def __init__(self, teacher: FrozenTeacher, data: Dataset, batch: int):
        self.teacher, self.batch = teacher, {"pixel_values": data[:batch]["pixel_values"]}

    def __call__(self) -> None:
        self.teacher(self.batch, frozenset({"logits"}))

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


def measure(report: Report, *, rounds: int, only: list[str] | None = None, **sizes) -> dict:
    """Adds the table; gives it back with `above`, the rows above the limit that do nothing more."""
    task = task_of(sizes)
    table = Table("", None, {}, steps=10_000, rates=(), batch=sizes["batch"])
    found, variants = {}, {FORWARD: Forward(task.teacher, task.train, sizes["batch"])}
    with tempfile.TemporaryDirectory() as folder:
        for name, row in rows().items():
            if row.is_there and (only is None or name in (PLAIN, *only)):
                out = Path(folder) / row.slug
                trainer = build(task, table, row, {}, 1e-3, 0, task.train, table.steps, out)
                trainer.create_scheduler(table.steps, trainer.create_optimizer())
                variants[name] = Steps(trainer)
        flops = {name: run.flops() for name, run in variants.items()}  # warms up, too
        found = interleave(
            [Variant(name, run, required=True) for name, run in variants.items()], rounds=rounds, warm_up=False
        )
    least = {key: found[PLAIN][key] + found[FORWARD][key] for key in ("min", "median")}
    floor = flops[PLAIN] + flops[FORWARD]
    found = {PLAIN: found.pop(PLAIN), FORWARD: found.pop(FORWARD)} | found
    found = {PLAIN: found[PLAIN], FORWARD: found[FORWARD], SUM: {"times": [], "system": 0.0} | least} | found
    flops[SUM] = floor
    for name, row in found.items():
        row |= {"gigaflops": flops[name] / 1e9, "flops_/_sum": flops[name] / floor}
    above = sorted(n for n, row in found.items() if row["min"] > LIMIT * least["min"] and n not in MORE)
    more = "; ".join(f"{name} {what}" for name, what in MORE.items() if name in found)
    note = f"More than one pass or layers of their own: {more}. Others above {LIMIT:g} × the sum: " + (
        ", ".join(above) or "none"
    )
    case = {"student": "ResNet-8", "teacher": "ResNet-20", "batch": sizes["batch"], "image": "32 × 32"}
    return report.add(case, found, [PLAIN, SUM], note=note + ".", above=above)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    config = {"rounds": options.rounds, "keeps_memory": keep_memory(), **SIZES}
    report = Report("vision", CLOCK, config)
    measure(report, rounds=options.rounds, **SIZES)
    report.write(options.results)


if __name__ == "__main__":
    main()
