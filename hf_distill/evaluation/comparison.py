"""Fair comparisons of objectives on language models: same student, data, order, steps and tuning for every row.

The demo and the evidence cards are made of this.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.objectives import Objective
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.trainers import DistillSFTTrainer

MEASURES = ("cross_entropy", "teacher_kl", "agreement")
LABELS = {
    "cross_entropy": "cross-entropy (nats), lower",
    "teacher_kl": "KL(teacher || student), lower",
    "agreement": "top-1 agreement, higher",
}


@dataclass
class Run:
    """One training and what its student does on held-out text."""

    row: str
    learning_rate: float
    seed: int
    steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens_per_second: float = 0.0
    validation: float = 0.0
    test: dict[str, float] = field(default_factory=dict)
    trainer: DistillSFTTrainer | None = None

    @property
    def student(self) -> PreTrainedModel:
        return self.trainer.model

    def record(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "trainer"}


class _Bar(TrainerCallback):
    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)


def token_blocks(tokenizer, texts: list[str], block: int) -> Dataset:
    """Rows of `block` tokens, ready for the trainer; documents follow each other, separated by the end token."""
    tokens = [i for ids in tokenizer(texts)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    rows = [tokens[a : a + block] for a in range(0, len(tokens) - block + 1, block)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


@dataclass
class Comparison:
    """Rows of a table: named objectives that train the same student from the same teacher.

    Args:
        objectives: row -> a function that makes its objective anew.
        make_student: seed -> the student before training; the same for every row.
        train, validation, test: from `token_blocks`.
        learning_rates: every row chooses the best of these on validation, with the first seed.
        seeds: of initialisation and data order; paired over rows.
    """

    teacher: FrozenTeacher
    objectives: dict[str, Callable[[], Objective]]
    make_student: Callable[[int], PreTrainedModel]
    train: Dataset
    validation: Dataset
    test: Dataset
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    batch: int = 16
    warmup: float = 0.05
    adam_beta2: float = 0.999
    output_dir: str = "runs/comparison"
    bar: tqdm | None = None

    @property
    def block(self) -> int:
        return len(self.train[0]["input_ids"])

    @property
    def runs_per_row(self) -> int:
        return len(self.learning_rates) + len(self.seeds) - 1

    def trainer(self, row: str, learning_rate: float, seed: int, steps: int) -> DistillSFTTrainer:
        args = DistillSFTConfig(
            output_dir=os.path.join(self.output_dir, "student"),
            max_steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,
            adam_beta2=self.adam_beta2,
            weight_decay=0.1,
            gradient_checkpointing=False,
            max_length=self.block,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillSFTTrainer(
            self.make_student(seed),
            teacher=self.teacher,
            objective=self.objectives[row](),
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            processing_class=self.teacher.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, row: str, learning_rate: float, seed: int, steps: int) -> Run:
        """Train one student and measure it on validation and test."""
        trainer = self.trainer(row, learning_rate, seed, steps)
        if self.bar is not None:
            self.bar.set_description(f"{row}, learning rate {learning_rate:g}, seed {seed}")
            trainer.add_callback(_Bar(self.bar))
        start, busy = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        run = Run(row, learning_rate, seed, steps, seconds, busy, steps * self.batch * self.block / seconds)
        run.validation = trainer.evaluate()["eval_cross_entropy"]
        values = trainer.evaluate(self.test, metric_key_prefix="test")
        run.test = {key: values[f"test_{key}"] for key in MEASURES}
        run.trainer = trainer
        return run

    def row(self, name: str, steps: int) -> list[Run]:
        """One run per seed, at the learning rate that was best on validation with the first seed."""
        first = [self.run(name, rate, self.seeds[0], steps) for rate in self.learning_rates]
        best = min(first, key=lambda run: run.validation)
        return [best, *(self.run(name, best.learning_rate, seed, steps) for seed in self.seeds[1:])]

    @torch.no_grad()
    def teacher_cross_entropy(self) -> float:
        """Of the teacher itself on the test text, nats per token."""
        total = count = 0.0
        for start in range(0, len(self.test), 64):
            ids = torch.tensor(self.test[start : start + 64]["input_ids"])
            logits = self.teacher.model(ids).logits[:, :-1]
            total += observe(logits, None, {"ce": LabelCrossEntropy()}, labels=ids[:, 1:])["ce"].sum().item()
            count += ids[:, 1:].numel()
        return total / count


@dataclass(frozen=True)
class Paired:
    """Differences of two rows, seed by seed."""

    mean: float
    standard_error: float
    values: tuple[float, ...]
    higher_is_better: bool = False

    @property
    def verdict(self) -> str:
        """Of the first row beside the second: beats and loses mean beyond 2 standard errors, over 3 and more seeds."""
        if len(self.values) < 3 or abs(self.mean) <= 2 * self.standard_error:
            return "not told apart"
        return "beats" if (self.mean > 0) == self.higher_is_better else "loses to"


def paired(
    rows: dict[str, list[Run]], row: str, baseline: str, measure: str = "cross_entropy", *, higher_is_better=False
) -> Paired:
    """Mean paired difference `row` - `baseline` of a measure on the test set, and its standard error over seeds."""
    values = tuple(a.test[measure] - b.test[measure] for a, b in zip(rows[row], rows[baseline], strict=True))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Paired(statistics.mean(values), error, values, higher_is_better)


def times_longer(runs: list[Run], beside: list[Run]) -> float:
    """How many times longer a step of `runs` takes.

    On a CPU by the process's own time: what else the machine does must not change who gets how many steps.
    """
    clock = "seconds" if torch.accelerator.is_available() else "cpu_seconds"
    per_step = [statistics.mean(getattr(run, clock) / run.steps for run in some) for some in (runs, beside)]
    return max(per_step[0] / per_step[1], 1.0)


def picture(
    rows: dict[str, list[Run]], teacher: dict[str, float], path: str, title: str, labels: dict[str, str] = LABELS
) -> None:
    """A dot per seed and a bar at the mean, per row and measure. Needs matplotlib (the extra `report`).

    Args:
        teacher: what the teacher itself has, per measure where it has one.
        labels: measure -> its axis, ending in what is better.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4 * len(labels), 1.2 + 0.4 * len(rows))
    figure, axes = plt.subplots(1, len(labels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, (key, label) in zip(axes[0], labels.items(), strict=True):
        for i, runs in enumerate(rows.values()):
            values = [run.test[key] for run in runs]
            axis.plot(values, [i] * len(values), "o", color="#2f6fb0", alpha=0.6)
            axis.plot([statistics.mean(values)], [i], "k|", markersize=16)
        if key in teacher:
            axis.axvline(teacher[key], color="#b0413e", linestyle="--", label="teacher")
            axis.legend(fontsize=8)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axis.set_title(f"{label} is better", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"{title}; dots are seeds", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
