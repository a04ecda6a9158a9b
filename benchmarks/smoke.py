"""Every benchmark at its smallest, in one process (memory's points apart): do they run, from measuring to the page?

    python -m benchmarks.smoke        # CPU, under a minute

Its figures go to runs/bench-smoke and mean nothing.
"""

from __future__ import annotations

import shutil
import time

import torch

from benchmarks import (
    bench_loss,
    bench_memory,
    bench_moe,
    bench_packing,
    bench_teacher,
    bench_trainer,
    bench_vision,
    report,
)
from benchmarks.harness import MIB, ROOT, Report, keep_memory
from benchmarks.toy import quiet

FOLDER = ROOT / "runs" / "bench-smoke"


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    quiet()
    config = {"rounds": 1, "keeps_memory": keep_memory()}
    FOLDER.mkdir(parents=True, exist_ok=True)

    memory = Report("memory_cpu", "VmHWM above VmRSS before the call", config)
    base = bench_memory.CPU | dict(vocabulary=8192, student_hidden=32, teacher_hidden=32, tile_bytes=8 * MIB)
    bench_memory.measure(memory, {"rows": (256, 512)}, base, variants=["naive", "ours (eager)"])
    memory.write(FOLDER)

    loss = Report("loss_cpu", "process CPU time, one thread", config)
    sizes = dict(vocabulary=4096, rows=64, student_hidden=64, teacher_hidden=128)
    bench_loss.measure(loss, ["CE", "JSD"], rounds=2, **sizes)
    loss.write(FOLDER)

    trainer = Report("trainer", bench_trainer.CLOCK, config)
    bench_trainer.measure(trainer, rounds=1, first=2, last=5)
    trainer.write(FOLDER)

    packing = Report("packing", bench_packing.CLOCK, config)
    bench_packing.measure(packing, rounds=1, first=2, last=5, hidden=(64, 128))
    packing.write(FOLDER)

    moe = Report("moe", bench_moe.CLOCK, config)
    bench_moe.measure(moe, rounds=1, repeats=1, tokens=64, experts=(2, 4))
    moe.write(FOLDER)

    teacher = Report("teacher", bench_teacher.CLOCK, config)
    bench_teacher.measure_all(teacher, rounds=1, **bench_teacher.SMALL)
    teacher.write(FOLDER)

    vision = Report("vision", bench_vision.CLOCK, config)
    bench_vision.measure(vision, rounds=1, **bench_vision.SMALL)
    vision.write(FOLDER)

    for page in ("performance", "teachers"):
        shutil.copy(ROOT / "docs" / f"{page}.md", FOLDER)
    report.write(FOLDER, FOLDER)
    print(f"all benchmarks ran in {time.perf_counter() - start:.0f} s; the pages they make are in {FOLDER}")


if __name__ == "__main__":
    main()
