"""Passes on two ranks: a whole one, one that is killed, one of a single block. pass_worker.py FOLDER"""

import contextlib
import os
import sys

import torch
from safetensors.torch import save_file

from hf_distill import LogitKD
from hf_distill.curricula.passes import run_pass
from tests.baselines.models import CLASSES, trainer

NEEDS = frozenset({"features:embedding", "logits"})


def class_sums(signals) -> dict:
    one_hot = torch.nn.functional.one_hot(signals.labels, CLASSES).double()
    return {"sum": one_hot.T @ signals.features["embedding"].double(), "count": one_hot.sum(0)}


class Counting:
    """Counts the examples it saw, and dies at a given call."""

    def __init__(self, dies_at: int | None = None):
        self.seen, self.calls, self.dies_at = 0, 0, dies_at

    def __call__(self, signals) -> dict:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.seen += len(signals.labels)
        return class_sums(signals)


def main(folder: str) -> None:
    def made(name: str):
        return trainer(os.path.join(folder, name), "vit", LogitKD(), n=14)

    run = made("two")
    assert run.accelerator.num_processes == 2, run.accelerator.num_processes
    rank = run.accelerator.process_index
    whole = run_pass(run, "means", class_sums, needs=NEEDS, block_examples=3)
    dying = Counting(dies_at=2)
    with contextlib.suppress(KeyboardInterrupt):
        run_pass(made("killed"), "means", dying, needs=NEEDS, block_examples=3)
    small = run_pass(made("small"), "means", class_sums, needs=NEEDS)
    save_file(
        {f"whole.{k}": v for k, v in whole.items()}
        | {f"small.{k}": v for k, v in small.items()}
        | {"seen": torch.tensor(dying.seen)},
        os.path.join(folder, f"rank-{rank}.safetensors"),
    )
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1])
