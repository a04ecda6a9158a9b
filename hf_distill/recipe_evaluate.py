"""`hf-distill evaluate`: how far a student is from its teacher, whether it knows when it is right, what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_distill import recipe as language
from hf_distill import recipe_classification as classes
from hf_distill.baselines.probe import model_of
from hf_distill.evaluation.calibration import take_reliability, token_calibration
from hf_distill.evaluation.classification import Reliability, reliability_picture
from hf_distill.evaluation.speed import tokens_per_second
from hf_distill.objectives import LogitKD
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.checks import check_processes
from hf_distill.training.trainers import DistillSFTTrainer, DistillTrainer

TASKS = ("language", "image", "text")
LABELS = dict(language.MEASURES) | dict(classes.MEASURES)
COST = ("runtime", "per_second", "preparation_time")


@dataclass
class EvaluateArguments:
    """What `hf-distill evaluate` adds to a recipe's flags."""

    speed_rows: int = field(
        default=4, metadata={"help": "Rows on which both models' tokens per second are measured; 0 leaves it out."}
    )

    def __post_init__(self):
        if self.speed_rows < 0:
            raise ValueError(f"speed_rows must be 0 or more, got {self.speed_rows}")


def main(flags: list[str]) -> dict:
    """Evaluate on the test split (without one, on the train split); print a table, write evaluation.json and a picture.

    Args:
        flags: `--task language|image|text` (default language), and those of a recipe of that task.

    Raises:
        ValueError: no student or no data, an empty set, models or classes that do not fit.
    """
    task, flags = _task(flags)
    found = (_language if task == "language" else _classes)(task, flags)
    if found is None:
        return {}
    metrics, diagrams, folder = found
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{LABELS.get(name, name.replace('_', ' ')):36s} {shown}")
    print(f"written to {folder / 'evaluation.json'}")
    try:
        reliability_picture(diagrams, str(folder / "reliability.png"), "held-out")
    except ImportError:
        print("no reliability picture: matplotlib is not installed (pip install 'hf-distill[report]')")
    return metrics


def _task(flags: list[str]) -> tuple[str, list[str]]:
    if "--task" not in flags:
        return "language", flags
    place = flags.index("--task")
    task = flags[place + 1] if place + 1 < len(flags) else None
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    return task, flags if task != "language" else flags[:place] + flags[place + 2 :]


def _language(task: str, flags: list[str]) -> tuple | None:
    script, recipe, args, model, settings = language.parse(EvaluateArguments, "evaluate", flags)
    check_processes(args.world_size)
    setup = language.load_language_setup(script, recipe, args, model)
    rows = setup.train if setup.eval is None else setup.eval
    trainer = DistillSFTTrainer(
        setup.student,
        teacher=setup.teacher,
        objective=LogitKD(),
        args=_quiet(args),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=setup.processing_class,
    )
    trainer.eval_observed = token_calibration()
    metrics = trainer.evaluate()
    diagram = take_reliability(metrics, rows=10_000)
    names = ("cross_entropy", "teacher_kl", "agreement")
    result = {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics} | {"ece": diagram.error}
    result |= _sizes(setup)
    if settings.speed_rows and isinstance(setup.teacher, FrozenTeacher) and "input_ids" in trainer.eval_dataset[0]:
        result |= _speed(trainer, setup, settings.speed_rows)
    return (result, {"student": diagram}, args.output_dir) if trainer.is_world_process_zero() else None


def _classes(task: str, flags: list[str]) -> tuple | None:
    script, recipe, args, model, _ = classes.parse(EvaluateArguments, "evaluate", flags, task=task)
    setup = classes.load_classification_setup(script, recipe, args, model)
    rows = setup.train if setup.eval is None else setup.eval
    arguments = setup.trainer_arguments | {"eval_dataset": rows}
    trainer = DistillTrainer(
        setup.student, teacher=setup.teacher, objective=LogitKD(), args=_quiet(args), train_dataset=rows, **arguments
    )
    held_out = trainer.predict(rows, metric_key_prefix="eval")
    metrics = {k.removeprefix("eval_"): v for k, v in held_out.metrics.items() if not k.endswith(COST)}
    scores, theirs = classes.teacher_scores(trainer)
    result = {name: metrics[name] for name, _ in classes.MEASURES if name in metrics}
    result |= {"teacher_kl": metrics["teacher_kl"]} | {f"teacher_{name}": value for name, value in scores.items()}
    logits, labels = torch.as_tensor(held_out.predictions), torch.as_tensor(held_out.label_ids)
    diagrams: dict[str, Reliability] = {"student": classes.measures.reliability(logits, labels), "teacher": theirs}
    return (result | _sizes(setup), diagrams, args.output_dir) if trainer.is_world_process_zero() else None


def _quiet(args):
    args.report_to, args.eval_strategy, args.save_strategy = [], "no", "no"
    return args


def _sizes(setup) -> dict[str, float]:
    """Parameters and bytes of weights, and how many times the teacher's are the student's."""
    student = setup.student
    sizes = {"parameters": language.parameters_of(student), "weight_bytes": student.get_memory_footprint()}
    teacher = model_of(setup.teacher)
    if teacher is None:
        return sizes
    sizes |= {"teacher_parameters": teacher.num_parameters(), "teacher_weight_bytes": teacher.get_memory_footprint()}
    return sizes | {"times_smaller": sizes["teacher_parameters"] / sizes["parameters"]}


def _speed(trainer, setup, count: int) -> dict[str, float]:
    """Tokens per second of both models on the longest rows, one beside the other."""
    rows = sorted((row["input_ids"] for row in trainer.eval_dataset.select_columns("input_ids")), key=len)[-count:]
    width = min(len(rows[0]), 256)
    ids = torch.tensor([row[:width] for row in rows])
    models = {"student": trainer.student(), "teacher": setup.teacher.model}
    speed = tokens_per_second(models, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rounds=3)
    found = {f"{who}_tokens_per_second_{task}": value for who, own in speed.items() for task, value in own.items()}
    return found | {"times_faster": speed["student"]["read"] / speed["teacher"]["read"]}
