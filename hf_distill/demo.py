"""`make demo`: a teacher becomes a smaller student, offline, beside the student that had no teacher.

Everything is on the machine: Python's own sources as text (held out by module) and a small pretrained teacher. Every row
chooses its learning rate from the same three on validation, then runs again with another seed and the same rate.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from dataclasses import dataclass, field

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_distill.embedded.corpus import stdlib_documents
from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.methods.logit_kd import LogitKDConfig, build_objective
from hf_distill.methods.taid import TAID, TAIDConfig
from hf_distill.objectives import NextToken
from hf_distill.recipe import EMBEDDED, small_student
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.trainers import DistillSFTTrainer

BLOCK, BATCH = 128, 16
LEARNING_RATES = (2e-3, 5e-3, 1e-2)
SEEDS = (0, 1)
BUDGET_SECONDS = 230
ALONE, ALONE_TIME, KL, TAID_ROW = "student alone", "student alone, equal time", "forward KL", "TAID"
OBJECTIVES = {
    ALONE: NextToken,
    ALONE_TIME: NextToken,
    KL: lambda: build_objective(LogitKDConfig()),
    TAID_ROW: lambda: TAID(TAIDConfig()),
}
PROMPTS = ("def __init__(self, ", "import os\nimport sys\n\ndef main(", "class Error(Exception):\n")


@dataclass
class Run:
    """One training and what its student does on held-out modules."""

    row: str
    learning_rate: float
    seed: int
    steps: int
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    validation: float = 0.0
    test: dict = field(default_factory=dict)
    trainer: DistillSFTTrainer | None = None

    @property
    def student(self):
        return self.trainer.model


class Bar(TrainerCallback):
    """Moves one bar over all runs."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)


