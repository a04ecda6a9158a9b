"""Padded, padding-free and packed batches of one length-skewed set through DistillSFTTrainer.

    python -m benchmarks.bench_packing        # CPU, about two minutes

A step holds about the same number of real tokens in all three: 8 documents, or one packed row of 8 mean lengths. What
packing may gain at most is the padding ratio, positions / tokens of the padded batches. On a CPU it stays below: sdpa
computes a flattened row's whole square of attention and then masks it by document.
"""

from __future__ import annotations

import random
import tempfile
from functools import partial

import torch
from datasets import Dataset

from benchmarks.harness import Report, Variant, interleave, keep_memory, parser
from benchmarks.toy import PLAIN, Stamps, quiet, stamped, student, teacher, token_ids, tokenizer
from hf_distill import DistillCallback, DistillSFTConfig, DistillSFTTrainer, FrozenTeacher, LogitKD

DOCUMENTS, LONGEST, ROW = 8, 256, 512
HIDDEN = (256, 512)  # larger than in bench_trainer: packing saves the models' work, not the trainer's
CLOCK = "process CPU time per 1,000 real tokens, one thread"
PADDED = "padded"
VARIANTS = {
    PADDED: dict(per_device_train_batch_size=DOCUMENTS, max_length=LONGEST),
    "padding-free": dict(per_device_train_batch_size=DOCUMENTS, max_length=None, padding_free=True),
    "packed": dict(per_device_train_batch_size=1, max_length=ROW, packing=True),
}


class Counted(Stamps, DistillCallback):
    """Stamps, and how many tokens and positions were seen by the end of each step."""

    def __init__(self, first: int, last: int):
        super().__init__(first, last)
        self.tokens = self.positions = 0
        self.seen: dict[int, tuple[int, int]] = {}

    def on_teacher_forward(self, args, state, control, *, teacher, batch, **kwargs):
        mask, positions = batch.get("attention_mask"), batch["input_ids"].numel()
        self.positions += positions
        self.tokens += positions if mask is None else int(mask.sum())

    def stamp(self, step: int) -> None:
        super().stamp(step)
        self.seen[step] = self.tokens, self.positions

    def between(self) -> tuple[int, int]:
        """Tokens and positions of the steps that the slope covers."""
        return tuple(b - a for a, b in zip(self.seen[self.first], self.seen[self.last], strict=True))


def skewed_lengths(count: int, seed: int = 0) -> list[int]:
    """Log-normal, most short and a few long: mean about 64, at most 256."""
    draw = random.Random(seed)
    return [min(max(int(draw.lognormvariate(3.9, 0.8)), 8), LONGEST) for _ in range(count)]


def trainer_of(folder: str, steps: int, dataset: Dataset, how: dict, hidden: tuple[int, int]) -> DistillSFTTrainer:
    args = DistillSFTConfig(**PLAIN | dict(output_dir=folder, max_steps=steps) | how)
    return DistillSFTTrainer(
        student(hidden[0]),
        teacher=FrozenTeacher(teacher(hidden[1])),
        objective=LogitKD(),
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer(),
    )


def measure(report: Report, *, rounds: int, first: int = 3, last: int = 13, hidden: tuple[int, int] = HIDDEN) -> None:
    dataset = Dataset.from_dict({"input_ids": token_ids(skewed_lengths(DOCUMENTS * (last + 5)))})
    seen: dict[str, tuple[int, int]] = {}

    def run(name: str, how: dict) -> float:
        stamps = Counted(first, last)
        with tempfile.TemporaryDirectory() as folder:
            stamped(lambda: trainer_of(folder, last, dataset, how, hidden), stamps)
        seen[name] = stamps.between()
        return (last - first) * stamps.seconds_per_step / seen[name][0] * 1000

    variants = [Variant(name, partial(run, name, how), required=True) for name, how in VARIANTS.items()]
    rows = interleave(variants, rounds=rounds, warm_up=False)
    padding = {name: positions / tokens for name, (tokens, positions) in seen.items()}
    for name, row in rows.items():
        row["padding_ratio"] = padding[name]
        row["times_the_tokens_per_second"] = rows[PADDED]["min"] / row["min"]
        row["share_of_what_is_possible"] = row["times_the_tokens_per_second"] / (padding[PADDED] / padding[name])
    sizes = {"hidden": list(hidden), "documents": DOCUMENTS, "longest": LONGEST, "packed_row": ROW}
    report.add(sizes | {"steps": [first, last]}, rows, [PADDED])


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, nargs=2, default=(3, 13), help="the steps of the slope")
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    first, last = options.steps
    config = {"rounds": options.rounds, "keeps_memory": keep_memory()}
    report = Report("packing", CLOCK, config)
    measure(report, rounds=options.rounds, first=first, last=last)
    report.write(options.results)


if __name__ == "__main__":
    main()