class Demo:
    """The runs of the table."""

    def __init__(self, output_dir: str, seconds: float):
        self.output_dir, self.seconds = output_dir, seconds
        self.teacher = FrozenTeacher.from_pretrained(str(EMBEDDED / "teacher"))
        self.tokenizer = self.teacher.tokenizer
        self.train = self.blocks("train")
        self.validation = self.blocks("validation", 60_000)
        self.test = self.blocks("test", 120_000)
        self.bar: tqdm | None = None

    def blocks(self, split: str, max_characters: int | None = None) -> Dataset:
        """A split as rows of BLOCK tokens; documents follow each other, separated by the end token."""
        texts = [d["text"] for d in stdlib_documents(split, max_characters)]
        tokens = [i for ids in self.tokenizer(texts)["input_ids"] for i in (*ids, self.tokenizer.eos_token_id)]
        rows = [tokens[a : a + BLOCK] for a in range(0, len(tokens) - BLOCK + 1, BLOCK)]
        return Dataset.from_dict({"input_ids": rows, "labels": rows})

    def trainer(self, row: str, learning_rate: float, seed: int, steps: int) -> DistillSFTTrainer:
        args = DistillSFTConfig(
            output_dir=os.path.join(self.output_dir, "student"),
            max_steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            gradient_checkpointing=False,
            max_length=BLOCK,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillSFTTrainer(
            small_student(self.teacher.config, seed),
            teacher=self.teacher,
            objective=OBJECTIVES[row](),
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def run(self, row: str, learning_rate: float, seed: int, steps: int) -> Run:
        if self.bar is not None:
            self.bar.set_description(f"{row}, learning rate {learning_rate:g}, seed {seed}")
        trainer = self.trainer(row, learning_rate, seed, steps)
        if self.bar is not None:
            trainer.add_callback(Bar(self.bar))
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        run = Run(row, learning_rate, seed, steps, seconds, steps * BATCH * BLOCK / seconds)
        run.validation = trainer.evaluate(metric_key_prefix="eval")["eval_cross_entropy"]
        run.test = self.held_out(trainer, row)
        run.trainer = trainer
        return run

    def held_out(self, trainer: DistillSFTTrainer, row: str) -> dict[str, float]:
        values = trainer.evaluate(self.test, metric_key_prefix="test")
        return {key: values[f"test_{key}"] for key in ("cross_entropy", "teacher_kl", "agreement")}

    def steps_for_budget(self) -> tuple[int, float]:
        """How many steps fit the time, and how many times longer a step with a teacher takes than one without."""
        times = {}
        for row in (ALONE, KL, KL, ALONE):
            times[row] = min(times.get(row, 1e9), self.run(row, 1e-3, 0, 8).seconds / 8)
        ratio = max(times[KL] / times[ALONE], 1.0)
        runs = len(LEARNING_RATES) + len(SEEDS) - 1
        steps = self.seconds / (runs * (times[ALONE] * (1 + ratio) + 2 * times[KL]))
        return int(min(max(steps, 40), 400)), ratio

    def all_rows(self) -> dict[str, list[Run]]:
        """Per row: one run per seed, at the learning rate that was best on validation."""
        print("Measuring this machine's speed ...", flush=True)
        steps, ratio = self.steps_for_budget()
        plan = {row: steps for row in (ALONE, KL, TAID_ROW)} | {ALONE_TIME: round(steps * ratio)}
        total = sum(plan.values()) * (len(LEARNING_RATES) + len(SEEDS) - 1)
        print(
            f"{steps} steps of {BATCH * BLOCK} tokens a run; a step with the teacher takes {ratio:.1f} times as long."
        )
        kept: dict[str, list[Run]] = {}
        with tqdm(total=total, unit="step", dynamic_ncols=True) as self.bar:
            for row in (ALONE, KL, TAID_ROW, ALONE_TIME):
                if row == ALONE_TIME:  # by the time that was really spent
                    plan[row] = round(steps * self._mean_seconds(kept[KL]) / self._mean_seconds(kept[ALONE]))
                first = [self.run(row, rate, SEEDS[0], plan[row]) for rate in LEARNING_RATES]
                best = min(first, key=lambda run: run.validation)
                others = [self.run(row, best.learning_rate, seed, plan[row]) for seed in SEEDS[1:]]
                kept[row] = [best, *others]
        return {row: kept[row] for row in OBJECTIVES}

    @staticmethod
    def _mean_seconds(runs: list[Run]) -> float:
        return statistics.mean(run.seconds for run in runs)

    @torch.no_grad()
    def teacher_cross_entropy(self) -> float:
        """Of the teacher itself on the test modules, nats per token."""
        total = count = 0.0
        for start in range(0, len(self.test), 64):
            ids = torch.tensor(self.test[start : start + 64]["input_ids"])
            logits = self.teacher.model(ids).logits[:, :-1]
            total += observe(logits, None, {"ce": LabelCrossEntropy()}, labels=ids[:, 1:])["ce"].sum().item()
            count += ids[:, 1:].numel()
        return total / count


def table(rows: dict[str, list[Run]], teacher_ce: float, teacher_parameters: int) -> str:
    """The comparison on held-out modules, mean over the seeds ± half their range."""
    columns = (
        ("cross-entropy", 18),
        ("KL to teacher", 18),
        ("agreement", 18),
        ("parameters", 12),
        ("tokens/s", 10),
        ("rate", 8),
    )
    head = " " * 28 + "".join(f"{name:>{width}s}" for name, width in columns)
    lines = [
        head,
        f"{'teacher':28s}" + "".join(f"{v:9.4f}{'':9s}" for v in (teacher_ce, 0, 1)) + f"{teacher_parameters:12,d}",
    ]
    for row, runs in rows.items():
        cells = []
        for key in ("cross_entropy", "teacher_kl", "agreement"):
            values = [run.test[key] for run in runs]
            cells.append(f"{statistics.mean(values):9.4f} ±{(max(values) - min(values)) / 2:7.4f}")
        speed = statistics.mean(run.tokens_per_second for run in runs)
        parameters = runs[0].student.num_parameters()
        lines.append(
            f"{row:28s}"
            + "".join(f"{c:>18s}" for c in cells)
            + f"{parameters:12,d}{speed:10,.0f}{runs[0].learning_rate:8g}"
        )
    return "\n".join(lines)


def verdicts(rows: dict[str, list[Run]]) -> list[str]:
    """Where distillation helped and where it did not, seed by seed."""
    lines = []
    for row in (KL, TAID_ROW):
        for baseline in (ALONE, ALONE_TIME):
            for key, label, sign in (
                ("cross_entropy", "cross-entropy", 1),
                ("agreement", "agreement with the teacher", -1),
            ):
                gains = [sign * (b.test[key] - r.test[key]) for r, b in zip(rows[row], rows[baseline], strict=True)]
                word = "helps" if min(gains) > 0 else "does not help" if max(gains) <= 0 else "is not clear"
                shown = ", ".join(f"{gain:+.4f}" for gain in gains)
                at = "equal steps" if baseline == ALONE else "equal time"
                lines.append(f"{row} {word} in {label} at {at} (gain per seed: {shown})")
    return lines


def completions(rows: dict[str, list[Run]], demo: Demo) -> str:
    """What the teacher and the students write, side by side."""
    from hf_distill.training.callbacks import SampleCompletionsCallback

    sampler = SampleCompletionsCallback(list(PROMPTS), max_new_tokens=32)
    models = {"teacher": demo.teacher.model} | {row: rows[row][-1].student for row in (ALONE, KL, TAID_ROW)}
    texts = {name: sampler.complete(model, demo.tokenizer) for name, model in models.items()}
    lines = []
    for i, prompt in enumerate(PROMPTS):
        lines.append(f"prompt {prompt!r}")
        lines += [f"  {name:14s} {texts[name][i]!r}" for name in models]
    return "\n".join(lines)


def picture(rows: dict[str, list[Run]], teacher_ce: float, path: str) -> None:
    """Bars of the three measures; a point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    titles = {
        "cross_entropy": "cross-entropy (nats), lower is better",
        "teacher_kl": "KL(teacher || student), lower is better",
    }
    for axis, key in zip(axes, ("cross_entropy", "teacher_kl", "agreement"), strict=True):
        values = {row: [run.test[key] for run in runs] for row, runs in rows.items()}
        means = [statistics.mean(v) for v in values.values()]
        axis.bar(range(len(values)), means, color=["#9aa5b1", "#c3cad2", "#2f6fb0", "#1b9e77"])
        for i, points in enumerate(values.values()):
            axis.plot([i] * len(points), points, "k.", markersize=6)
        if key == "cross_entropy":
            axis.axhline(teacher_ce, color="#b0413e", linestyle="--", label="teacher")
            axis.legend()
        low, high = min(means), max(means)
        axis.set_ylim(max(0, low - (high - low) * 2), high + (high - low) * 0.8 + 1e-6)
        if key == "cross_entropy":
            axis.set_ylim(min(teacher_ce, low) * 0.95, high * 1.03)
        axis.set_xticks(range(len(values)), [row.replace(", ", ",\n") for row in values], fontsize=8)
        axis.set_title(titles.get(key, "top-1 agreement, higher is better"), fontsize=10)
    figure.suptitle("Held-out modules of Python's standard library; dots are seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_distill.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=os.path.join("runs", "demo"))
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="Time for all runs together.")
    options = parser.parse_args()
    quiet()
    os.makedirs(options.output_dir, exist_ok=True)
    print("hf_distill demo: a small language model of Python source learns from a larger one. Everything is local.")
    demo = Demo(options.output_dir, options.seconds)
    teacher_ce, teacher_parameters = demo.teacher_cross_entropy(), demo.teacher.model.num_parameters()
    rows = demo.all_rows()
    print(table(rows, teacher_ce, teacher_parameters), end="\n\n")
    print("\n".join(verdicts(rows)), end="\n\n")
    alone = statistics.mean(run.test["cross_entropy"] for run in rows[ALONE])
    ratio = 2.718281828459045 ** (teacher_ce - alone)
    print(f"The teacher's perplexity is {ratio:.2f} times the student alone's.", end="\n\n")
    print(completions(rows, demo), end="\n\n")
    save(rows, demo, teacher_ce, ratio)
    print(f"In {options.output_dir}: student/ (a folder for from_pretrained, with its card), demo.png, results.json")


def quiet() -> None:
    """One bar instead of every library's own."""
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_distill").setLevel(logging.ERROR)


def save(rows: dict[str, list[Run]], demo: Demo, teacher_ce: float, ratio: float) -> None:
    best = min((KL, TAID_ROW), key=lambda row: statistics.mean(run.validation for run in rows[row]))
    trainer = rows[best][-1].trainer
    trainer.save_model()
    trainer.create_model_card(model_name="demo student", dataset_name="the Python standard library's sources")
    picture(rows, teacher_ce, os.path.join(demo.output_dir, "demo.png"))
    results = {
        "teacher_cross_entropy": teacher_ce,
        "perplexity_ratio": ratio,
        "rows": {
            row: [{k: v for k, v in vars(run).items() if k != "trainer"} for run in runs] for row, runs in rows.items()
        },
    }
    with open(os.path.join(demo.output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
